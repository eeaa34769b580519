//! Publishing: from the mirror to a signed generation, or to a reason why not.

mod draft;
mod record;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clamcast_proto::dsse::{self, Envelope, KeyId, PublicKey, Verified};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Manifest, ManifestError, Publisher as PublisherId};
use clamcast_proto::{Digest, Epoch, FleetName, Generation, Position};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::config::units::UnitName;
use crate::config::{Config, Mirror};
use crate::publish::check::LoadTestError;
use crate::publish::mirror::activity::Activity;
use crate::publish::plan::{Plan, Skipped};
use crate::publish::withdrawn::{Directives, Rollback, Withdrawal, Withdrawn, newest};
use crate::store::{Store, StoreError};

use draft::{Draft, Drafted, Obstacle};
use record::Records;
pub use record::{Announcement, Hold, Refusal, RefusalKind};

/// Agents hear that their generation is current this many times in the time that the statement
/// holds, so that a few lost ones do not make a host stale.
pub const FRESH_PARTS: u32 = 4;

/// Turns captures into generations, and remembers what became of them.
///
/// All methods block: on the disk, and [`Publisher::publish`] also on the load test. One
/// publication runs at a time; the other methods do not wait for it.
#[derive(Debug)]
pub struct Publisher {
    settings: Settings,
    store: Arc<Store>,
    key: SigningKey,
    keys: Verified<KeySet>,
    records: Mutex<Records>,
    directives: watch::Receiver<Directives>,
    /// Statements that a generation is current, until they are made anew.
    vouched: Mutex<HashMap<Digest, Verified<Freshness>>>,
    publishing: Mutex<()>,
    activity: Activity,
}

/// How captures are taken and kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The fleet.
    pub fleet: FleetName,
    /// Where the databases come from and what they must be like.
    pub mirror: Mirror,
    /// Generations kept in the store.
    pub keep: usize,
    /// For how long agents are told that the current generation is current.
    pub fresh: Duration,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        Self {
            fleet: config.fleet.clone(),
            mirror: config.mirror.clone(),
            keep: config.keep,
            fresh: config.signing.fresh,
        }
    }
}

/// What came of a publication.
#[derive(Debug)]
pub enum Published {
    /// A new generation.
    New {
        /// Its manifest; [`Publisher::current`] from now on.
        manifest: Arc<Verified<Manifest>>,
        /// What the audit log is to say of it; then [`Publisher::announced`].
        announcement: Announcement,
    },
    /// The mirror has what is published already.
    Unchanged,
    /// The last generation stays until an operator accepts this one.
    Held(Refusal),
    /// The last generation stays until the mirror is repaired.
    Refused(Refusal),
    /// Some program is at work in the mirror: try again when it is quiet.
    Busy {
        /// What is going on.
        reason: String,
    },
}

/// What is asked for when something is to be published.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// What an operator accepts.
    pub accept: Option<Accept>,
    /// Whether it takes the place of what is on its way through the fleet.
    pub supersede: bool,
    /// Whether an operator asks: units that changed a moment ago are not waited for, and what did not
    /// load is loaded again.
    pub is_operators: bool,
}

/// An operator's word for what may be overruled.
#[derive(Clone, Debug, Default)]
pub struct Accept {
    /// The reason.
    pub reason: String,
    /// The units that it is about, by their names or those of their files; empty: all.
    pub units: Vec<String>,
}

/// What would be published.
#[derive(Debug)]
pub struct Preview {
    /// The generation in the making; none if the mirror cannot be captured.
    pub plan: Option<Plan>,
    /// Files that no generation carries.
    pub skipped: Vec<Skipped>,
    /// Why nothing would be published.
    pub obstacle: Option<(RefusalKind, String)>,
    /// Whether it is published already.
    pub is_published: bool,
}

/// Why a publication failed through no fault of the mirror's.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The state directory.
    #[error("cannot publish")]
    Store(#[from] StoreError),
    /// The load test could not be made. It may work the next time.
    #[error("cannot publish")]
    LoadTest(#[from] LoadTestError),
    /// The daemon stops.
    #[error("the daemon stops; what is in the mirror is published after its next start")]
    Stopping,
    /// Somebody used up all numbers.
    #[error("there is no generation after {position}; raise the epoch of the key set")]
    NoNumberLeft {
        /// The last one.
        position: Position,
    },
    /// What is to be published again is gone.
    #[error("generation {position} is not in the store any more; `generations` lists what is")]
    Gone {
        /// The generation.
        position: Position,
    },
    /// An operator names a unit that neither the mirror nor the fleet has.
    #[error("there is no unit `{name}`; `publish --dry-run` lists the units")]
    NoSuchUnit {
        /// What was named.
        name: String,
    },
    /// An operator names a unit and gives no reason.
    #[error("`{unit}` is the name of a unit; say why first: `publish --accept REASON {unit}`")]
    NoReason {
        /// What was given as the reason.
        unit: String,
    },
    /// We made a manifest that agents would refuse.
    #[error("the manifest that was made is wrong, which is a bug; nothing was published")]
    Wrong(#[from] ManifestError),
}

/// Why publishing cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Agents would refuse everything signed with it.
    #[error(
        "the manifest key ({id}) is not in key set version {version}; use the key that belongs to it, or sign a key set that has it"
    )]
    Key {
        /// The key that signs here.
        id: KeyId,
        /// The key set.
        version: u64,
    },
    /// The key set belongs to another fleet.
    #[error("the key set is for fleet `{found}`, the configuration says `{expected}`")]
    Fleet {
        /// The key set's.
        found: FleetName,
        /// The configured one.
        expected: FleetName,
    },
    /// An older key set than the one before.
    #[error(
        "the key set is of epoch {found}, and generation {published} was published; use the newest key set"
    )]
    Epoch {
        /// The key set's.
        found: Epoch,
        /// The highest generation.
        published: Position,
    },
    /// The state directory.
    #[error("cannot read the publisher's records")]
    Store(#[from] StoreError),
}

/// What a manifest that an agent reported means to this master.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Adoption {
    /// Nothing: it is ours, or lower than ours.
    Known,
    /// The fleet is further than this state directory, which was lost or restored from a backup:
    /// the next publication is above it, and due at once.
    Restored {
        /// How far the fleet is.
        position: Position,
        /// Whether this master also speaks under the id of the lost one from now on, since agents
        /// listen to one publisher in an epoch.
        publisher: bool,
    },
    /// Signed with our key by another master, while agents accepted generations of this one: there
    /// are two masters, or the manifest key was stolen.
    OtherPublisher {
        /// The manifest's position.
        position: Position,
        /// Its publisher.
        publisher: PublisherId,
    },
}

/// Why a reported manifest moves nothing.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Not signed by a key of the key set, or inconsistent.
    #[error("the reported manifest is not believed")]
    Manifest(#[from] ManifestError),
    /// Of another fleet.
    #[error("the reported manifest is for fleet `{found}`")]
    Fleet {
        /// Its fleet.
        found: FleetName,
    },
    /// Of an epoch that this master's key set does not know.
    #[error("the reported manifest is of epoch {}, the key set is of epoch {epoch}; use the newest key set", position.epoch)]
    Epoch {
        /// Where it stands.
        position: Position,
        /// The key set's epoch.
        epoch: Epoch,
    },
    /// It could not be remembered.
    #[error("cannot remember the reported manifest")]
    Store(#[from] StoreError),
}

impl PublishError {
    /// Whether the command was wrong, and nothing is wrong with the master.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NoSuchUnit { .. } | Self::NoReason { .. })
    }
}

impl Publisher {
    /// Continues where the state directory is, after checking that agents would believe `key`
    /// under `keys`. Also applies the retention, in case it was changed or interrupted.
    pub fn new(
        settings: impl Into<Settings>,
        store: Arc<Store>,
        key: SigningKey,
        keys: Verified<KeySet>,
        directives: watch::Receiver<Directives>,
        activity: Activity,
    ) -> Result<Self, StartError> {
        let settings = settings.into();
        let id = PublicKey::of(&key).id();
        if !keys.manifest.iter().any(|key| key.id() == id) {
            let version = keys.version;
            return Err(StartError::Key { id, version });
        }
        if keys.fleet != settings.fleet {
            let (found, expected) = (keys.fleet.clone(), settings.fleet);
            return Err(StartError::Fleet { found, expected });
        }
        if let Some(published) = store.taken().filter(|taken| taken.epoch > keys.epoch) {
            let found = keys.epoch;
            return Err(StartError::Epoch { found, published });
        }
        let records = Records::load(&store, &keys)?;
        store.retain(settings.keep)?;
        Ok(Self {
            settings,
            store,
            key,
            keys,
            records: Mutex::new(records),
            directives,
            vouched: Mutex::default(),
            publishing: Mutex::new(()),
            activity,
        })
    }

    /// The generation to offer: the highest, if agents with the key set in use take it. After the
    /// epoch was raised or a lost state directory was replaced there is none until the next
    /// publication.
    pub fn current(&self) -> Option<Arc<Verified<Manifest>>> {
        let current = self.store.current()?;
        let records = self.records();
        self.may_be_offered(&current, &records.publisher.id)
            .then_some(current)
    }

    /// Every generation that agents with the key set in use take, oldest first.
    pub fn offerable(&self) -> Vec<Arc<Verified<Manifest>>> {
        let mut manifests = self.store.manifests();
        let records = self.records();
        manifests.retain(|manifest| self.may_be_offered(manifest, &records.publisher.id));
        manifests
    }

    /// The highest of them that the fleet did not reject: what everybody is wanted at, as far as
    /// this knows.
    pub fn newest(&self) -> Option<Arc<Verified<Manifest>>> {
        newest(&self.offerable(), &self.directives.borrow().withdrawn)
    }

    fn may_be_offered(&self, manifest: &Verified<Manifest>, id: &PublisherId) -> bool {
        let signers = &self.keys.manifest;
        manifest.epoch == self.keys.epoch
            && manifest.publisher == *id
            && signers.iter().any(|key| key.id() == manifest.signer())
    }

    /// Whether a publication is due although the mirror may not have changed.
    pub fn is_due(&self) -> bool {
        let Some(current) = self.store.current() else {
            return false; // the first capture is the mirror's matter
        };
        let records = self.records();
        !self.may_be_offered(&current, &records.publisher.id) || records.is_passed(&current)
    }

    /// Why the mirror's state is not published, as far as the last capture knows.
    pub fn refusal(&self) -> Option<Refusal> {
        self.records().refusal.clone()
    }

    /// The store it publishes into.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The key set that it publishes under.
    pub fn keys(&self) -> &Verified<KeySet> {
        &self.keys
    }

    /// A generation whose announcement may not be in the audit log, since the process that made it
    /// did not come so far.
    pub fn unannounced(&self) -> Option<(Arc<Verified<Manifest>>, Announcement)> {
        let announcement = self.records().announcement.clone()?;
        // If there is none, the process ended before there was.
        let manifest = self.store.manifest(announcement.position)?;
        Some((manifest, announcement))
    }

    /// Takes note that the audit log has the announcement. A crash before that has it written
    /// again: twice is better than never.
    pub fn announced(&self) -> Result<(), StoreError> {
        self.records().announced(&self.store)
    }

    /// Captures the mirror, checks it, and signs and keeps a new generation if there is something
    /// new, for `actor`.
    ///
    /// Nothing is signed before every check was passed, and nothing is returned as new before it
    /// is on disk. A crash in between leaves objects that no generation names, and the next call
    /// removes them. After `stop` nothing new is begun and a load test is broken off.
    pub fn publish(
        &self,
        request: &Request,
        actor: &str,
        now: Timestamp,
        stop: &CancellationToken,
    ) -> Result<Published, PublishError> {
        let _one_at_a_time = lock(&self.publishing);
        if stop.is_cancelled() {
            return Err(PublishError::Stopping);
        }
        let published = self.publish_captured(request, actor, now, stop);
        // What was captured and not published, or is old, only takes space: no reason to fail.
        if let Err(error) = self.store.retain(self.settings.keep) {
            tracing::warn!(
                error = chain(&error),
                "cannot remove what is not needed any more"
            );
        }
        published
    }

    fn publish_captured(
        &self,
        request: &Request,
        actor: &str,
        now: Timestamp,
        stop: &CancellationToken,
    ) -> Result<Published, PublishError> {
        let directives = self.directives.borrow().clone();
        if let Some(reason) = &directives.held {
            return self.not_published(RefusalKind::Held, reason.clone(), now);
        }
        let draft = match self.draft(request, &directives, false, now, stop)? {
            Drafted::Draft(draft) => draft,
            Drafted::Obstacle(reason) => {
                return self.not_published(RefusalKind::Refused, reason, now);
            }
        };
        // What an operator accepted in vain is still held.
        if draft.obstacle.is_none() || request.accept.is_none() {
            let held = draft.plan.held();
            self.records()
                .hold(held, &draft.skipped, now, &self.store)?;
        }
        match &draft.obstacle {
            Some(Obstacle::Busy(reason)) => {
                let reason = reason.clone();
                return Ok(Published::Busy { reason });
            }
            Some(Obstacle::Refusal(kind, reason)) => {
                return self.not_published(*kind, reason.clone(), now);
            }
            None => {}
        }
        if draft.is_published {
            self.records().clear_refusal(&self.store)?;
            return Ok(Published::Unchanged);
        }
        let Draft { plan, content, .. } = *draft;
        // A load test takes its time.
        let is_same = {
            let now = self.directives.borrow();
            (&now.held, &now.withdrawn) == (&directives.held, &directives.withdrawn)
        };
        if !is_same {
            let reason = "a rollout ended meanwhile".to_owned();
            return Ok(Published::Busy { reason });
        }
        let Position { epoch, generation } = self.next_position()?;
        let publisher = self.records().publisher.id.clone();
        let manifest = Manifest {
            fleet: self.settings.fleet.clone(),
            epoch,
            generation,
            publisher,
            created: now,
            previous: self.highest_known().map(|it| it.payload_sha256()),
            rollback_of: None,
            content,
            files: plan.files(),
        };
        if let Err(error) = manifest.fits() {
            return self.not_published(RefusalKind::Refused, error.to_string(), now);
        }
        let manifest = dsse::sign(manifest, &self.key);
        Manifest::verify(manifest.envelope(), &self.keys.manifest)?;
        let reason = request.accept.as_ref().map(|accept| accept.reason.clone());
        let announcement = Announcement {
            position: manifest.position(),
            actor: actor.to_owned(),
            reason: reason.filter(|_| !plan.accepted.is_empty()),
            accepted: plan.accepted.clone(),
            held: plan.held().map(|(unit, _)| unit.clone()).collect(),
        };
        self.records().announce(announcement.clone(), &self.store)?;
        let manifest = self.store.add(manifest)?;
        // The generation is published. What is said of former captures is cleared the next time if
        // it cannot be now.
        let mut records = self.records();
        if let Err(error) = records.clear_refusal(&self.store) {
            tracing::warn!(
                error = chain(&error),
                "cannot clear what was held or refused before"
            );
        }
        drop(records);
        Ok(Published::New {
            manifest,
            announcement,
        })
    }

    /// What [`Publisher::publish`] would do now.
    pub fn preview(
        &self,
        request: &Request,
        now: Timestamp,
        stop: &CancellationToken,
    ) -> Result<Preview, PublishError> {
        let _one_at_a_time = lock(&self.publishing);
        if stop.is_cancelled() {
            return Err(PublishError::Stopping);
        }
        let directives = self.directives.borrow().clone();
        let held = directives.held.clone();
        let held = held.map(|reason| (RefusalKind::Held, reason));
        let preview = match self.draft(request, &directives, true, now, stop)? {
            Drafted::Draft(draft) => {
                let Draft {
                    plan,
                    skipped,
                    obstacle,
                    is_published,
                    ..
                } = *draft;
                Preview {
                    plan: Some(plan),
                    skipped,
                    obstacle: held.or(obstacle.map(Obstacle::into_refusal)),
                    is_published,
                }
            }
            Drafted::Obstacle(reason) => Preview {
                plan: None,
                skipped: Vec::new(),
                obstacle: held.or(Some((RefusalKind::Refused, reason))),
                is_published: false,
            },
        };
        if let Err(error) = self.store.retain(self.settings.keep) {
            tracing::warn!(
                error = chain(&error),
                "cannot remove what is not needed any more"
            );
        }
        Ok(preview)
    }

    /// The units that are held, as far as the last capture knows.
    pub fn holds(&self) -> BTreeMap<UnitName, Hold> {
        self.records().holds.held.clone()
    }

    /// Files of the mirror that clamd would load and that no generation carries.
    pub fn skipped(&self) -> Vec<Skipped> {
        self.records().holds.skipped.clone()
    }

    /// The withdrawal that keeps a content from being published, if one does.
    pub fn rejection(&self, content: Digest) -> Option<Withdrawal> {
        let manifests = self.store.manifests();
        let published = manifests.iter().map(|it| (it.position(), it.content));
        let directives = self.directives.borrow();
        directives.withdrawn.rejection(content, published).cloned()
    }

    /// Whether this rollback still has to be published.
    pub fn owes(&self, rollback: Rollback) -> bool {
        self.directives.borrow().owed == Some(rollback)
    }

    /// Publishes the databases of one generation again, under a number above the one that they
    /// replace. What was published so before is returned again: a repeat changes nothing.
    pub fn roll_back(
        &self,
        Rollback { to, of }: Rollback,
        now: Timestamp,
    ) -> Result<(Arc<Verified<Manifest>>, Option<Announcement>), PublishError> {
        let _one_at_a_time = lock(&self.publishing);
        let gone = PublishError::Gone { position: to };
        let to = self.store.manifest(to).ok_or(gone)?;
        // Not only the highest: the mirror may have been published since.
        let mut published = self.store.manifests().into_iter();
        if let Some(done) =
            published.find(|it| it.rollback_of == Some(of) && it.content == to.content)
        {
            return Ok((done, None));
        }
        let Position { epoch, generation } = self.next_position()?;
        let publisher = self.records().publisher.id.clone();
        let previous = self.highest_known().map(|it| it.payload_sha256());
        let manifest = Manifest {
            fleet: self.settings.fleet.clone(),
            epoch,
            generation,
            publisher,
            created: now,
            previous,
            rollback_of: Some(of),
            content: to.content,
            files: to.files.clone(),
        };
        let manifest = dsse::sign(manifest, &self.key);
        Manifest::verify(manifest.envelope(), &self.keys.manifest)?;
        let announcement = Announcement {
            position: manifest.position(),
            actor: "master".to_owned(),
            reason: None,
            accepted: Vec::new(),
            held: Vec::new(),
        };
        self.records().announce(announcement.clone(), &self.store)?;
        let manifest = self.store.add(manifest)?;
        Ok((manifest, Some(announcement)))
    }

    fn not_published(
        &self,
        kind: RefusalKind,
        reason: String,
        now: Timestamp,
    ) -> Result<Published, PublishError> {
        let refusal = self.records().refuse(kind, reason, now, &self.store)?;
        Ok(match kind {
            RefusalKind::Held => Published::Held(refusal),
            RefusalKind::Refused => Published::Refused(refusal),
        })
    }

    /// The highest generation that this master knows of: its own, or one that the fleet reported.
    fn highest_known(&self) -> Option<Arc<Verified<Manifest>>> {
        let own = self.store.current();
        let adopted = self.records().adopted.clone();
        own.into_iter()
            .chain(adopted)
            .max_by_key(|manifest| manifest.position())
    }

    /// Above everything that was given away here or reported by the fleet. The first of its epoch
    /// if the epoch was raised.
    fn next_position(&self) -> Result<Position, PublishError> {
        let epoch = self.keys.epoch;
        let adopted = self.records().adopted.as_ref().map(|it| it.position());
        let generation = match self.store.taken().max(adopted) {
            Some(position) if position.epoch == epoch => position
                .generation
                .next()
                .ok_or(PublishError::NoNumberLeft { position })?,
            Some(_) | None => Generation::FIRST,
        };
        Ok(Position { epoch, generation })
    }

    /// Signs that a generation is what its agents are wanted at, from now on for as long as
    /// configured. What was signed shortly before is returned again.
    pub fn vouch(&self, manifest: &Verified<Manifest>, now: Timestamp) -> Verified<Freshness> {
        let young = self.settings.fresh / (2 * FRESH_PARTS);
        let is_young = |it: &Verified<Freshness>| {
            let age = now.duration_since(it.issued);
            !age.is_negative() && age.unsigned_abs() < young
        };
        let mut vouched = lock(&self.vouched);
        vouched.retain(|_, it| is_young(it));
        let sign = || self.sign_freshness(manifest, now);
        let digest = manifest.payload_sha256();
        vouched.entry(digest).or_insert_with(sign).clone()
    }

    fn sign_freshness(&self, manifest: &Verified<Manifest>, now: Timestamp) -> Verified<Freshness> {
        let fresh = SignedDuration::try_from(self.settings.fresh).unwrap_or(SignedDuration::MAX);
        let freshness = Freshness {
            fleet: manifest.fleet.clone(),
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: manifest.payload_sha256(),
            issued: now,
            expires: now.saturating_add(fresh).unwrap_or(Timestamp::MAX),
        };
        dsse::sign(freshness, &self.key)
    }

    /// Takes note of the manifest that an agent says it has installed. Only what is validly signed
    /// moves anything. After [`Adoption::Restored`] a publication is due.
    pub fn adopt(&self, envelope: &Envelope) -> Result<Adoption, AdoptError> {
        let manifest = Manifest::verify(envelope, &self.keys.manifest)?;
        let position = manifest.position();
        if manifest.fleet != self.settings.fleet {
            let found = manifest.fleet.clone();
            return Err(AdoptError::Fleet { found });
        }
        let epoch = self.keys.epoch;
        if position.epoch > epoch {
            return Err(AdoptError::Epoch { position, epoch });
        }
        let mut records = self.records();
        let ours = records.publisher.id == manifest.publisher;
        if ours {
            records.mark_accepted(&self.store)?;
        }
        let digest = manifest.payload_sha256();
        let same = |known: &Verified<Manifest>| known.payload_sha256() == digest;
        let known = self
            .store
            .manifest(position)
            .is_some_and(|known| same(&known))
            || records.adopted.as_ref().is_some_and(|known| same(known));
        let highest = self
            .store
            .taken()
            .max(records.adopted.as_ref().map(|it| it.position()));
        // One that is as high as ours and another is not known: agents who have it refuse ours.
        if known || position.epoch < epoch {
            return Ok(Adoption::Known);
        }
        let published = self.store.manifests();
        let was_ours = ours
            || published
                .iter()
                .any(|it| it.publisher == manifest.publisher);
        if was_ours && Some(position) < highest {
            return Ok(Adoption::Known);
        }
        if !ours && records.publisher.accepted {
            let publisher = manifest.publisher.clone();
            return Ok(Adoption::OtherPublisher {
                position,
                publisher,
            });
        }
        records.adopt(manifest, &self.store)?;
        Ok(Adoption::Restored {
            position,
            publisher: !ours,
        })
    }

    /// Takes note that an agent accepted a manifest, as its receipt says. From then on this
    /// master keeps its publisher id.
    pub fn accepted(&self, manifest_sha256: &Digest) -> Result<(), StoreError> {
        let mut records = self.records();
        let ours = |manifest: &Arc<Verified<Manifest>>| {
            manifest.payload_sha256() == *manifest_sha256
                && manifest.publisher == records.publisher.id
        };
        if !records.publisher.accepted && self.store.manifests().iter().any(ours) {
            records.mark_accepted(&self.store)?;
        }
        Ok(())
    }

    /// The generations that were taken back.
    pub fn withdrawn(&self) -> Withdrawn {
        self.directives.borrow().withdrawn.clone()
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        lock(&self.records)
    }
}

/// Records are changed in memory after they were on disk: what a panic leaves behind is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
