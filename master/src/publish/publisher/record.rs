//! What a publisher remembers beside its generations, each in a file of its own in the state
//! directory. A change is on disk before it counts.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use clamcast_proto::Position;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Manifest, Publisher};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::chain;
use crate::config::units::UnitName;
use crate::publish::plan::{CauseKind, Held, Skipped};
use crate::store::{Store, StoreError};

const PUBLISHER: &str = "publisher";
const ADOPTED: &str = "adopted.json";
const REFUSED: &str = "refused.json";
const ANNOUNCEMENT: &str = "announcement.json";
const HOLDS: &str = "holds.json";

/// Skipped files that are remembered. Few mirrors have any.
const SKIPPED_MAX: usize = 1000;

/// Held units that are remembered. A mirror with more has other trouble.
const HELD_MAX: usize = 5000;

#[derive(Debug)]
pub(super) struct Records {
    pub(super) publisher: Identity,
    /// The highest manifest that agents reported and that was not made here.
    pub(super) adopted: Option<Arc<Verified<Manifest>>>,
    pub(super) refusal: Option<Refusal>,
    /// What the last capture left out of the generation.
    pub(super) holds: Holds,
    /// What is about to be published, or is and may not be in the audit log yet.
    pub(super) announcement: Option<Announcement>,
}

/// What a capture left out.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Holds {
    pub(super) held: BTreeMap<UnitName, Hold>,
    pub(super) skipped: Vec<Skipped>,
}

/// A unit that is held.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Hold {
    /// Why, and what is published in its place.
    #[serde(flatten)]
    pub held: Held,
    /// Since when it is held without a break, for whatever reason.
    pub since: Timestamp,
}

/// Who publishes from this state directory.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Identity {
    /// Random at first.
    pub(super) id: Publisher,
    /// Whether any agent ever accepted a generation under that id.
    pub(super) accepted: bool,
}

/// What the audit log has to say of a generation and its manifest does not.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Announcement {
    /// The generation.
    pub position: Position,
    /// Who had it published: `master`, or an operator.
    pub actor: String,
    /// What an operator's `accept` overruled. Empty if there was nothing to overrule.
    pub accepted: Vec<String>,
    /// The operator's reason.
    pub reason: Option<String>,
    /// The units that were held.
    #[serde(default)]
    pub held: Vec<UnitName>,
}

/// Why the mirror's state is not published.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Refusal {
    /// Whether an operator may overrule it.
    pub kind: RefusalKind,
    /// What is wrong and what can be done.
    pub reason: String,
    /// When it was found first.
    pub since: Timestamp,
}

/// What an operator can do about a refusal.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RefusalKind {
    /// `publish --accept REASON`.
    Held,
    /// Repair the mirror.
    Refused,
}

/// A program that is at work on a unit for less than this is no news.
const PASSING: SignedDuration = SignedDuration::from_mins(1);

impl Hold {
    /// Whether a program has only just begun to change the unit.
    pub fn is_passing(&self, now: Timestamp) -> bool {
        self.held.cause.kind == CauseKind::Unfinished && now.duration_since(self.since) < PASSING
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RefusalKind::Held => "held",
            RefusalKind::Refused => "refused",
        };
        write!(f, "{kind}: {}", self.reason)
    }
}

impl Records {
    /// Reads them, or makes the first ones.
    pub(super) fn load(store: &Store, keys: &Verified<KeySet>) -> Result<Self, StoreError> {
        let publisher = match store.load(PUBLISHER)? {
            Some(publisher) => publisher,
            None => {
                // Lost on its own: the generations still say who we are, and agents heard of them.
                let current = store.current().map(|current| current.publisher.clone());
                let accepted = current.is_some();
                let id =
                    current.unwrap_or_else(|| Publisher(hex::encode(rand::random::<[u8; 16]>())));
                let publisher = Identity { id, accepted };
                store.save(PUBLISHER, &publisher)?;
                publisher
            }
        };
        let adopted = store.load::<Envelope>(ADOPTED)?;
        let adopted = adopted.and_then(|envelope| {
            match Manifest::verify(&envelope, &keys.manifest) {
                Ok(manifest) => Some(Arc::new(manifest)),
                Err(error) => {
                    // Of a former epoch or key. Numbers begin anew with an epoch.
                    tracing::debug!(error = %chain(&error), "an adopted manifest no longer counts");
                    None
                }
            }
        });
        Ok(Self {
            publisher,
            adopted,
            refusal: store.load(REFUSED)?,
            announcement: store.load(ANNOUNCEMENT)?,
            holds: store
                .load(HOLDS)
                .unwrap_or_else(|error| {
                    // The next capture finds them again.
                    tracing::warn!(error = %chain(&error), "cannot read which units are held");
                    None
                })
                .unwrap_or_default(),
        })
    }

    /// Whether the fleet is past `current`, or has another generation of that number.
    pub(super) fn is_passed(&self, current: &Verified<Manifest>) -> bool {
        self.adopted
            .as_ref()
            .is_some_and(|adopted| adopted.position() >= current.position())
    }

    pub(super) fn mark_accepted(&mut self, store: &Store) -> Result<(), StoreError> {
        if self.publisher.accepted {
            return Ok(());
        }
        let mut publisher = self.publisher.clone();
        publisher.accepted = true;
        store.save(PUBLISHER, &publisher)?;
        self.publisher = publisher;
        Ok(())
    }

    /// Remembers how far the fleet is, and speaks under the publisher id that it listens to.
    ///
    /// A crash between the two writes leaves the old id with the higher number; the next report
    /// of the same manifest is known then, so the id goes first.
    pub(super) fn adopt(
        &mut self,
        manifest: Verified<Manifest>,
        store: &Store,
    ) -> Result<(), StoreError> {
        let publisher = Identity {
            id: manifest.publisher.clone(),
            accepted: true,
        };
        store.save(PUBLISHER, &publisher)?;
        self.publisher = publisher;
        store.save(ADOPTED, manifest.envelope())?;
        self.adopted = Some(Arc::new(manifest));
        Ok(())
    }

    /// Remembers why nothing is published, and since when.
    pub(super) fn refuse(
        &mut self,
        kind: RefusalKind,
        reason: String,
        now: Timestamp,
        store: &Store,
    ) -> Result<Refusal, StoreError> {
        if let Some(known) = &self.refusal
            && (known.kind, &known.reason) == (kind, &reason)
        {
            return Ok(known.clone());
        }
        let refusal = Refusal {
            kind,
            reason,
            since: now,
        };
        store.save(REFUSED, &refusal)?;
        self.refusal = Some(refusal.clone());
        Ok(refusal)
    }

    /// Remembers what a capture left out, and since when.
    pub(super) fn hold<'p>(
        &mut self,
        held: impl Iterator<Item = (&'p UnitName, &'p Held)>,
        skipped: &[Skipped],
        now: Timestamp,
        store: &Store,
    ) -> Result<(), StoreError> {
        let held = held.map(|(unit, held)| {
            let known = self.holds.held.get(unit);
            let since = known.map_or(now, |known| known.since);
            let held = held.clone();
            (unit.clone(), Hold { held, since })
        });
        let mut holds = Holds {
            held: held.take(HELD_MAX).collect(),
            skipped: skipped.iter().take(SKIPPED_MAX).cloned().collect(),
        };
        if let Some(more) = skipped
            .len()
            .checked_sub(SKIPPED_MAX)
            .filter(|more| *more > 0)
        {
            holds.skipped.push(Skipped {
                name: format!("{more} more files"),
                reason: "not listed".to_owned(),
            });
        }
        if holds != self.holds {
            store.save(HOLDS, &holds)?;
            self.holds = holds;
        }
        Ok(())
    }

    pub(super) fn clear_refusal(&mut self, store: &Store) -> Result<(), StoreError> {
        if self.refusal.is_some() {
            store.forget(REFUSED)?;
            self.refusal = None;
        }
        Ok(())
    }

    /// Remembers what is to be said of a generation before there is one, so that a crash at any
    /// moment leaves both or a word about nothing.
    pub(super) fn announce(
        &mut self,
        announcement: Announcement,
        store: &Store,
    ) -> Result<(), StoreError> {
        store.save(ANNOUNCEMENT, &announcement)?;
        self.announcement = Some(announcement);
        Ok(())
    }

    pub(super) fn announced(&mut self, store: &Store) -> Result<(), StoreError> {
        store.forget(ANNOUNCEMENT)?;
        self.announcement = None;
        Ok(())
    }
}
