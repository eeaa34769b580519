//! What the master says, and what this host believes of it.

use std::time::Duration;

use clamcast_proto::audit::Checkpoint;
use clamcast_proto::dsse::Verified;
use clamcast_proto::fresh::Freshness;
use clamcast_proto::keys::{KeySet, KeySetError};
use clamcast_proto::receipt::Contents;
use clamcast_proto::trust::TrustError;
use clamcast_proto::wire::{Feature, Hello, OtherMaster};

use super::status::MasterStatus;
use super::*;

/// What this agent accepts beyond version 0.1.0.
const ACCEPTED: [Feature; 2] = [Feature::WideNames, Feature::LargeManifests];

/// So far this host's clock and the master's may differ, in seconds, before somebody should look:
/// more than a message travels, less than what certificates and logs suffer from.
pub const CLOCK_SKEW_SECS_MAX: i64 = 300;

/// So long a host that never received a freshness statement is not stale: what a master's `[signing]
/// fresh` is unless told otherwise, which the host learns only with the first statement.
pub const FRESH_UNHEARD: Duration = Duration::from_secs(48 * 3600);

/// The first words on a new connection.
#[derive(Debug)]
pub struct Greeting {
    /// The connection.
    pub connection: ConnectionId,
    /// Where the master is.
    pub address: String,
    /// Its words.
    pub welcome: Welcome,
    /// What is known of clamd.
    pub clamd: ClamdReport,
    /// What this host calls itself.
    pub hostname: Option<String>,
}

/// A freshness statement, with its end by this host's clock.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct KeptFresh {
    /// The statement.
    #[serde(flatten)]
    pub fresh: Freshness,
    /// Until when it holds by this host's clock, which may have been wrong then and be set since.
    pub until: Timestamp,
}

#[derive(Debug)]
pub(super) enum Master {
    Connected {
        connection: ConnectionId,
        address: String,
        version: String,
        since: Timestamp,
        clock_ahead_secs: i64,
    },
    Away {
        since: Timestamp,
        error: Option<String>,
    },
}

/// What this host believes. A key set counts once it is on disk.
pub(super) struct Trusted {
    /// The key set and the mark.
    pub(super) trust: Trust,
    /// When the marked generation was offered first.
    pub(super) accepted: Option<Timestamp>,
    /// A mark that may not be on disk yet. It counts all the same: a write that fails may have had its
    /// effect, and the mark on disk must not go down.
    pub(super) mark: Option<KeptMark>,
    /// Whether it is being saved.
    pub(super) is_saving: bool,
    /// A key set that is being saved, and what waits for it.
    pub(super) keys: Option<(Box<Verified<KeySet>>, Waiting)>,
}

/// What waits until a key set is on disk.
#[derive(Debug)]
pub(super) enum Waiting {
    Welcome(Box<Greeting>),
    Offer(Box<Offer>),
}

/// What the master has said besides offers, and what was made known of it.
pub(super) struct Heard {
    /// A connection that was made before the first look ended.
    pub(super) early: Option<Box<Greeting>>,
    /// What the master accepts.
    pub(super) accepts: Features,
    pub(super) fresh: Option<KeptFresh>,
    /// When the agent started first.
    pub(super) first_start: Timestamp,
    /// Whether the log says that this host is stale.
    pub(super) stale_said: bool,
    /// Whether the log says that the clocks differ.
    pub(super) clock_said: bool,
    /// The last refusal, which is noted once while it repeats itself.
    pub(super) refusal: Option<String>,
}

/// Why an offer is not taken.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("{0}")]
    Keys(String),
    #[error(
        "the freshness statement for {position} expired at {expires}, and `stale = \"refuse\"`"
    )]
    Stale {
        position: Position,
        expires: Timestamp,
    },
}

/// The judgement on an offered key set.
enum Offered {
    /// This host goes on with the one that it has.
    Known,
    Newer(Box<Verified<KeySet>>),
    Refused(String),
}

impl Master {
    pub(super) fn status(&self) -> MasterStatus {
        match self {
            Self::Connected {
                address,
                version,
                since,
                clock_ahead_secs,
                ..
            } => MasterStatus {
                connected: true,
                address: Some(address.clone()),
                version: Some(version.clone()),
                since: *since,
                error: None,
                clock_ahead_secs: Some(*clock_ahead_secs),
            },
            Self::Away { since, error } => MasterStatus {
                connected: false,
                address: None,
                version: None,
                since: *since,
                error: error.clone(),
                clock_ahead_secs: None,
            },
        }
    }
}

impl Core {
    pub(super) fn welcomed(&mut self, greeting: Box<Greeting>) {
        if self.is_opening {
            self.heard.early = Some(greeting);
            return; // nothing is said before the first look at the files
        }
        let ahead = self.ahead_secs(greeting.welcome.time);
        let differ = ahead.abs() > CLOCK_SKEW_SECS_MAX;
        if differ && !self.heard.clock_said {
            tracing::warn!(
                ahead_secs = ahead,
                "this host's clock and the master's differ; which one is wrong?"
            );
        }
        self.heard.clock_said = differ;
        let Some(keys) = &greeting.welcome.keys else {
            return self.connected(*greeting);
        };
        match self.judge_keys(keys) {
            Offered::Known => self.connected(*greeting),
            Offered::Newer(keys) => self.save_keys(keys, Waiting::Welcome(greeting)),
            Offered::Refused(error) => self.disbelieved(&error),
        }
    }

    fn disbelieved(&mut self, error: &str) {
        let answer = format!("has keys that are not believed: {error}");
        self.actions.push(Action::Answer(Err(answer)));
    }

    /// Judges a key set. An older one is no reason to quarrel: this host goes on with its own, as a
    /// master that was restored from a backup must.
    fn judge_keys(&mut self, keys: &Envelope) -> Offered {
        match self.trusted.trust.judge_keys(keys) {
            Ok(None) => Offered::Known,
            Ok(Some(newer)) => Offered::Newer(Box::new(newer)),
            Err(TrustError::Keys(old @ KeySetError::Old { .. })) => {
                tracing::warn!(error = chain(&old), "the master has another key set");
                Offered::Known
            }
            Err(error) => Offered::Refused(self.refused_keys(chain(&error))),
        }
    }

    fn refused_keys(&mut self, error: String) -> String {
        tracing::error!(error, "the master's key set is refused");
        self.refused("keys", &error);
        error
    }

    /// A newer key set counts once it is on disk.
    fn save_keys(&mut self, keys: Box<Verified<KeySet>>, waiting: Waiting) {
        self.save(Record::Keys(keys.envelope().clone()));
        self.trusted.keys = Some((keys, waiting));
    }

    pub(super) fn saved(&mut self, saved: Saved, result: Result<(), StateError>) {
        match saved {
            Saved::Keys => self.saved_keys(result),
            Saved::Mark => self.saved_mark(result),
            Saved::ReceiptDone(seq) => match result {
                Ok(()) => self.receipts.forget(seq),
                Err(error) => {
                    tracing::error!(seq, error = chain(&error), "an acknowledged receipt stays");
                }
            },
        }
    }

    fn saved_keys(&mut self, result: Result<(), StateError>) {
        let Some((keys, waiting)) = self.trusted.keys.take() else {
            return;
        };
        let refused = match result {
            Ok(()) => {
                let (version, epoch) = (keys.version, keys.epoch);
                tracing::info!(version, %epoch, "newer key set");
                let detail = json!({ "version": version, "epoch": epoch });
                self.note(AuditEvent::Keys, None, None, detail);
                self.trusted.trust.adopt_keys(*keys);
                None
            }
            Err(error) => Some(self.refused_keys(chain(&error))),
        };
        match (waiting, refused) {
            (Waiting::Welcome(greeting), None) => self.connected(*greeting),
            (Waiting::Welcome(_), Some(error)) => self.disbelieved(&error),
            (Waiting::Offer(offer), None) => self.offered(&offer),
            (Waiting::Offer(offer), Some(error)) => self.decline(&offer, &Refusal::Keys(error)),
        }
    }

    fn connected(&mut self, greeting: Greeting) {
        let Greeting {
            connection,
            address,
            welcome,
            clamd,
            hostname,
        } = greeting;
        self.clamd = clamd;
        self.learn_accepted(welcome.accepts);
        let hello = Box::new(self.hello(&welcome.known, hostname));
        let waiting: Vec<_> = self.receipts.pending().cloned().collect();
        tracing::debug!(address, receipts = waiting.len(), "hello");
        self.say_on(connection, ToMaster::Hello(hello));
        for receipt in waiting {
            self.say_on(connection, ToMaster::Receipt { receipt });
        }
        self.master = Master::Connected {
            connection,
            address,
            version: welcome.master_version,
            since: self.now.clock,
            clock_ahead_secs: self.ahead_secs(welcome.time),
        };
        // The link goes on after this, so that nothing is said before Hello.
        self.actions.push(Action::Answer(Ok(())));
        self.guard_event(GuardEvent::Connected);
    }

    /// Keeps what the master accepts: a receipt that is made while the agent is not connected has the
    /// form that this master takes.
    fn learn_accepted(&mut self, accepts: Features) {
        if self.heard.accepts != accepts {
            self.save(Record::Accepts(accepts.clone()));
            self.heard.accepts = accepts;
        }
    }

    /// What is installed, and what the last receipt said, as far as the disk bears it out. A set
    /// with files that only the master has is not presented as installed, so that it is offered
    /// again. Of a manifest that the master has (`known`) the digest is enough.
    fn hello(&self, known: &[Digest], hostname: Option<String>) -> Hello {
        let is_lacking = self.is_lacking();
        let installed = self.standing.installed.as_ref().filter(|_| !is_lacking);
        let last = self.receipts.last();
        // A crash may have cost it the receipt of the record on disk.
        let is_live = installed.is_some_and(|installed| {
            installed.outcome == Outcome::Live
                && last.is_some_and(|last| last.manifest_sha256 == installed.set.sha256())
        });
        let outcome = match is_live {
            true => Some(Outcome::Live),
            false => last.map(|last| last.outcome),
        };
        let contents = installed.map(|installed| {
            let found = self.found(&installed.set);
            Contents::of(&installed.set.manifest, &found)
        });
        let installed_sha256 = installed.map(|installed| installed.set.sha256());
        let installed_sha256 = installed_sha256.filter(|digest| known.contains(digest));
        Hello {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            accepts: ACCEPTED.into_iter().collect(),
            clamd: self.clamd.clone(),
            outcome: outcome.filter(|_| !is_lacking),
            content: contents.as_ref().map(|it| it.content),
            files: contents
                .as_ref()
                .map_or_else(Vec::new, |it| it.files.clone()),
            missing: contents.map_or_else(Vec::new, |it| it.missing),
            foreign: last.map_or_else(Vec::new, |last| last.foreign.clone()),
            installed_sha256,
            installed: installed
                .filter(|_| installed_sha256.is_none())
                .map(|installed| installed.set.clone().into()),
            labels: hostname
                .map(|name| ("hostname".to_owned(), name))
                .into_iter()
                .collect(),
        }
    }

    pub(super) fn message(&mut self, message: ToAgent) {
        match message {
            ToAgent::Offer(offer) => self.offer(offer),
            ToAgent::Fresh { fresh } => self.renewed(&fresh),
            ToAgent::ReceiptAck { seq } => {
                if let Some(done) = self.receipts.acknowledge(seq) {
                    self.save(done);
                }
            }
            ToAgent::Checkpoint { checkpoint } => {
                let keys = &self.trusted.trust.keys().audit;
                // Of any key in the set: the master's may have changed. They are this fleet's alone.
                match Checkpoint::verify(&checkpoint, keys, None) {
                    Ok(_) => self.save(Record::Checkpoint(checkpoint)),
                    Err(error) => {
                        tracing::warn!(error = chain(&error), "the checkpoint is not believed");
                    }
                }
            }
            // Not as `message`: that would be printed as it is, line breaks and all.
            ToAgent::Error { message } => tracing::warn!(said = message, "the master objects"),
            ToAgent::Welcome(_) => tracing::warn!("the master says welcome twice"),
        }
    }

    /// A statement that what this host has is current for longer.
    fn renewed(&mut self, fresh: &Envelope) {
        if self.trusted.trust.mark().is_none() {
            return; // nothing was accepted here that it could be about
        }
        match self
            .trusted
            .trust
            .judge_renewal(fresh, self.standing.settled)
        {
            Ok(fresh) => self.keep_fresh(&fresh),
            Err(error) => {
                let message = chain(&error);
                tracing::warn!(error = message, "the freshness statement is not taken");
                self.say(ToMaster::Error {
                    offer: None,
                    message,
                    other_master: None,
                });
            }
        }
    }

    fn offer(&mut self, offer: Box<Offer>) {
        if !matches!(self.master, Master::Connected { .. }) {
            return;
        }
        match offer.keys.as_ref().map(|keys| self.judge_keys(keys)) {
            None | Some(Offered::Known) => self.offered(&offer),
            Some(Offered::Newer(keys)) => self.save_keys(keys, Waiting::Offer(offer)),
            Some(Offered::Refused(error)) => self.decline(&offer, &Refusal::Keys(error)),
        }
    }

    /// An offer whose key set, if it came with one, is in use.
    fn offered(&mut self, offer: &Offer) {
        let Master::Connected { connection, .. } = self.master else {
            return;
        };
        let (manifest, fresh) = match self.judge(offer) {
            Ok(accepted) => accepted,
            Err(refusal) => return self.decline(offer, &refusal),
        };
        self.heard.refusal = None;
        self.keep_fresh(&fresh);
        let (position, digest) = (manifest.position(), manifest.payload_sha256());
        let known = self.trusted.trust.mark().map(|mark| mark.manifest_sha256);
        if known != Some(digest) || offer.rehash {
            tracing::info!(%position, forced = offer.rehash, "offer accepted");
            let detail = json!({ "manifest_sha256": digest, "forced": offer.rehash });
            self.note(AuditEvent::Accepted, Some(position), None, detail);
        }
        if self.standing.has(&digest)
            && !offer.rehash
            && let Some(message) = self.stands_back()
        {
            return self.say(ToMaster::Error {
                offer: Some(offer.offer),
                message,
                other_master: None,
            });
        }
        let mends = self.trusted.trust.is_below(&manifest);
        self.accept(&manifest);
        let job = Job {
            offer: offer.offer,
            manifest,
            forced: offer.rehash,
            full: offer.full,
            mends,
            since: self.now.at,
            connection,
        };
        if job.forced {
            // An operator waits: receipts that the master gets before this answer an earlier offer.
            self.say_progress(&job, Phase::Fetching, None);
        }
        self.slot_event(SlotEvent::Offered(Arc::new(job)));
    }

    fn judge(&self, offer: &Offer) -> Result<(Verified<Manifest>, Verified<Freshness>), Refusal> {
        let trust = &self.trusted.trust;
        let manifest = trust.judge_manifest(&offer.manifest, self.standing.settled)?;
        let fresh = trust.judge_fresh(&offer.fresh, manifest.payload_sha256())?;
        let (position, now) = (manifest.position(), self.now.clock);
        let expires = fresh.holds_until(now);
        if expires < now {
            if self.settings.stale == Stale::Refuse {
                return Err(Refusal::Stale { position, expires });
            }
            tracing::warn!(%position, %expires, "the freshness statement of an offer expired");
        }
        Ok((manifest, fresh))
    }

    fn decline(&mut self, offer: &Offer, refusal: &Refusal) {
        let message = chain(refusal);
        match refusal {
            // Somebody else signs with this fleet's keys: nothing is more urgent.
            Refusal::Trust(TrustError::TwoManifests { .. } | TrustError::TwoPublishers { .. }) => {
                tracing::error!(error = message, "ALARM: an offer is refused");
            }
            Refusal::Trust(_) | Refusal::Keys(_) | Refusal::Stale { .. } => {
                tracing::warn!(error = message, "an offer is refused");
            }
        }
        self.refused("offer", &message);
        let other_master = self.other_master(refusal).map(Box::new);
        self.say(ToMaster::Error {
            offer: Some(offer.offer),
            message,
            other_master,
        });
    }

    /// Notes a refusal, once while it repeats itself.
    fn refused(&mut self, what: &str, why: &str) {
        if self.heard.refusal.as_deref() == Some(why) {
            return;
        }
        self.heard.refusal = Some(why.to_owned());
        let detail = json!({ "what": what, "error": why });
        self.note(AuditEvent::Refused, None, None, detail);
    }

    /// What this host follows, if an offer is declined because of another master.
    fn other_master(&self, refusal: &Refusal) -> Option<OtherMaster> {
        let (
            Refusal::Trust(TrustError::TwoManifests { .. } | TrustError::TwoPublishers { .. }),
            Some(mark),
        ) = (refusal, self.trusted.trust.mark())
        else {
            return None;
        };
        Some(OtherMaster {
            publisher: mark.publisher.clone(),
            position: mark.position,
            manifest_sha256: mark.manifest_sha256,
        })
    }

    /// Remembers an accepted manifest before anything is done about it. If that fails, it is tried again
    /// before the plan.
    pub(super) fn accept(&mut self, manifest: &Verified<Manifest>) {
        if let Some(mark) = self.trusted.trust.raised(manifest) {
            let accepted = self.now.clock;
            self.trusted.trust.adopt_mark(mark.clone());
            self.trusted.accepted = Some(accepted);
            self.trusted.mark = Some(KeptMark { mark, accepted });
            self.save_mark();
        }
    }

    pub(super) fn save_mark(&mut self) {
        let mark = self.trusted.mark.clone();
        if let Some(mark) = mark.filter(|_| !self.trusted.is_saving) {
            self.trusted.is_saving = true;
            self.save(Record::Mark(mark));
        }
    }

    fn saved_mark(&mut self, result: Result<(), StateError>) {
        self.trusted.is_saving = false;
        match result {
            Ok(()) => {
                self.trusted.mark = None;
                self.begin_plan();
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "cannot remember an accepted offer");
                if self.plan.take().is_some() {
                    self.trouble = Some(unkept(error));
                    self.slot_event(SlotEvent::PlanFailed);
                }
            }
        }
    }

    /// Keeps the statement that a generation is current, unless a longer one for it is kept already.
    fn keep_fresh(&mut self, fresh: &Freshness) {
        let until = fresh.holds_until(self.now.clock);
        let is_longer = |kept: &KeptFresh| {
            kept.fresh.manifest_sha256 == fresh.manifest_sha256 && kept.until >= until
        };
        if self.heard.fresh.as_ref().is_some_and(is_longer) {
            return;
        }
        let fresh = fresh.clone();
        let kept = KeptFresh { fresh, until };
        self.save(Record::Fresh(kept.clone()));
        self.heard.fresh = Some(kept);
        self.heard.stale_said = false;
    }

    /// Until when the newest freshness statement holds; without any, until when this host is not
    /// stale.
    pub(super) fn fresh_until(&self) -> Timestamp {
        let unheard = || self.heard.first_start.checked_add(FRESH_UNHEARD);
        let heard = self.heard.fresh.as_ref().map(|fresh| fresh.until);
        heard.unwrap_or_else(|| unheard().unwrap_or(Timestamp::MAX))
    }

    /// When this host became stale, if it has.
    pub(super) fn stale_since(&self, now: Timestamp) -> Option<Timestamp> {
        let until = self.fresh_until();
        (until < now).then_some(until)
    }

    /// How far this host's clock is ahead of one that showed `time` just now.
    fn ahead_secs(&self, time: Timestamp) -> i64 {
        self.now.clock.duration_since(time).as_secs()
    }
}

/// The mark could not be kept, which is a fault of the host.
fn unkept(error: StateError) -> HostFault {
    if let StateError::Write { path, source } = error {
        return HostFault::Io {
            doing: "write",
            path,
            source,
        };
    }
    HostFault::because("keep", PathBuf::from("mark.json"), chain(&error))
}
