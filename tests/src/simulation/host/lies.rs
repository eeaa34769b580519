//! A host that somebody else has taken over, or whose disk lies. It chooses anew for each offer and for
//! each message what it says.

use std::collections::BTreeMap;

use clamcast_proto::dsse::Envelope;
use clamcast_proto::receipt::InstallNumber;

use super::*;

/// How long a lie goes on at most: beyond every deadline.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

/// The first number of a receipt that lies: far above those that the core makes.
const FIRST: u64 = 1 << 40;

/// Receipts of a dishonest host that the master has not acknowledged.
#[derive(Default)]
pub(super) struct Lies {
    said: BTreeMap<u64, Envelope>,
    made: u64,
}

impl Lies {
    pub(super) fn acknowledged(&mut self, seq: u64) {
        self.said.remove(&seq);
    }
}

/// What a dishonest host is at.
pub(super) struct Lying {
    lie: Lie,
    offered: Offered,
    /// When it lied last, and until when it goes on.
    last: Instant,
    end: Instant,
    /// Bytes that it has taken so far.
    sent: u64,
}

#[derive(Clone, Copy)]
enum Lie {
    /// A receipt that says what is not so.
    Claim(Claim),
    /// It takes the files drop by drop, and says that it is at it.
    Drip { bytes_per_sec: u64 },
    /// It says again and again that it is at it.
    RepeatProgress,
}

#[derive(Clone, Copy)]
enum Claim {
    Refused,
    Live,
    HostFault,
    /// A generation that nobody published, so far above this one.
    Above(u64, Outcome),
    /// Other databases under the same number.
    Other,
}

impl Host {
    /// Does something with an offer, and seldom what it should.
    pub(super) fn lie(&mut self, offered: Offered, sight: &mut Sight<'_>) {
        let lie = match sight.random.random_range(0..20) {
            0..6 => Lie::Claim(Claim::Refused),
            6..9 => Lie::Claim(Claim::Live),
            9 => Lie::Claim(Claim::HostFault),
            10 => Lie::Claim(Claim::Above(1, Outcome::Live)),
            11 => Lie::Claim(Claim::Above(1000, Outcome::Installed)),
            12 => Lie::Claim(Claim::Other),
            13 | 14 => Lie::Drip {
                bytes_per_sec: sight.random.random_range(1..40_000),
            },
            15 | 16 => Lie::RepeatProgress,
            17 => {
                let long = Duration::from_secs(sight.random.random_range(60..3 * 3600));
                return sight.deeds.push(Deed::Vanish(long));
            }
            18 => {
                let message = "no".to_owned();
                let offer = offered.offer;
                return self.say(Said::Declined { offer, message }, sight);
            }
            _ => return self.offered(&offered, sight),
        };
        let Some(agent) = &mut self.agent else { return };
        agent.lying = Some(Lying {
            lie,
            offered,
            last: sight.now,
            end: sight.now + LONGEST.mul_f64(sight.random.random()),
            sent: 0,
        });
        let after = Duration::from_secs(sight.random.random_range(0..1000));
        let after = match lie {
            Lie::Claim(_) => after,
            Lie::Drip { .. } | Lie::RepeatProgress => Duration::from_secs(1),
        };
        sight.later(after, HostEvent::Lie);
    }

    /// Goes on with what it is at, as long as it is connected.
    pub(super) fn lies_on(&mut self, sight: &mut Sight<'_>) {
        let Some(agent) = &mut self.agent else { return };
        let link = agent.link;
        let Some(mut lying) = agent.lying.take_if(|it| Some(it.offered.link) == link) else {
            return;
        };
        let phases = [
            Phase::Idle,
            Phase::Fetching,
            Phase::Staged,
            Phase::Swapping,
            Phase::Proving,
        ];
        let phase = match lying.lie {
            Lie::Claim(claim) => {
                // What it said before, now and then once more.
                let old = self.lies.said.values().next();
                if let Some(old) = old.filter(|_| sight.chance(0.2)) {
                    return self.say(Said::Receipt(Box::new(old.clone())), sight);
                }
                self.claim(claim, &lying.offered.manifest, sight);
                // It contradicts itself, or says the same again.
                if sight.chance(0.4) {
                    let claims = [Claim::Refused, Claim::Live, Claim::HostFault];
                    lying.lie = Lie::Claim(claims[sight.random.random_range(0..claims.len())]);
                    self.goes_on(lying);
                    let after = Duration::from_secs(sight.random.random_range(1..1000));
                    sight.later(after, HostEvent::Lie);
                }
                return;
            }
            Lie::Drip { bytes_per_sec } => {
                lying.sent += bytes_per_sec * (sight.now - lying.last).as_secs();
                Phase::Fetching
            }
            Lie::RepeatProgress => phases[sight.random.random_range(0..phases.len())],
        };
        let until = sight.chance(0.5).then_some(Timestamp::MAX);
        let said = Said::Progress {
            offer: lying.offered.offer,
            phase,
            until,
            sent: lying.sent,
        };
        self.say(said, sight);
        lying.last = sight.now;
        if sight.now < lying.end {
            let after = Duration::from_secs(sight.random.random_range(10..120));
            sight.later(after, HostEvent::Lie);
            self.goes_on(lying);
        }
    }

    /// On a new connection the master hears everything that it has not acknowledged.
    pub(super) fn repeat_lies(&self, sight: &mut Sight<'_>) {
        for lie in self.lies.said.values() {
            self.say(Said::Receipt(Box::new(lie.clone())), sight);
        }
    }

    fn goes_on(&mut self, lying: Lying) {
        if let Some(agent) = &mut self.agent {
            agent.lying = Some(lying);
        }
    }

    /// Signs and says what is not so.
    fn claim(&mut self, claim: Claim, manifest: &Verified<Manifest>, sight: &mut Sight<'_>) {
        let seq = FIRST + self.lies.made;
        self.lies.made += 1;
        let receipt = self.claims(claim, manifest, sight);
        let receipt = sign(Receipt { seq, ..receipt }, &self.key)
            .envelope()
            .clone();
        self.lies.said.insert(seq, receipt.clone());
        self.say(Said::Receipt(Box::new(receipt)), sight);
    }

    /// A version of ClamAV: that of some host, or one of its own.
    pub(super) fn claimed_version(&self, sight: &mut Sight<'_>) -> String {
        match sight.random.random_range(0..6) {
            0 => format!("ClamAV 9.{}", sight.random.random_range(0..1000)),
            1 | 2 => format!("ClamAV 1.{}", sight.random.random_range(0..CLAMD_VERSIONS)),
            _ => format!("ClamAV 1.{}", self.body().clamd.version),
        }
    }

    fn claims(
        &self,
        claim: Claim,
        manifest: &Verified<Manifest>,
        sight: &mut Sight<'_>,
    ) -> Receipt {
        let files = manifest.files.iter().map(|file| {
            let state = FileState {
                name: file.name.clone(),
                size: file.size,
                sha256: file.sha256,
            };
            ReceiptFile::new(state, manifest)
        });
        let position = manifest.position();
        let sha256 = manifest.payload_sha256();
        let (position, manifest_sha256, outcome) = match claim {
            Claim::Refused => (position, sha256, Outcome::Refused),
            Claim::Live => (position, sha256, Outcome::Live),
            Claim::HostFault => (position, sha256, Outcome::HostFault),
            Claim::Above(by, outcome) => {
                let number = position.generation.number() + by;
                let generation = clamcast_proto::Generation::new(number).expect("not zero");
                let above = Position {
                    generation,
                    ..position
                };
                (above, Digest::of(&number.to_be_bytes()), outcome)
            }
            Claim::Other => (position, Digest::of(b"another"), Outcome::Live),
        };
        let mut clamd = self.body().clamd.report(ClamdState::Up, Proof::Canary);
        clamd.version = Some(self.claimed_version(sight));
        Receipt {
            fleet: FleetName::clone(&manifest.fleet),
            agent: self.name.clone(),
            seq: 0,
            epoch: position.epoch,
            generation: position.generation,
            manifest_sha256,
            install: InstallNumber(sight.random.random_range(0..5)),
            outcome,
            content: None,
            files: files.collect(),
            missing: Vec::new(),
            unlisted: 0,
            foreign: Vec::new(),
            adopted: Vec::new(),
            drift: Vec::new(),
            clamd,
            error: Some("so it says".to_owned()),
            blamed: None,
            took: 0.0,
            time: sight.clock,
        }
    }
}
