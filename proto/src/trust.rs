//! What an agent believes, and which offers it may take.
//!
//! Pure: the agent keeps [`Trust`] on disk and asks it about everything that comes over the wire.
//! Invariants: the mark never goes down, nothing below it is taken but what is installed already,
//! two manifests never share a position, and within an epoch everything comes from one publisher.

use serde::{Deserialize, Serialize};

use crate::dsse::{Envelope, EnvelopeError, PublicKey, Verified};
use crate::fresh::Freshness;
use crate::keys::{KeySet, KeySetError};
use crate::manifest::{Manifest, ManifestError, Publisher};
use crate::{Digest, Epoch, FleetName, Position};

/// The newest generation that an agent accepted, whatever came of it there.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Mark {
    /// Its position: nothing lower is accepted any more, but for what is installed.
    pub position: Position,
    /// Which manifest it was.
    pub manifest_sha256: Digest,
    /// Whose it was.
    pub publisher: Publisher,
}

impl Mark {
    /// The mark that accepting `manifest` leaves.
    pub fn of(manifest: &Verified<Manifest>) -> Self {
        Self {
            position: manifest.position(),
            manifest_sha256: manifest.payload_sha256(),
            publisher: manifest.publisher.clone(),
        }
    }
}

/// An agent's trust: its pinned root with the newest key set, and how far it has come.
///
/// A host may stay below its mark: it refused a generation, or could not take it, and runs the one
/// before. What is installed it takes again also then, so that the master can mend files of it that
/// were damaged. That is no downgrade: the host runs exactly that manifest already, so the offer
/// gives it no other set of files than it has now, and whoever repeats an old offer gains nothing
/// by it. Key, fleet, epoch and publisher are checked as ever, the mark stays where it is, and what
/// is installed is what the host's own record says at the moment when the work begins, not what the
/// master says. The same holds for the word that a generation is current: one for what is installed
/// says of the host what is true, and runs out like any other.
#[derive(Clone, Debug)]
pub struct Trust {
    keys: Verified<KeySet>,
    mark: Option<Mark>,
}

/// Why an offer is not taken.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The key set.
    #[error("the offered key set is refused")]
    Keys(#[from] KeySetError),
    /// The manifest.
    #[error("the offered manifest is refused")]
    Manifest(#[from] ManifestError),
    /// The freshness statement.
    #[error("the freshness statement is refused")]
    Fresh(#[from] EnvelopeError),
    /// Of another fleet.
    #[error("the {what} is for fleet `{found}`, this is fleet `{expected}`")]
    Fleet {
        /// What was looked at.
        what: &'static str,
        /// The fleet it is for.
        found: FleetName,
        /// Ours.
        expected: FleetName,
    },
    /// Signed under another reign than the key set's.
    #[error("manifest {position} is not of epoch {expected}, the one of the key set in use")]
    Epoch {
        /// The manifest's position.
        position: Position,
        /// The key set's epoch.
        expected: Epoch,
    },
    /// Older than what was accepted before.
    #[error(
        "manifest {offered} is older than {accepted}, which this host accepted before; publish a newer one"
    )]
    Rollback {
        /// The manifest's position.
        offered: Position,
        /// The highest so far.
        accepted: Position,
    },
    /// Another manifest with a number that is taken.
    #[error(
        "two manifests claim to be {position}: {accepted:?} was accepted, {offered:?} is refused; look for a second master or a stolen manifest key"
    )]
    TwoManifests {
        /// The position both claim.
        position: Position,
        /// The first one's payload digest.
        accepted: Digest,
        /// The second one's.
        offered: Digest,
    },
    /// Another master in the same epoch.
    #[error("manifest {position} comes from publisher {offered}, this host follows {accepted}; two masters publish in epoch {}", position.epoch)]
    TwoPublishers {
        /// The manifest's position.
        position: Position,
        /// The publisher that was followed so far.
        accepted: String,
        /// The new one.
        offered: String,
    },
    /// Vouches for something else.
    #[error(
        "the freshness statement vouches for another manifest than the one it came with, or than those that this host has or took last"
    )]
    FreshForAnother,
}

impl Trust {
    /// Trust as it was kept: the newest key set (checked against its root when it was loaded) and
    /// the mark, if anything was accepted yet.
    pub fn new(keys: Verified<KeySet>, mark: Option<Mark>) -> Self {
        Self { keys, mark }
    }

    /// The key set in use.
    pub fn keys(&self) -> &Verified<KeySet> {
        &self.keys
    }

    /// The pinned root.
    pub fn root(&self) -> &PublicKey {
        &self.keys.root
    }

    /// The fleet.
    pub fn fleet(&self) -> &FleetName {
        &self.keys.fleet
    }

    /// The newest accepted generation.
    pub fn mark(&self) -> Option<&Mark> {
        self.mark.as_ref()
    }

    /// Judges a key set. `Ok(Some)`: newer, to be kept and used from now on.
    pub fn judge_keys(&self, envelope: &Envelope) -> Result<Option<Verified<KeySet>>, TrustError> {
        Ok(KeySet::accept(&self.keys, envelope)?)
    }

    /// Uses a newer key set that [`Trust::judge_keys`] returned, once it is on disk.
    pub fn adopt_keys(&mut self, keys: Verified<KeySet>) {
        self.keys = keys;
    }

    /// Judges an offered manifest. The one that was accepted last is good again: an offer may be
    /// repeated. So is the one that is `installed` (its payload's digest), wherever the mark is.
    pub fn judge_manifest(
        &self,
        envelope: &Envelope,
        installed: Option<Digest>,
    ) -> Result<Verified<Manifest>, TrustError> {
        let manifest = Manifest::verify(envelope, &self.keys.manifest)?;
        let position = manifest.position();
        self.check_fleet("manifest", &manifest.fleet)?;
        if manifest.epoch != self.keys.epoch {
            return Err(TrustError::Epoch {
                position,
                expected: self.keys.epoch,
            });
        }
        let Some(mark) = &self.mark else {
            return Ok(manifest);
        };
        // First: also an older manifest of another publisher says that two masters publish.
        if position.epoch == mark.position.epoch && manifest.publisher != mark.publisher {
            let (accepted, offered) = (mark.publisher.0.clone(), manifest.publisher.0.clone());
            return Err(TrustError::TwoPublishers {
                position,
                accepted,
                offered,
            });
        }
        let offered = manifest.payload_sha256();
        if self.is_below(&manifest) && installed != Some(offered) {
            return Err(TrustError::Rollback {
                offered: position,
                accepted: mark.position,
            });
        }
        if position == mark.position && offered != mark.manifest_sha256 {
            let accepted = mark.manifest_sha256;
            return Err(TrustError::TwoManifests {
                position,
                accepted,
                offered,
            });
        }
        Ok(manifest)
    }

    /// Whether a manifest is below the mark: it may be taken for as long as it is installed.
    pub fn is_below(&self, manifest: &Manifest) -> bool {
        let mark = self.mark.as_ref();
        mark.is_some_and(|mark| manifest.position() < mark.position)
    }

    /// The mark that accepting `manifest`, which [`Trust::judge_manifest`] let pass, leaves; `None` if
    /// it stays.
    pub fn raised(&self, manifest: &Verified<Manifest>) -> Option<Mark> {
        let mark = self.mark.as_ref().map(|mark| mark.position);
        (mark < Some(manifest.position())).then(|| Mark::of(manifest))
    }

    /// Uses a mark that [`Trust::raised`] returned, once it is on disk.
    pub fn adopt_mark(&mut self, mark: Mark) {
        self.mark = Some(mark);
    }

    /// Judges a freshness statement that came with the manifest with this payload digest. Whether it
    /// has already run out is for the caller to weigh ([`Freshness::holds_until`]).
    pub fn judge_fresh(
        &self,
        envelope: &Envelope,
        manifest_sha256: Digest,
    ) -> Result<Verified<Freshness>, TrustError> {
        self.judge_word(envelope, [Some(manifest_sha256)])
    }

    /// Judges one that came by itself: it must be about the generation that was accepted last, or
    /// about the one that is `installed`.
    pub fn judge_renewal(
        &self,
        envelope: &Envelope,
        installed: Option<Digest>,
    ) -> Result<Verified<Freshness>, TrustError> {
        let accepted = self.mark.as_ref().map(|mark| mark.manifest_sha256);
        self.judge_word(envelope, [accepted, installed])
    }

    fn judge_word<const N: usize>(
        &self,
        envelope: &Envelope,
        may_be_for: [Option<Digest>; N],
    ) -> Result<Verified<Freshness>, TrustError> {
        let fresh: Verified<Freshness> = envelope.verify(&self.keys.manifest)?;
        self.check_fleet("freshness statement", &fresh.fleet)?;
        if !may_be_for.contains(&Some(fresh.manifest_sha256)) {
            return Err(TrustError::FreshForAnother);
        }
        Ok(fresh)
    }

    fn check_fleet(&self, what: &'static str, found: &FleetName) -> Result<(), TrustError> {
        let expected = &self.keys.fleet;
        if found == expected {
            return Ok(());
        }
        Err(TrustError::Fleet {
            what,
            found: found.clone(),
            expected: expected.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dsse::sign;
    use crate::manifest::tests::manifest;
    use ed25519_dalek::SigningKey;
    use jiff::Timestamp;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn keys(version: u64, epoch: u64, manifest_key: u8) -> Verified<KeySet> {
        let set = KeySet {
            fleet: "bank".parse().unwrap(),
            version,
            epoch: Epoch(epoch),
            issued: Timestamp::UNIX_EPOCH,
            root: PublicKey::of(&key(1)),
            manifest: vec![PublicKey::of(&key(manifest_key))],
            audit: vec![PublicKey::of(&key(3))],
        };
        sign(set, &key(1))
    }

    /// An agent in epoch 2 that accepted generation `accepted`.
    fn trust(accepted: Option<u64>) -> Trust {
        let mark = accepted.map(|number| Mark::of(&sign(offer(2, number), &key(2))));
        Trust::new(keys(1, 2, 2), mark)
    }

    fn offer(epoch: u64, generation: u64) -> Manifest {
        manifest(epoch, generation, &["daily.cld=a"])
    }

    fn check(accepted: Option<u64>, manifest: Manifest, signer: u8) -> Result<(), String> {
        check_installed(accepted, None, manifest, signer)
    }

    /// The same where a generation is `installed`.
    fn check_installed(
        accepted: Option<u64>,
        installed: Option<Manifest>,
        manifest: Manifest,
        signer: u8,
    ) -> Result<(), String> {
        let installed = installed.map(|it| sign(it, &key(2)).payload_sha256());
        let offered = sign(manifest, &key(signer));
        let verdict = trust(accepted).judge_manifest(offered.envelope(), installed);
        verdict.map(|_| ()).map_err(|error| format!("{error:?}"))
    }

    fn refused(verdict: Result<(), String>, why: &str) {
        let error = verdict.unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn upwards_and_again_are_accepted() {
        assert_eq!(check(None, offer(2, 1), 2), Ok(()));
        assert_eq!(check(Some(7), offer(2, 8), 2), Ok(()));
        assert_eq!(check(Some(7), offer(2, 7), 2), Ok(()));
    }

    #[test]
    fn a_manifest_of_another_key_is_refused() {
        refused(check(None, offer(2, 1), 9), "Untrusted");
    }

    #[test]
    fn a_manifest_of_another_fleet_is_refused() {
        let mut foreign = offer(2, 1);
        foreign.fleet = "shop".parse().unwrap();
        refused(check(None, foreign, 2), "Fleet");
    }

    #[test]
    fn a_lower_number_is_refused() {
        refused(check(Some(7), offer(2, 6), 2), "Rollback");
    }

    #[test]
    fn what_is_installed_is_taken_below_the_mark_and_nothing_else_is() {
        let check = |offered, signer| check_installed(Some(7), Some(offer(2, 5)), offered, signer);
        assert_eq!(check(offer(2, 5), 2), Ok(()));
        for other in [4, 6] {
            refused(check(offer(2, other), 2), "Rollback");
        }
        let mut same_number = offer(2, 5);
        same_number.created = Timestamp::MAX;
        refused(check(same_number, 2), "Rollback");
        refused(check(offer(2, 5), 9), "Untrusted");
        let mut foreign = offer(2, 5);
        foreign.publisher = Publisher("p2".into());
        let installed = Some(foreign.clone());
        refused(
            check_installed(Some(7), installed, foreign, 2),
            "TwoPublishers",
        );
        let old = offer(1, 5);
        refused(check_installed(Some(7), Some(old.clone()), old, 2), "Epoch");
    }

    #[test]
    fn the_mark_goes_up_and_never_down() {
        let raised = |accepted, number| {
            let mark = trust(accepted).raised(&sign(offer(2, number), &key(2)));
            mark.map(|mark| mark.position.generation.number())
        };
        assert_eq!(raised(None, 5), Some(5));
        assert_eq!(raised(Some(7), 8), Some(8));
        assert_eq!(raised(Some(7), 7), None);
        assert_eq!(raised(Some(7), 5), None);
    }

    #[test]
    fn another_epoch_than_the_key_sets_is_refused_in_both_directions() {
        refused(check(Some(7), offer(1, 99), 2), "Epoch");
        refused(check(Some(7), offer(3, 1), 2), "Epoch");
    }

    #[test]
    fn two_manifests_with_one_number_keep_the_first() {
        let mut other = offer(2, 7);
        other.created = Timestamp::MAX;
        refused(check(Some(7), other, 2), "TwoManifests");
    }

    #[test]
    fn two_publishers_in_one_epoch_keep_the_first() {
        let mut other = offer(2, 8);
        other.publisher = Publisher("p2".into());
        refused(check(Some(7), other, 2), "TwoPublishers");
        let mut older = offer(2, 6);
        older.publisher = Publisher("p2".into());
        refused(check(Some(7), older, 2), "TwoPublishers");
    }

    #[test]
    fn a_new_epoch_frees_a_fleet_whose_numbers_a_thief_ran_up() {
        let mut trust = trust(Some(u64::MAX));
        let newer = trust.judge_keys(keys(2, 3, 4).envelope()).unwrap().unwrap();
        trust.adopt_keys(newer);
        let mut next = offer(3, 1);
        next.publisher = Publisher("p2".into());
        trust
            .judge_manifest(sign(next.clone(), &key(4)).envelope(), None)
            .unwrap();
        let stolen = trust.judge_manifest(sign(next, &key(2)).envelope(), None);
        assert!(matches!(stolen, Err(TrustError::Manifest(_))));
    }

    #[test]
    fn a_freshness_statement_belongs_to_one_manifest() {
        let manifest = sign(offer(2, 1), &key(2));
        let fresh = |manifest_sha256| Freshness {
            fleet: "bank".parse().unwrap(),
            epoch: Epoch(2),
            generation: manifest.generation,
            manifest_sha256,
            issued: Timestamp::UNIX_EPOCH,
            expires: Timestamp::MAX,
        };
        let judge = |statement: Freshness, signer| {
            let envelope = sign(statement, &key(signer)).envelope().clone();
            trust(None)
                .judge_fresh(&envelope, manifest.payload_sha256())
                .map(|_| ())
        };
        let right = manifest.payload_sha256();
        assert!(judge(fresh(right), 2).is_ok());
        assert!(matches!(
            judge(fresh(Digest::of(b"x")), 2),
            Err(TrustError::FreshForAnother)
        ));
        assert!(matches!(judge(fresh(right), 9), Err(TrustError::Fresh(_))));
    }

    #[test]
    fn a_word_by_itself_is_about_what_was_accepted_last_or_what_is_installed() {
        let digest = |number| sign(offer(2, number), &key(2)).payload_sha256();
        let judge = |about: u64, installed: Option<u64>| {
            let fresh = Freshness {
                fleet: "bank".parse().unwrap(),
                epoch: Epoch(2),
                generation: crate::Generation::new(about).unwrap(),
                manifest_sha256: digest(about),
                issued: Timestamp::UNIX_EPOCH,
                expires: Timestamp::MAX,
            };
            let envelope = sign(fresh, &key(2)).envelope().clone();
            let verdict = trust(Some(7)).judge_renewal(&envelope, installed.map(digest));
            verdict.is_ok()
        };
        assert!(judge(7, None) && judge(7, Some(5)) && judge(5, Some(5)));
        assert!(!judge(5, None) && !judge(6, Some(5)) && !judge(8, Some(5)));
    }
}
