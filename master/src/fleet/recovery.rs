//! What a start makes of what the last process left behind, and how a restored master shows.
//!
//! Pure: no sockets, no disk, no clock. A crash may come between any two writes, and a file may be
//! lost or come from a backup.

use std::sync::Arc;

use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::Manifest;
use jiff::Timestamp;

use super::rollout::Rollout;
use crate::publish::news::News;
use crate::publish::withdrawn::{Withdrawn, newest};

/// Where the rollout is: as `saved`, or as far as that can be known if it is lost, for the reason
/// given.
///
/// `withdrawn` is kept in a file of its own as well, so that the loss of one file brings nothing back
/// that was withdrawn. Where the rollout is lost, nobody is offered anything and nothing is published
/// or removed until an operator says so: what was halted, pinned or held must not come through
/// because a file is gone.
pub fn rollout(saved: Result<Rollout, String>, withdrawn: &Withdrawn, now: Timestamp) -> Rollout {
    let mut rollout = saved.unwrap_or_else(|reason| Rollout::lost(reason, now));
    rollout.were_withdrawn(withdrawn.iter().cloned());
    rollout
}

/// What the fleet may not have heard before the last end: the generation published last.
/// `manifests`: those that agents with the key set in use take, lowest first.
pub fn replay(rollout: &Rollout, manifests: &[Arc<Verified<Manifest>>]) -> Option<News> {
    if let (Some(owed), Some(manifest)) = (rollout.owed(), manifests.last())
        && manifest.rollback_of == Some(owed.of.position)
        && manifest.content == owed.to.content
    {
        return Some(News::WentBack(manifest.clone()));
    }
    if rollout.held().is_some() {
        return None; // nothing was published since, and where that stood may not be known
    }
    Some(News::Published {
        manifest: newest(manifests, rollout.withdrawn())?,
        supersede: false,
    })
}

/// Whether what an agent has `installed` may show that this master was restored from a backup and has
/// forgotten what it published since `ours`, or that another master publishes. Only a signature moves a
/// master.
pub fn is_news(
    installed: &Envelope,
    ours: Option<&Arc<Verified<Manifest>>>,
    keys: &KeySet,
) -> bool {
    let Ok(manifest) = Manifest::verify(installed, &keys.manifest) else {
        return false;
    };
    ours.is_none_or(|ours| {
        let is_others = manifest.publisher != ours.publisher && manifest.epoch == keys.epoch;
        // Of its number there may be another one here, which was made after the restoration.
        let is_ahead = manifest.position() >= ours.position()
            && manifest.payload_sha256() != ours.payload_sha256();
        is_others || is_ahead
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::agents::tests::{manifest, withdrawal};

    #[test]
    fn the_loss_of_one_of_two_files_brings_nothing_back_that_was_withdrawn() {
        let bad = manifest(8);
        let mut kept = Rollout::default();
        kept.were_withdrawn([withdrawal(&bad)]);
        let both = [
            (Ok(kept.clone()), Withdrawn::default()),
            (Err("gone".to_owned()), kept.withdrawn().clone()),
        ];
        for (saved, withdrawn) in both {
            let rollout = rollout(saved, &withdrawn, Timestamp::UNIX_EPOCH);
            assert!(rollout.is_taken_back(bad.position()));
            let manifests = [manifest(7), bad.clone()];
            let newest = newest(&manifests, rollout.withdrawn()).unwrap();
            assert_eq!(newest.position(), manifest(7).position());
        }
    }

    #[test]
    fn what_was_published_shortly_before_the_end_is_told_again() {
        let rollout = Rollout::default();
        let manifests = [manifest(7), manifest(8)];
        let Some(News::Published {
            manifest: told,
            supersede: false,
        }) = replay(&rollout, &manifests)
        else {
            panic!("nothing is told");
        };
        assert_eq!(told.position(), manifests[1].position());
        let lost = Rollout::lost("gone".to_owned(), Timestamp::UNIX_EPOCH);
        assert!(replay(&lost, &manifests).is_none());
    }
}
