//! Weighs refusals against proofs, among the members of one ClamAV version: a lone host that refuses
//! what others of its version have proven neither stops nor misleads a rollout.

use std::collections::{BTreeMap, BTreeSet};

use clamcast_proto::{AgentName, Position};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::run::{Participant, Regard, Run, due};
use super::{Answer, Rules};

/// Proofs that it takes to overrule a refusal: one lying host must not vouch for a bad generation.
const PROOFS_MIN: usize = 2;

/// Hosts of a version that must be left to judge a generation while others of it are set aside.
const JUDGES_MIN: usize = 2;

/// Rollouts in a row that set a host aside before the next one begins with it set aside.
const ROLLOUTS_IN_A_ROW: u32 = 2;

/// What the members of one version say of a generation.
#[derive(Debug, Default)]
pub(super) struct Votes<'a> {
    /// Members whose real clamd has proven it.
    pub(super) proofs: usize,
    /// Members that refused it, also those that this rollout has set aside.
    refusals: usize,
    /// Members that may still answer, connected or not.
    pub(super) pending: usize,
    /// Those that refused it and are not set aside.
    pub(super) refused: BTreeSet<&'a AgentName>,
}

/// What follows from the votes of one version.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Judgement {
    /// Members may still answer, and their answers decide.
    Open,
    /// The proofs outweigh the refusals: the hosts that refused are set aside.
    Proven,
    /// They do not: no further host of this version is offered it.
    Refused,
}

impl Votes<'_> {
    /// Decides. `overdue`: refusals that may still come are not waited for any more; proofs that may
    /// still come are, as long as their hosts have time.
    pub(super) fn judge(&self, overdue: bool) -> Judgement {
        let outweighs = |proofs, refusals| proofs >= PROOFS_MIN && proofs > refusals;
        let refusals = self.refusals + if overdue { 0 } else { self.pending };
        if outweighs(self.proofs, refusals) {
            Judgement::Proven
        } else if outweighs(self.proofs + self.pending, self.refusals) {
            Judgement::Open
        } else {
            Judgement::Refused
        }
    }
}

impl Run {
    /// The votes of each version. A refusal counts also where the wave of its host is still to come
    /// and an operator has forced the generation on the host.
    pub(super) fn votes<'a>(
        &self,
        subject: &[Participant<'a>],
        rules: &Rules,
        now: Timestamp,
    ) -> BTreeMap<&'a str, Votes<'a>> {
        let mut votes: BTreeMap<&str, Votes<'_>> = BTreeMap::new();
        for agent in subject {
            let (wave, member) = (agent.wave, &agent.member);
            let refused = member.answer == Some(Answer::Refused);
            if !refused && (wave.is_none() || !agent.may || agent.regard != Regard::Counted) {
                continue;
            }
            let votes = votes.entry(member.version).or_default();
            match (member.answer, agent.regard) {
                (Some(Answer::Refused), _) if wave.is_none() && member.offered.is_none() => {}
                (Some(Answer::Refused), Regard::Counted) => {
                    votes.refusals += 1;
                    votes.refused.insert(member.name);
                }
                (Some(Answer::Refused), Regard::SetAsideNow) => votes.refusals += 1,
                // A host that was not offered it proves nothing.
                (Some(Answer::Live { proven: true }), _) => {
                    votes.proofs += usize::from(member.offered.is_some());
                }
                // clamd may still prove what is on the disk.
                (None | Some(Answer::Installed), _) => {
                    let wave = &self.begun[wave.expect("others are passed over")];
                    let has_it = member.offered.is_some() || !self.is_withheld_from(member);
                    let may_answer = has_it && self.was_connected(member, wave, now);
                    let in_time = now < due(member, wave, rules);
                    votes.pending += usize::from(may_answer && in_time);
                }
                (Some(Answer::Live { .. } | Answer::Refused | Answer::Unwell), _) => {}
            }
        }
        votes
    }
}

/// A host whose refusals do not count.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct SetAside {
    /// The generation that it refused last, against the proofs of others; none if an operator has
    /// set it aside.
    pub refused: Option<Position>,
    /// Rollouts in a row that have set it aside.
    pub rollouts: u32,
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
}

impl SetAside {
    /// How the rollout of a generation regards the host. `judges`: connected hosts of its version
    /// that are not set aside.
    pub(super) fn regard(&self, running: Position, judges: usize) -> Regard {
        match self.refused {
            None => Regard::SetAside,
            Some(refused) if refused == running => Regard::SetAsideNow,
            Some(_) if self.rollouts >= ROLLOUTS_IN_A_ROW && judges >= JUDGES_MIN => {
                Regard::SetAside
            }
            Some(_) => Regard::Counted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(proofs: usize, refusals: usize, pending: usize, in_time: Judgement, late: Judgement) {
        let votes = Votes {
            proofs,
            refusals,
            pending,
            ..Votes::default()
        };
        assert_eq!((votes.judge(false), votes.judge(true)), (in_time, late));
    }

    #[test]
    fn refusals_are_overruled_by_more_and_at_least_two_proofs() {
        use Judgement::{Proven, Refused};
        check(0, 1, 0, Refused, Refused); // one member: its refusal decides
        check(1, 1, 0, Refused, Refused);
        check(1, 0, 0, Refused, Refused);
        check(2, 1, 0, Proven, Proven);
        check(2, 2, 0, Refused, Refused);
        check(3, 2, 0, Proven, Proven);
    }

    #[test]
    fn a_judgement_does_not_wait_for_answers_that_cannot_change_it() {
        use Judgement::{Open, Proven, Refused};
        check(0, 1, 2, Open, Open);
        check(1, 1, 1, Open, Open);
        check(2, 1, 1, Open, Proven);
        check(3, 1, 1, Proven, Proven);
        check(0, 2, 1, Refused, Refused);
        check(0, 1, 1, Refused, Refused);
    }
}
