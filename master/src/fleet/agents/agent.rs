//! What is known of one agent: what it says by its receipts, and how far it is with its offer.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use clamcast_proto::dsse::Verified;
use clamcast_proto::identity::Serial;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::names::DATABASE_NAME_BYTES_MAX;
use clamcast_proto::receipt::{
    ADOPTED_MAX, ClamdReport, ClamdState, DRIFT_MAX, Drift, ERROR_BYTES_MAX, FOREIGN_MAX, Outcome,
    Proof, Receipt,
};
use clamcast_proto::wire::{self, Feature, Features, OfferId, OtherMaster, Phase};
use clamcast_proto::{AgentName, DatabaseName, Digest, GroupName, Position};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::fleet::rollout::{Answer, Member, Offering, Rollout, Target, UNKNOWN_VERSION, Wanted};
use crate::fleet::twins::Arrivals;

/// Receipts remembered by digest, so that one that is sent again is not taken for a new one.
const RECEIPTS_REMEMBERED: usize = wire::RECEIPTS_PENDING_MAX;

/// Bytes a second that a transfer must average to count as progress. Slower ones go on, and nobody
/// waits for them.
const PROGRESS_BYTES_PER_SEC_MIN: u64 = 16 << 10;

/// Longest version of ClamAV that is kept, in bytes. clamd says `ClamAV 1.4.3`.
const VERSION_BYTES_MAX: usize = 64;

/// Names one connection for as long as the daemon runs.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LinkId(pub u64);

/// One agent.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub(super) record: Record,
    pub(super) link: Option<Link>,
    /// The last offer that was answered on a connection which has ended.
    pub(super) answered: Option<Answered>,
    /// Whether it was connected when the master was started.
    pub(super) was_connected: bool,
    /// Whether it was, and has not connected since.
    pub(super) returning: bool,
    /// Its connections, of which two hosts may have made some.
    pub(super) arrivals: Arrivals,
}

/// The generation that an agent was offered last.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Taken {
    /// Which one.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// The ClamAV version that was known then: the agent's answer counts for that one, whatever it
    /// reports later.
    pub version: Option<String>,
    /// When it was first offered.
    pub since: Timestamp,
    /// When the agent last made real progress with it, on any connection: it came to a phase for the
    /// first time, or took bytes at a minimum rate. Repeated messages are no progress.
    pub renewed: Timestamp,
    /// The furthest phase.
    phase: Phase,
    /// Bytes that the connection had carried when it was renewed.
    sent: u64,
}

impl Taken {
    pub(super) fn new(
        position: Position,
        manifest_sha256: Digest,
        version: Option<String>,
        now: Timestamp,
    ) -> Self {
        Self {
            position,
            manifest_sha256,
            version,
            since: now,
            renewed: now,
            phase: Phase::Idle,
            sent: 0,
        }
    }

    /// Takes a sign of progress. `sent`: bytes of files that the connection has carried so far.
    /// `until`: when the agent, which is in that phase for the first time, means to be done with it.
    pub(super) fn progress(&mut self, phase: Phase, until: Timestamp, sent: u64, now: Timestamp) {
        if phase > self.phase {
            self.phase = phase;
            self.renewed = self.renewed.max(until);
        }
        if sent < self.sent {
            self.sent = 0; // a new connection
        }
        let elapsed = now.duration_since(self.renewed).as_secs();
        let elapsed = u64::try_from(elapsed).unwrap_or(0).max(1);
        if sent - self.sent >= PROGRESS_BYTES_PER_SEC_MIN.saturating_mul(elapsed) {
            self.sent = sent;
            self.renewed = self.renewed.max(now);
        }
    }
}

/// What is kept of an agent across restarts of the master.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Record {
    /// Its name.
    pub name: AgentName,
    /// The groups of its last certificate and of the configuration.
    pub groups: Vec<GroupName>,
    /// When it first connected.
    pub enrolled: Timestamp,
    /// When it last came or went.
    pub seen: Timestamp,
    /// Serial number of the certificate that it last came with.
    pub serial: Serial,
    /// When that certificate ends.
    pub certificate_ends: Timestamp,
    /// SHA-256 of its last certificates. Records of earlier versions have none.
    #[serde(default)]
    pub certificates: VecDeque<Digest>,
    /// Whether it was connected when this was kept.
    #[serde(default)]
    pub connected: bool,
    /// The generation that it was offered last.
    #[serde(default)]
    pub taken: Option<Taken>,
    /// The ClamAV version that its clamd reported last.
    #[serde(default)]
    pub version: Option<String>,
    /// What its program accepts, by its last Hello; `None` before the first Hello. A record of an
    /// earlier version of the master says nothing: such an agent accepts nothing new.
    #[serde(default = "nothing_new")]
    pub accepts: Option<Features>,
    /// What it last said is in its database directory.
    pub installed: Option<Installed>,
    /// The last generation that it could not take.
    pub failed: Option<Failed>,
    /// The clamd it last reported.
    pub clamd: ClamdReport,
    /// Databases of others beside ours.
    #[serde(default)]
    pub foreign: Vec<String>,
    /// The host's own files under names of the fleet.
    #[serde(default)]
    pub adopted: Vec<DatabaseName>,
    /// Files that its last receipt says were found changed, and whether they are mended.
    #[serde(default)]
    pub drift: Vec<Drift>,
    /// Why they are not mended, in the agent's words.
    #[serde(default)]
    pub drift_error: Option<String>,
    /// Digests of its last receipts.
    #[serde(default)]
    pub(super) receipts: VecDeque<Digest>,
}

fn nothing_new() -> Option<Features> {
    Some(Features::default())
}

/// A generation on an agent's disk.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Installed {
    /// Which one.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// Whether clamd was seen scanning with it.
    pub live: bool,
    /// Whether that was a real clamd, which found the canary of the install.
    #[serde(default)]
    pub proven: bool,
    /// Whether every file has its hash.
    pub intact: bool,
    /// When the receipt says so.
    pub time: Timestamp,
}

/// A generation that came to nothing on an agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failed {
    /// Which one.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// Refused, or a fault of the host.
    pub outcome: Outcome,
    /// Why, in the agent's words.
    pub error: String,
    /// The file that it names as the cause of a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blamed: Option<DatabaseName>,
    /// When the receipt says so.
    pub time: Timestamp,
}

/// An open connection.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its name here.
    pub id: LinkId,
    /// Since when.
    pub since: Timestamp,
    /// The other end.
    pub address: SocketAddr,
    /// Serial number of its certificate.
    pub serial: Serial,
    /// When its certificate ends.
    pub certificate_ends: Timestamp,
    /// What it was offered and how far it is.
    pub offer: Option<Offered>,
    /// The last offer that was answered.
    pub answered: Option<Answered>,
    /// The last offer, if it was declined.
    pub declined: Option<Declined>,
    /// Why the master could not send a file of the last offer.
    pub unsent: Option<String>,
    /// Whether it has said Hello: before that it is offered nothing.
    pub greeted: bool,
    /// The manifest that it has or was offered last on this connection.
    pub told: Option<Digest>,
    /// It was offered nothing, because its Hello and its last receipt said that it is live with that.
    pub says_live: bool,
}

/// Certificates of one name that are remembered.
const CERTIFICATES_MAX: usize = 16;

impl Record {
    /// Takes note of the certificate that the agent came with. Returns whether a known agent has not come
    /// with it before.
    pub(super) fn learn_certificate(&mut self, fingerprint: Digest) -> bool {
        if self.certificates.contains(&fingerprint) {
            return false;
        }
        let is_new = !self.certificates.is_empty();
        self.certificates.push_back(fingerprint);
        if self.certificates.len() > CERTIFICATES_MAX {
            self.certificates.pop_front();
        }
        is_new
    }

    /// Whether its program is known not to accept a feature.
    pub(super) fn lacks(&self, feature: Feature) -> bool {
        let accepts = self.accepts.as_ref();
        accepts.is_some_and(|accepts| !accepts.has(feature))
    }

    /// Keeps the version of ClamAV that clamd reports. A clamd that is down has none to report.
    pub(super) fn learn_version(&mut self) {
        let said = self.clamd.version.as_deref();
        let program = said.and_then(|said| said.split('/').next());
        if let Some(program) = program.filter(|program| program.len() <= VERSION_BYTES_MAX) {
            self.version = Some(program.to_owned());
        }
    }
}

impl Link {
    /// A connection on which nothing was said yet.
    pub fn new(
        id: LinkId,
        since: Timestamp,
        address: SocketAddr,
        serial: Serial,
        certificate_ends: Timestamp,
    ) -> Self {
        Self {
            id,
            since,
            address,
            serial,
            certificate_ends,
            offer: None,
            answered: None,
            declined: None,
            unsent: None,
            greeted: false,
            told: None,
            says_live: false,
        }
    }
}

/// An offer that is over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answered {
    /// Its name.
    pub offer: OfferId,
    /// What the receipt says that answers it; `None`: it was declined.
    pub outcome: Option<Outcome>,
}

/// An offer that was declined.
#[derive(Clone, Debug)]
pub struct Declined {
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// Why, in the agent's words.
    pub message: String,
    /// The master that the agent follows, if the reason is that there are two.
    pub other_master: Option<Box<OtherMaster>>,
    /// When.
    pub since: Timestamp,
}

/// An offer under way.
#[derive(Clone, Debug)]
pub struct Offered {
    /// Its name.
    pub id: OfferId,
    /// The generation.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// What the agent last said that it is doing.
    pub phase: Phase,
    /// When it last gave a sign of progress.
    pub progress: Timestamp,
    /// An operator forced it, and the agent has not begun with it: a receipt that comes before it has
    /// answers an earlier offer of the same generation.
    pub unbegun: bool,
}

/// Where an agent stands against what is wanted of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// Live at the wanted generation, every file with its hash.
    Conformant,
    /// Not there, and nothing says that it will not come.
    Behind,
    /// It said that it cannot, or gave no sign of progress for the deadline.
    Failed,
}

impl Agent {
    /// What it says of `target`, by its receipts.
    pub(super) fn member(&self, target: Option<&Target>) -> Member<'_> {
        let record = &self.record;
        let digest = target.map(|target| target.manifest_sha256);
        let taken = record.taken.as_ref();
        let taken = taken.filter(|taken| Some(taken.manifest_sha256) == digest);
        let version = taken
            .map_or(&record.version, |taken| &taken.version)
            .as_ref();
        Member {
            name: &record.name,
            groups: &record.groups,
            version: version.map_or(UNKNOWN_VERSION, String::as_str),
            connected: self.link.is_some(),
            was_connected: self.was_connected,
            returning: self.returning,
            seen: record.seen,
            at: self.at(),
            answer: digest.and_then(|digest| self.answer(&digest)),
            blamed: digest.and_then(|digest| self.blamed(&digest)),
            offered: taken.map(|taken| Offering {
                since: taken.since,
                renewed: taken.renewed,
            }),
        }
    }

    /// The highest generation that it took, whether it came to have that generation or not: it
    /// declines what is below, but for what it has.
    pub(super) fn at(&self) -> Option<Position> {
        let record = &self.record;
        let installed = record.installed.as_ref().map(|it| it.position);
        let failed = record.failed.as_ref().map(|it| it.position);
        let taken = record.taken.as_ref().map(|taken| taken.position);
        installed.max(failed).max(taken)
    }

    /// Whether its last receipts say that it has this manifest.
    pub(super) fn has(&self, manifest_sha256: &Digest) -> bool {
        let installed = self.record.installed.as_ref();
        installed.is_some_and(|installed| installed.manifest_sha256 == *manifest_sha256)
    }

    /// Whether it has an offer of what it has.
    pub(super) fn is_mending(&self) -> bool {
        let offer = self.link.as_ref().and_then(|link| link.offer.as_ref());
        offer.is_some_and(|offer| self.has(&offer.manifest_sha256))
    }

    /// Whether it has what was taken back.
    pub(super) fn has_taken_back(&self, rollout: &Rollout) -> bool {
        let installed = self.record.installed.as_ref();
        installed.is_some_and(|installed| rollout.is_taken_back(installed.position))
    }

    /// Whether it could not take a generation, or its clamd could not use it.
    pub(super) fn failed_with(&self, target: &Target) -> bool {
        let failed = self.record.failed.as_ref();
        failed.is_some_and(|failed| failed.manifest_sha256 == target.manifest_sha256)
    }

    /// What its last receipts, or its words on this connection, say of a generation.
    fn answer(&self, target: &Digest) -> Option<Answer> {
        let failed = self.record.failed.as_ref();
        if let Some(failed) = failed.filter(|failed| failed.manifest_sha256 == *target) {
            return Some(match failed.outcome {
                Outcome::Refused => Answer::Refused,
                Outcome::HostFault | Outcome::Live | Outcome::Installed => Answer::Unwell,
            });
        }
        let declined = self.link.as_ref().and_then(|link| link.declined.as_ref());
        if declined.is_some_and(|declined| declined.manifest_sha256 == *target) {
            return Some(Answer::Unwell);
        }
        let installed = self.record.installed.as_ref();
        let installed = installed.filter(|installed| installed.manifest_sha256 == *target)?;
        Some(match (installed.live, installed.intact) {
            (true, true) => Answer::Live {
                proven: installed.proven,
            },
            (true, false) => Answer::Unwell,
            (false, _) => Answer::Installed,
        })
    }

    /// The file of a generation that it named when it refused that generation.
    fn blamed(&self, target: &Digest) -> Option<&DatabaseName> {
        let failed = self.record.failed.as_ref();
        let refused = failed.filter(|failed| {
            failed.manifest_sha256 == *target && failed.outcome == Outcome::Refused
        });
        refused?.blamed.as_ref()
    }

    pub(super) fn standing(&self, wanted: Wanted, now: Timestamp, deadline: Duration) -> Standing {
        let installed = self.record.installed.as_ref();
        let wanted = match wanted {
            // Of what is published next, or of what is for it when its window opens.
            Wanted::Nothing | Wanted::Later(_) => return Standing::Behind,
            Wanted::Stay => installed.map(|installed| installed.manifest_sha256),
            Wanted::At(target) => Some(target.manifest_sha256),
        };
        let offer = self.link.as_ref().and_then(|link| link.offer.as_ref());
        let failed = self.record.failed.as_ref().map(|it| it.manifest_sha256);
        let failed = failed.is_some() && failed == wanted;
        let declined = self.link.as_ref().and_then(|link| link.declined.as_ref());
        let declined = declined.is_some_and(|it| Some(it.manifest_sha256) == wanted);
        // A success clears the failure before it, so one of the same that is there is the newer receipt.
        if !failed
            && !declined
            && let Some(installed) = installed
            && Some(installed.manifest_sha256) == wanted
            && installed.live
            && installed.intact
        {
            return Standing::Conformant;
        }
        if failed && offer.is_none() {
            return Standing::Failed;
        }
        match offer {
            Some(offer) if is_silent(offer, now, deadline) => Standing::Failed,
            None if declined => Standing::Failed,
            Some(_) | None => Standing::Behind,
        }
    }

    /// Whether it sent this receipt before.
    pub(super) fn knows(&self, receipt: &Verified<Receipt>) -> bool {
        self.record.receipts.contains(&receipt.payload_sha256())
    }

    /// Takes a receipt whose signature was checked; `manifest` is what it is about, where that is
    /// known. `false`: the receipt is known already.
    pub(super) fn receipt(
        &mut self,
        receipt: &Verified<Receipt>,
        manifest: Option<&Manifest>,
        now: Timestamp,
    ) -> bool {
        let digest = receipt.payload_sha256();
        let record = &mut self.record;
        if record.receipts.contains(&digest) {
            return false;
        }
        if self.link.is_some() {
            record.seen = now; // kept with the receipt: a start finds who was there
        }
        record.receipts.push_back(digest);
        if record.receipts.len() > RECEIPTS_REMEMBERED {
            record.receipts.pop_front();
        }
        record.clamd = bounded(receipt.clamd.clone());
        record.learn_version();
        record.foreign = bounded_list(receipt.foreign.clone());
        let adopted = receipt.adopted.iter().take(ADOPTED_MAX);
        record.adopted = adopted.cloned().collect();
        record.drift = receipt.drift.iter().take(DRIFT_MAX).cloned().collect();
        let drifted = record.drift.iter().any(|file| !file.mended);
        let error = receipt.error.clone().filter(|_| drifted);
        record.drift_error = error.map(clipped);
        let (position, manifest_sha256) = (receipt.position(), receipt.manifest_sha256);
        match receipt.outcome {
            Outcome::Live | Outcome::Installed => {
                record.installed = Some(Installed {
                    position,
                    manifest_sha256,
                    live: receipt.outcome == Outcome::Live,
                    proven: receipt.outcome == Outcome::Live
                        && receipt.clamd.proof == Proof::Canary,
                    intact: !drifted && manifest.is_none_or(|manifest| receipt.is_intact(manifest)),
                    time: receipt.time,
                });
                // What it went back to and says it has says nothing for what it refused.
                record.failed.take_if(|failed| failed.position <= position);
            }
            Outcome::Refused | Outcome::HostFault => {
                if let Some(installed) = &mut record.installed
                    && installed.manifest_sha256 == manifest_sha256
                    && let Some(manifest) = manifest
                {
                    // It is about the generation that was there: what it found counts.
                    installed.intact = receipt.is_intact(manifest);
                    installed.live &= installed.intact;
                } else if let Some(installed) = &mut record.installed
                    && receipt.outcome == Outcome::Refused
                {
                    installed.live = receipt.clamd.proof != Proof::None
                        || receipt.clamd.state == ClamdState::None;
                }
                // Nor does trouble with what it went back to.
                let newer = record.failed.as_ref().map(|failed| failed.position);
                if newer <= Some(position) {
                    record.failed = Some(Failed {
                        position,
                        manifest_sha256,
                        outcome: receipt.outcome,
                        error: clipped(receipt.error.clone().unwrap_or_default()),
                        blamed: receipt.blamed.clone(),
                        time: receipt.time,
                    });
                }
            }
        }
        // News of drift says nothing about the offer that may be under way to mend it, a fault does.
        let is_answer = !drifted || !matches!(receipt.outcome, Outcome::Live | Outcome::Installed);
        if is_answer
            && let Some(link) = &mut self.link
            && let Some(offer) = link
                .offer
                .take_if(|offer| offer.manifest_sha256 == manifest_sha256 && !offer.unbegun)
        {
            link.answered = Some(Answered {
                offer: offer.id,
                outcome: Some(receipt.outcome),
            });
        }
        true
    }
}

pub(super) fn is_silent(offer: &Offered, now: Timestamp, deadline: Duration) -> bool {
    now.duration_since(offer.progress).unsigned_abs() > deadline && now > offer.progress
}

/// A text of an agent, cut to what a table or a log has use for.
fn clipped(text: String) -> String {
    if text.len() <= ERROR_BYTES_MAX {
        return text;
    }
    let end = text.floor_char_boundary(ERROR_BYTES_MAX);
    text[..end].to_owned()
}

pub(super) fn bounded(clamd: ClamdReport) -> ClamdReport {
    ClamdReport {
        version: clamd.version.map(clipped),
        note: clamd.note.map(clipped),
        ..clamd
    }
}

pub(super) fn bounded_list(names: Vec<String>) -> Vec<String> {
    let first = names.into_iter().take(FOREIGN_MAX);
    first
        .filter(|name| name.len() <= DATABASE_NAME_BYTES_MAX)
        .collect()
}
