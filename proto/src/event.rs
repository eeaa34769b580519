//! What the audit logs tell of.
//!
//! Pure: no sockets, no disk, no clock.

use std::fmt;

use serde::{Serialize, Serializer};

/// Declares the events with their names in the log, from one list.
macro_rules! events {
    ($($(#[$meta:meta])* $event:ident = $name:literal,)*) => {
        /// Something that an audit log records. A log may also hold events of other versions, so
        /// whoever reads one reads their names.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum AuditEvent {
            $($(#[$meta])* $event,)*
        }

        impl AuditEvent {
            /// Every event, in the order of their names.
            pub const ALL: &[Self] = &[$(Self::$event,)*];

            /// The name in the log.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$event => $name,)*
                }
            }
        }
    };
}

events! {
    /// An operator ended a rollout.
    Abort = "abort",
    /// An agent took an offer.
    Accepted = "accepted",
    /// The daemon found something that somebody should look at.
    Alarm = "alarm",
    /// An agent exceeded its daily budget in the audit log: lines were left out.
    BudgetExceeded = "budget-exceeded",
    /// A known agent connected with a certificate that the master has not seen before.
    Certificate = "certificate",
    /// The refusals of a host count again.
    CountedAgain = "counted-again",
    /// An agent does not take its offer.
    Declined = "declined",
    /// A user gave a command that only operators may give.
    Denied = "denied",
    /// A host's files were changed by somebody else.
    Drift = "drift",
    /// A host connected for the first time.
    Enrolled = "enrolled",
    /// The certificate of a connected agent expired.
    Expired = "expired",
    /// An operator ordered a forced synchronisation.
    ForceSync = "force-sync",
    /// What came of it.
    ForceSyncEnd = "force-sync-end",
    /// A rollout ended because hosts refused the generation.
    Halt = "halt",
    /// The mirror's content waits for an operator.
    Held = "held",
    /// An agent put a generation into its database directory.
    Installed = "installed",
    /// An agent took a newer key set.
    Keys = "keys",
    /// An agent was offered a generation.
    Offer = "offer",
    /// An operator keeps a group at a generation.
    Pin = "pin",
    /// An operator ended the waiting between waves.
    Promoted = "promoted",
    /// A generation was published.
    Published = "published",
    /// An agent said what came of a generation.
    Receipt = "receipt",
    /// The mirror's content is not published; on an agent: an offer or a set was refused.
    Refused = "refused",
    /// A connection was not let in.
    Rejected = "rejected",
    /// A generation is no longer withheld from a ClamAV version.
    Released = "released",
    /// The configuration was read again.
    Reload = "reload",
    /// Changed files were replaced by those of the generation.
    Repair = "repair",
    /// The master's state is older than what its agents have.
    Restored = "restored",
    /// A newer revocation list is in force.
    RevocationList = "revocation_list",
    /// A host's certificate was revoked.
    Revoked = "revoked",
    /// A rollback was published.
    Rollback = "rollback",
    /// A generation was taken back after it was complete; on an agent: it went back.
    RolledBack = "rolled-back",
    /// A rollout began.
    Rollout = "rollout",
    /// A generation reached every wave.
    RolloutComplete = "rollout-complete",
    /// A rollout was paused.
    RolloutPaused = "rollout-paused",
    /// A paused rollout goes on.
    RolloutResumed = "rollout-resumed",
    /// A wave waits, for a window or for its members.
    RolloutWaits = "rollout-waits",
    /// The refusals of a host do not count any more.
    SetAside = "set-aside",
    /// The daemon started.
    Started = "started",
    /// The daemon stopped.
    Stopped = "stopped",
    /// A wave is settled without these hosts.
    Stragglers = "stragglers",
    /// A group is no longer kept at a generation.
    Unpin = "unpin",
    /// A wave began.
    Wave = "wave",
    /// A wave has no members and was skipped.
    WaveSkipped = "wave-skipped",
    /// Refusals are weighed against proofs.
    Weighing = "weighing",
    /// A generation is withheld from a ClamAV version.
    Withheld = "withheld",
}

/// What the subject of an event's records names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject {
    /// An agent, by its name.
    Agent,
    /// The fleet, the mirror, a file, an address: anything else.
    Other,
}

impl AuditEvent {
    /// Every event of a master's log, in the order of their names.
    pub fn of_master() -> impl Iterator<Item = Self> {
        let of_agents = [Self::Accepted, Self::Installed, Self::Keys];
        let events = Self::ALL.iter().copied();
        events.filter(move |event| !of_agents.contains(event))
    }

    /// Whether somebody should look at it.
    pub fn is_alarming(self) -> bool {
        matches!(
            self,
            Self::Abort
                | Self::Alarm
                | Self::BudgetExceeded
                | Self::Halt
                | Self::RolledBack
                | Self::RolloutPaused
                | Self::SetAside
                | Self::Weighing
                | Self::Withheld
        )
    }

    /// Whether a rollout ends with it.
    pub fn ends_a_rollout(self) -> bool {
        matches!(
            self,
            Self::Abort | Self::Halt | Self::Rollback | Self::RolledBack | Self::RolloutComplete
        )
    }

    /// What its subject names.
    pub fn subject(self) -> Subject {
        let is_an_agent = matches!(
            self,
            Self::BudgetExceeded
                | Self::Certificate
                | Self::CountedAgain
                | Self::Declined
                | Self::Drift
                | Self::Enrolled
                | Self::Expired
                | Self::Offer
                | Self::Receipt
                | Self::Repair
                | Self::Revoked
                | Self::SetAside
        );
        match is_an_agent {
            true => Subject::Agent,
            false => Subject::Other,
        }
    }

    /// The event with this name.
    pub fn named(name: &str) -> Option<Self> {
        let mut events = Self::ALL.iter().copied();
        events.find(|event| event.name() == name)
    }
}

impl fmt::Display for AuditEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for AuditEvent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_has_a_name_of_its_own_and_they_are_sorted() {
        let names = AuditEvent::ALL.iter().map(|event| event.name());
        let names: Vec<_> = names.map(|name| name.replace('_', "-")).collect();
        assert!(names.is_sorted_by(|one, next| one < next), "{names:?}");
        for event in AuditEvent::ALL {
            assert_eq!(AuditEvent::named(event.name()), Some(*event));
        }
    }
}
