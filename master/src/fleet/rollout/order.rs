//! What operators order about a rollout.

use std::collections::BTreeSet;

use clamcast_proto::{AgentName, AuditEvent, GroupName, Position};
use jiff::Timestamp;

use super::{
    Agents, Effect, Ending, Failed, Held, Member, Owed, PauseKind, Pin, Rollout, Rules, Run,
    SetAside, Target, counted_again, note, set_aside,
};

/// Groups that are pinned at a time: their reasons are part of the one state that is kept.
pub const PINS_MAX: usize = 100;

/// What an operator orders.
#[derive(Clone, Debug)]
pub enum Order {
    /// Begin no further wave and offer nothing more.
    Pause(String),
    /// Go on.
    Resume(Option<String>),
    /// End the running generation, as a halt does.
    Abort(String),
    /// Begin all waves that are still to come.
    Promote(String),
    /// Let what waits take the place of the running generation.
    Supersede,
    /// Publish these databases again, in the place of what is current.
    RollBack(Target, String),
    /// Keep a group at a generation, or where it is wanted now.
    Pin(GroupName, Option<Target>, Option<String>),
    /// Let a group go with everybody else again.
    Unpin(GroupName, Option<String>),
    /// Do not count the refusals of a host until it is restored.
    SetAside(AgentName, String),
    /// Count the refusals of a host again.
    Restore(AgentName, Option<String>),
}

/// An order that cannot be carried out.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum OrderError {
    /// Nothing is on its way.
    #[error("no rollout is running{}", complete.map(|target| format!("; everybody is wanted at {}", target.position)).unwrap_or_default())]
    Idle {
        /// What everybody is wanted at.
        complete: Option<Target>,
    },
    /// Nothing waits.
    #[error("no generation waits for its turn")]
    NothingWaits,
    /// It is not paused.
    #[error("the rollout of {0} is not paused")]
    NotPaused(Position),
    /// An operator has paused it; whose reason counts must not depend on who came last.
    #[error(
        "the rollout of {position} is paused since {since:.0}: {reason}; `rollout resume` first"
    )]
    Paused {
        /// What is on its way.
        position: Position,
        /// Why it is paused.
        reason: String,
        /// Since when.
        since: Timestamp,
    },
    /// Agents never go back.
    #[error(
        "{agent} is at {at} already, and agents never go back to a lower number: `rollback` publishes the old databases under a new one"
    )]
    Past {
        /// Who.
        agent: AgentName,
        /// Where it is.
        at: Position,
    },
    /// It is not to be offered to anybody.
    #[error("{0} was halted, aborted or rolled back, and nobody is offered it any more")]
    TakenBack(Position),
    /// Too many are.
    #[error("{PINS_MAX} groups are pinned, more cannot be; `unpin` one first")]
    TooManyPins,
    /// Nothing is pinned.
    #[error("group `{0}` is not pinned")]
    NotPinned(GroupName),
    /// It is not what everybody could have by now.
    #[error(
        "{0} has not gone through the fleet yet: wait until it has (`rollout status`), or pin one that everybody has"
    )]
    NotThrough(Position),
    /// Something newer took its place.
    #[error(
        "{0} never went through the fleet, and a rollback goes to everybody at once: choose one that did (`generations`), or let the mirror bring its databases again"
    )]
    Unproven(Position),
    /// Some of the group have what is on its way, and some have not.
    #[error(
        "{agent} and others of group `{group}` are at {at}, which is on its way, and the others are not: wait until it has gone through, or `rollout abort`"
    )]
    Split {
        /// The group.
        group: GroupName,
        /// One that has it.
        agent: AgentName,
        /// Where that one is.
        at: Position,
    },
    /// No agent has this name.
    #[error("no agent `{0}` is enrolled; `agents` lists all")]
    NotEnrolled(AgentName),
    /// It is set aside by an operator already.
    #[error("`{0}` is set aside already; `rollout restore {0}` ends that")]
    SetAside(AgentName),
    /// It is not set aside.
    #[error("`{0}` is not set aside; `rollout status` lists the hosts that are")]
    NotSetAside(AgentName),
    /// It is what is on its way.
    #[error("{0} is on its way already; `rollout promote` brings it to everybody at once")]
    OnItsWay(Position),
    /// That is where everybody is wanted.
    #[error("{0} is what everybody is wanted at")]
    Current(Position),
}

impl Rollout {
    /// Carries out what an operator orders.
    pub fn order(
        &mut self,
        order: Order,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        match order {
            Order::Pause(reason) => self.pause(reason, now),
            Order::Resume(reason) => self.resume(reason, agents, rules, now),
            Order::Abort(reason) => self.abort(reason, agents, rules, now),
            Order::Promote(reason) => self.promote(reason, now),
            Order::Supersede => {
                let waiting = self.waiting.ok_or(OrderError::NothingWaits)?;
                self.is_not_frozen()?;
                Ok(self.begin(waiting, rules, now))
            }
            Order::RollBack(to, reason) => self.roll_back(to, reason, agents, now),
            Order::Pin(group, Some(target), reason) => {
                self.pin_group(group, target, reason, agents, now)
            }
            Order::Pin(group, None, reason) => {
                let target = self.common(&group, agents)?;
                self.pin_group(group, target, reason, agents, now)
            }
            Order::Unpin(group, reason) => self.unpin_group(&group, reason),
            Order::SetAside(host, reason) => self.set_host_aside(host, reason, agents, now),
            Order::Restore(host, reason) => self.restore_host(&host, reason),
        }
    }

    /// Begins no further wave and offers nothing more, until [`Rollout::resume`]: also where what it
    /// has paused for by itself is over before that.
    pub fn pause(&mut self, reason: String, now: Timestamp) -> Result<Vec<Effect>, OrderError> {
        self.is_not_frozen()?;
        let run = self.run()?;
        Ok(run.pause(PauseKind::Operator, reason, now))
    }

    /// Goes on, with the agents that have trouble now; and publishes again after a rollback.
    pub fn resume(
        &mut self,
        reason: Option<String>,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        let reason = reason.unwrap_or_else(|| "by an operator".to_owned());
        if self.held.take().is_some() {
            let known = self.complete.or(self.owed.as_ref().map(|owed| owed.to));
            let resumed = known.map(|known| {
                let reason = format!("the mirror is published again: {reason}");
                note(AuditEvent::RolloutResumed, known, reason)
            });
            return Ok(resumed.into_iter().chain([Effect::Look]).collect());
        }
        let subject = self.subject(agents, rules, now);
        let run = self.run()?;
        let Some(pause) = run.paused.take() else {
            return Err(OrderError::NotPaused(run.target.position));
        };
        run.unwell_seen = run.tally(&subject, run.begun.last(), rules, now).unwell;
        run.goes_on(&pause, now);
        Ok(vec![note(AuditEvent::RolloutResumed, run.target, reason)])
    }

    /// Ends the running generation, as a halt does.
    pub fn abort(
        &mut self,
        reason: String,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        self.run()?;
        Ok(self.end(Ending::Aborted, reason.into(), agents, rules, now))
    }

    /// An operator's pause ends with [`Rollout::resume`] only.
    fn is_not_frozen(&self) -> Result<(), OrderError> {
        let Some(run) = &self.running else {
            return Ok(());
        };
        match run.frozen() {
            Some(pause) => Err(OrderError::Paused {
                position: run.target.position,
                reason: pause.reason.clone(),
                since: pause.since,
            }),
            None => Ok(()),
        }
    }

    /// Makes one wave of everybody, in the place of those that have begun and are still to come.
    pub fn promote(&mut self, reason: String, now: Timestamp) -> Result<Vec<Effect>, OrderError> {
        self.is_not_frozen()?;
        let run = self.run()?;
        run.promote(now);
        Ok(vec![note(AuditEvent::Promoted, run.target, reason)])
    }

    /// Takes the current generation away: the databases of `to` are to be published again, and
    /// nothing else until [`Rollout::resume`].
    pub fn roll_back(
        &mut self,
        to: Target,
        reason: String,
        agents: &impl Agents,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        let Some(complete) = self.complete else {
            return Err(OrderError::Idle { complete: None });
        };
        if self.is_taken_back(to.position) {
            return Err(OrderError::TakenBack(to.position));
        }
        if self.passed_over.contains(&to.position) || self.waiting == Some(to) {
            return Err(OrderError::Unproven(to.position));
        }
        let running = self.running.as_ref().map(|run| run.target);
        if running.is_some_and(|running| running.content == to.content) {
            return Err(OrderError::OnItsWay(to.position));
        }
        let mut effects = Vec::new();
        let of = match self.running.take() {
            Some(run) => run.target,
            None => {
                // Where a halt took nobody back, those who are past it are to come.
                let all = agents.members(None);
                let ahead = all.iter().filter_map(|it| it.at).max();
                if complete.content == to.content && ahead <= Some(complete.position) {
                    return Err(OrderError::Current(complete.position));
                }
                match self.failed.as_ref().map(|failed| failed.target) {
                    Some(failed)
                        if failed.position > complete.position
                            && ahead >= Some(failed.position) =>
                    {
                        failed
                    }
                    Some(_) | None => complete,
                }
            }
        };
        let how = Ending::RolledBack;
        for target in [of, complete] {
            if target.content != to.content {
                self.withdraw(target, how, BTreeSet::new(), now);
                effects.push(Effect::Withdrawn {
                    target,
                    how,
                    back_to: Some(to),
                });
                let same = |pin: &Pin| pin.target.content == target.content;
                effects.extend(self.unpin_all(same, "its generation was taken back"));
            }
        }
        self.withdraw(of, how, BTreeSet::new(), now);
        let gone = |pin: &Pin| pin.target.position == of.position;
        effects.extend(self.unpin_all(gone, "its generation was taken back"));
        effects.dedup();
        let waited = self.waiting.take();
        self.pass_over(waited);
        self.failed = Some(Failed {
            target: of,
            how,
            reason: reason.clone(),
            since: now,
        });
        self.held = Some(Held {
            reason: format!("rolled back to the databases of {}: {reason}", to.position),
            since: now,
        });
        self.owed = Some(Owed { to, of });
        effects.push(note(AuditEvent::RolledBack, of, reason));
        Ok(effects)
    }

    /// Where all of a group are: what everybody has, or what is on its way if all of them have it.
    fn common(&self, group: &GroupName, agents: &impl Agents) -> Result<Target, OrderError> {
        let complete = self.complete;
        let running = self.running.as_ref().map(|run| run.target);
        let members = agents.members(None);
        let of_group = || members.iter().filter(|it| it.groups.contains(group));
        let past = |it: &&Member<'_>| it.at > complete.map(|target| target.position);
        let Some(ahead) = of_group().find(past) else {
            return complete.ok_or(OrderError::Idle { complete });
        };
        let running = running.ok_or(OrderError::Idle { complete })?;
        if of_group().all(|it| it.at == Some(running.position)) {
            return Ok(running);
        }
        Err(OrderError::Split {
            group: group.clone(),
            agent: ahead.name.clone(),
            at: running.position,
        })
    }

    /// Keeps a group at `target`: one that everybody could have, or that all of the group have.
    pub fn pin_group(
        &mut self,
        group: GroupName,
        target: Target,
        reason: Option<String>,
        agents: &impl Agents,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        if self.pins.len() >= PINS_MAX && !self.pins.contains_key(&group) {
            return Err(OrderError::TooManyPins);
        }
        if self.is_taken_back(target.position) {
            return Err(OrderError::TakenBack(target.position));
        }
        let members = agents.members(None);
        let of_group = || members.iter().filter(|it| it.groups.contains(&group));
        let past = of_group().filter_map(|member| {
            Some((member.name, member.at.filter(|at| *at > target.position)?))
        });
        if let Some((agent, at)) = past.max_by_key(|(_, at)| *at) {
            return Err(OrderError::Past {
                agent: agent.clone(),
                at,
            });
        }
        let through = self
            .complete
            .is_some_and(|it| it.position >= target.position);
        if !through && !of_group().all(|it| it.at == Some(target.position)) {
            return Err(OrderError::NotThrough(target.position)); // the waves are not to be got round
        }
        let text = format!(
            "group {group}{}",
            reason
                .as_ref()
                .map(|reason| format!(": {reason}"))
                .unwrap_or_default()
        );
        self.pins.insert(
            group,
            Pin {
                target,
                reason,
                since: now,
            },
        );
        Ok(vec![note(AuditEvent::Pin, target, text)])
    }

    /// Lets a group go with everybody else again.
    pub fn unpin_group(
        &mut self,
        group: &GroupName,
        reason: Option<String>,
    ) -> Result<Vec<Effect>, OrderError> {
        let pin = self
            .pins
            .remove(group)
            .ok_or_else(|| OrderError::NotPinned(group.clone()))?;
        let reason = reason
            .map(|reason| format!(": {reason}"))
            .unwrap_or_default();
        Ok(vec![note(
            AuditEvent::Unpin,
            pin.target,
            format!("group {group}{reason}"),
        )])
    }

    /// Does not count the refusals of a host until [`Rollout::restore_host`].
    pub fn set_host_aside(
        &mut self,
        host: AgentName,
        reason: String,
        agents: &impl Agents,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        if !agents.is_enrolled(&host) {
            return Err(OrderError::NotEnrolled(host));
        }
        let before = self.set_aside.get(&host);
        if before.is_some_and(|before| before.refused.is_none()) {
            return Err(OrderError::SetAside(host));
        }
        let effect = set_aside(&host, None, reason.clone());
        let set_aside = SetAside {
            refused: None,
            rollouts: before.map_or(0, |before| before.rollouts),
            reason,
            since: now,
        };
        self.set_aside.insert(host, set_aside);
        Ok(vec![effect])
    }

    /// Counts the refusals of a host again.
    pub fn restore_host(
        &mut self,
        host: &AgentName,
        reason: Option<String>,
    ) -> Result<Vec<Effect>, OrderError> {
        if self.set_aside.remove(host).is_none() {
            return Err(OrderError::NotSetAside(host.clone()));
        }
        let reason = reason.unwrap_or_else(|| "by an operator".to_owned());
        Ok(vec![counted_again(host, None, reason)])
    }

    fn run(&mut self) -> Result<&mut Run, OrderError> {
        let complete = self.complete;
        self.running.as_mut().ok_or(OrderError::Idle { complete })
    }
}
