//! Builds the answers about the fleet: how far a rollout is and what holds it up.
//!
//! Pure: values in, the types of `api` out.

#[cfg(test)]
mod tests;

use std::time::Duration;

use clamcast_daemon::table::printable;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AgentName, FleetName, Position};
use jiff::{SignedDuration, Timestamp};

use super::api::{
    self, Alarm, Current, Expiry, Failed, Generation, GenerationState, GoingBack, HeldUnit, Host,
    Lagging, Owed, Pin, RolloutState, Signatures, Skipped, Status, Wait, Weighing,
};
use crate::fleet::agents::{AWAY, Row};
use crate::fleet::hub::View;
use crate::fleet::rollout::{Ending, Rollout, Run};
use crate::operate::preflight::{CERTIFICATE_ENDS_SOON, Running};
use crate::publish::pipeline::TWO_MASTERS;
use crate::publish::publisher::Refusal;
use crate::publish::withdrawn::Withdrawn;

/// Signatures older than this break the rule that auditors apply.
const SIGNATURES_AUDITED: SignedDuration = SignedDuration::from_hours(7 * 24);

/// What `status` says of the master itself.
#[derive(Debug)]
pub(super) struct Master {
    /// The fleet's name.
    pub fleet: FleetName,
    /// The directories and sockets of the daemon.
    pub daemon: Running,
    /// Why the mirror's databases are not published.
    pub refused: Option<Refusal>,
    /// The units that are held.
    pub held: Vec<HeldUnit>,
    /// Files of the mirror that no generation carries.
    pub skipped: Vec<Skipped>,
    /// Alarms about the master itself.
    pub alarms: Vec<Alarm>,
    /// What commands and the mirror wait for.
    pub waits: Vec<Wait>,
    /// Signatures, or a hold, that are older than this are an alarm.
    pub age_alarm: Duration,
    /// When the master's own certificate expires.
    pub certificate_ends: Timestamp,
}

/// The answer to `status` at `now`. `complete`: the complete generation, if the store still holds it.
pub(super) fn status(
    master: Master,
    view: &View,
    complete: Option<&Manifest>,
    now: Timestamp,
) -> Status {
    let newest = view.current.as_ref().map(|manifest| &***manifest);
    let current = complete.or(newest).map(|manifest| Current {
        published: manifest.into(),
        signatures: signatures(manifest, master.age_alarm, now),
    });
    let ages = ages(current.as_ref(), &master, now);
    let own: Vec<_> = lost_alarm(&view.rollout)
        .into_iter()
        .chain(master.alarms)
        .collect();
    let alarm = own.iter().map(|alarm| &*alarm.text).collect::<Vec<_>>();
    let alarm = (!alarm.is_empty()).then(|| alarm.join("; "));
    let waits: Vec<_> = waits(view, now).into_iter().chain(master.waits).collect();
    let restless = restless(&waits, now);
    let alarms = own
        .into_iter()
        .chain(ages)
        .chain(restless)
        .chain(other_master(view))
        .chain(shared_names(view))
        .chain(budgets(view))
        .chain(alarms(&view.rollout));
    // A disconnected host has not failed, but an operator should know of it.
    let lagging = view
        .rows
        .iter()
        .filter(|row| !row.conformant || !row.connected);
    let lagging = lagging.map(|row| {
        let away = (!row.connected).then(|| AWAY.to_owned());
        Lagging {
            name: row.name.clone(),
            connected: row.connected,
            outcome: row.outcome.clone(),
            since: row.since,
            error: row.error.clone().or(away),
        }
    });
    let expiry = |name: &str, ends: Timestamp| {
        let is_soon = ends.duration_since(now) < CERTIFICATE_ENDS_SOON;
        let name = name.to_owned();
        is_soon.then_some(Expiry { name, ends })
    };
    let own = expiry("master", master.certificate_ends);
    let rows = view.rows.iter();
    let agents = rows.filter_map(|row| expiry(row.name.as_str(), row.certificate_ends));
    Status {
        fleet: master.fleet,
        current,
        daemon: master.daemon,
        refused: master.refused,
        held: master.held,
        skipped: master.skipped,
        alarm,
        alarms: alarms.collect(),
        waits,
        rollout: rollout(view),
        agents: view.counts,
        lagging: lagging.collect(),
        certificates: own.into_iter().chain(agents).collect(),
    }
}

fn signatures(manifest: &Manifest, age_alarm: Duration, now: Timestamp) -> Option<Signatures> {
    let built = manifest.files.iter().filter_map(|file| {
        let container = file.container.as_ref()?;
        Some((
            file.name.base() == "daily",
            container.built?,
            container.version,
            &file.name,
        ))
    });
    let (_, built, version, name) = built.max()?;
    let age = now.duration_since(built);
    let alarm = if age > SIGNATURES_AUDITED {
        Some("7d".to_owned())
    } else {
        (age > span(age_alarm)).then(|| hours(age_alarm))
    };
    Some(Signatures {
        name: name.clone(),
        version,
        built,
        alarm,
    })
}

fn span(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// A duration as it is written in the configuration: `48h`.
fn hours(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds.is_multiple_of(3600) => format!("{}h", seconds / 3600),
        _ => humantime::format_duration(duration).to_string(),
    }
}

/// Alarms about signatures and holds that are too old.
fn ages(current: Option<&Current>, master: &Master, now: Timestamp) -> Vec<Alarm> {
    let age_alarm = master.age_alarm;
    let refused = master.refused.as_ref();
    let from = |since: Timestamp| since.saturating_add(span(age_alarm)).unwrap_or(since);
    let signatures = current.and_then(|current| current.signatures.as_ref());
    let old = signatures.and_then(|it| {
        let (limit, since) = match it.alarm.as_deref()? {
            "7d" => {
                let since = it.built.saturating_add(SIGNATURES_AUDITED);
                ("the 7 days that auditors allow", since.unwrap_or(it.built))
            }
            limit => (limit, from(it.built)),
        };
        Some(Alarm {
            name: "signatures-old".to_owned(),
            text: format!("signatures older than {limit}; does freshclam run on the mirror?"),
            since,
        })
    });
    let refused = refused.filter(|it| now.duration_since(it.since) > span(age_alarm));
    let held = refused.map(|it| Alarm {
        name: "held".to_owned(),
        text: format!("nothing was published for {}: {it}", hours(age_alarm)),
        since: from(it.since),
    });
    let units = master.held.iter();
    let units = units.filter(|it| now.duration_since(it.since) > span(age_alarm));
    let units = units.take(NAMED_MAX).map(|it| Alarm {
        name: "held".to_owned(),
        text: format!(
            "{} is held for more than {}: {}; {}",
            it.unit,
            hours(age_alarm),
            it.reason,
            it.remedy
        ),
        since: from(it.since),
    });
    old.into_iter().chain(held).chain(units).collect()
}

/// An alarm about hosts that follow another master.
fn other_master(view: &View) -> Option<Alarm> {
    let (name, other, _) = view.other_masters.first()?;
    let since = view
        .other_masters
        .iter()
        .map(|(_, _, since)| *since)
        .min()?;
    let more = match view.other_masters.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(Alarm {
        name: TWO_MASTERS.to_owned(),
        text: format!(
            "{name}{more} reported that they follow another master, which published {} (publisher \
             {}), and declined offers; stop one of the two, or raise the epoch with a new key",
            other.position,
            printable(&other.publisher.0)
        ),
        since,
    })
}

/// Alarms about names that two hosts use.
fn shared_names(view: &View) -> impl Iterator<Item = Alarm> {
    view.twins.iter().take(NAMED_MAX).map(|(name, twins)| {
        let [one, other] = twins.addresses;
        Alarm {
            name: "shared-name".to_owned(),
            text: format!(
                "two hosts use the name {name}: {one} and {other}; a cloned machine needs a \
                 certificate of its own (`clamcast-certs agent`), a stolen key needs \
                 `clamcast-certs revoke {name}`"
            ),
            since: twins.since,
        }
    })
}

/// Alarms about agents that exceeded their budget in the audit log.
fn budgets(view: &View) -> impl Iterator<Item = Alarm> {
    view.exceeded.iter().take(NAMED_MAX).map(|(name, exceeded)| Alarm {
        name: "audit-budget".to_owned(),
        text: format!(
            "{name} exceeded its daily budget in the audit log: {} lines were left out, and its \
             receipts stay unacknowledged until {:.0}",
            exceeded.lines, exceeded.until
        ),
        since: exceeded.since,
    })
}

/// A wait for the mirror that lasts longer is an alarm, whatever is waited for.
const RESTLESS_AT_MOST: SignedDuration = SignedDuration::from_hours(1);

/// Alarms about waits for the mirror that lasted too long.
fn restless(waits: &[Wait], now: Timestamp) -> Option<Alarm> {
    let mirror = waits.iter().find(|wait| wait.name == "mirror")?;
    // A run that goes on and on ends by itself only when it pauses for a quarter of an hour.
    let most = mirror
        .since
        .saturating_add(RESTLESS_AT_MOST)
        .unwrap_or(mirror.since);
    let over = mirror.until.map_or(most, |until| until.min(most));
    if over > now {
        return None;
    }
    Some(Alarm {
        name: "mirror-busy".to_owned(),
        text: format!(
            "the mirror has not been quiet since {:.0}: {}; stop the program that changes it",
            mirror.since, mirror.text
        ),
        since: over,
    })
}

/// What the fleet waits for.
fn waits(view: &View, now: Timestamp) -> Vec<Wait> {
    let rollout = &view.rollout;
    let wait = |name: &str, text: String, since, until| Wait {
        name: name.to_owned(),
        text,
        since,
        until,
    };
    let mut waits = Vec::new();
    if let Some((since, until)) = view.reconnecting {
        let text = "no wave begins before nearly all agents that were connected before the start of \
                    the master are back";
        waits.push(wait("rollout", text.to_owned(), since, Some(until)));
    }
    if let Some(run) = rollout.running() {
        let begun = run.begun.last().map_or(run.since, |wave| wave.since);
        let since = run.paused.as_ref().map_or(begun, |pause| pause.since);
        let wave = view.tallies.as_ref().map(|(_, wave)| wave);
        let awaited = wave.into_iter().flat_map(|wave| &wave.waits_for);
        let until = awaited.map(|awaited| awaited.until).max();
        let until = until.filter(|_| run.paused.is_none());
        waits.push(wait("rollout", stands(run, view), since, until));
    }
    if let Some(turn) = view.waiting {
        let running = rollout.running().map(|run| run.target.position);
        let running =
            running.map_or_else(String::new, |at| format!(" until {at} has gone through"));
        let text = format!("{} waits{running}", turn.position);
        waits.push(wait("generation", text, turn.since, turn.until));
    }
    if let Some(owed) = rollout.owed() {
        let text = format!("the databases of {} are published again", owed.to.position);
        let since = rollout.failed().map_or(now, |failed| failed.since);
        waits.push(wait("rollback", text, since, None));
    }
    waits
}

/// One generation in the answer to `generations`.
pub(super) fn generation(
    manifest: &Manifest,
    rollout: &Rollout,
    withdrawn: &Withdrawn,
) -> Generation {
    Generation {
        published: manifest.into(),
        files: manifest.files.clone(),
        state: generation_state(manifest.position(), rollout, withdrawn),
    }
}

fn generation_state(
    position: Position,
    rollout: &Rollout,
    withdrawn: &Withdrawn,
) -> GenerationState {
    let is = |target: Option<Position>| target == Some(position);
    if is(rollout.running().map(|run| run.target.position)) {
        return GenerationState::Running;
    }
    if is(rollout.complete().map(|target| target.position)) {
        return GenerationState::Current;
    }
    if is(rollout.waiting().map(|target| target.position)) {
        return GenerationState::Waiting;
    }
    match withdrawn.of(position).map(|it| it.outcome) {
        Some(Ending::Halted) => GenerationState::Halted,
        Some(Ending::Aborted) => GenerationState::Aborted,
        Some(Ending::RolledBack) => GenerationState::RolledBack,
        None => GenerationState::Superseded,
    }
}

/// The state of the rollout.
pub(super) fn state(rollout: &Rollout) -> RolloutState {
    let taken_back = |how| matches!(how, Ending::Halted | Ending::Aborted);
    match (rollout.running(), rollout.failed()) {
        (Some(run), _) if run.paused.is_some() => RolloutState::Paused,
        (Some(_), _) => RolloutState::Running,
        (None, Some(failed)) if taken_back(failed.how) => RolloutState::Halted,
        (None, _) if rollout.complete().is_some() => RolloutState::Complete,
        (None, _) => RolloutState::None,
    }
}

fn lost_alarm(rollout: &Rollout) -> Option<Alarm> {
    let text = lost(rollout)?;
    let since = rollout.held()?.since;
    let name = "rollout-lost".to_owned();
    Some(Alarm { name, text, since })
}

/// An alarm, if it is not known where the rollout stood.
pub(super) fn lost(rollout: &Rollout) -> Option<String> {
    let is_lost = rollout.held().is_some() && rollout.complete().is_none();
    is_lost.then(|| "nobody is offered anything until `rollout resume`".to_owned())
}

/// Hosts of one kind that `rollout status` names, at most; `agents` has them all.
const NAMED_MAX: usize = 20;

/// A published rollback that some hosts have yet to take.
#[derive(Debug)]
pub(super) struct Back<'a> {
    /// The generation that is taken back.
    from: Position,
    /// The rollback.
    to: Position,
    /// Hosts that install it, or are about to: connected, or awaited after a start of the master.
    pub on_their_way: Vec<&'a Row>,
    /// Hosts that still have what was taken back, and are disconnected or could not go back.
    left: Vec<&'a Row>,
}

/// The last rollback; `None` once every host has taken it.
pub(super) fn going_back(view: &View) -> Option<Back<'_>> {
    let rollout = &view.rollout;
    let (from, to) = (rollout.went_back_from()?, rollout.complete()?.position);
    let has_bad =
        |row: &Row| !row.conformant && row.position.is_some_and(|at| rollout.is_taken_back(at));
    let is_at_it = |row: &Row| {
        let has_offer = view.unsettled.binary_search(&row.name).is_ok();
        row.wanted == Some(to) && (has_offer || row.coming && has_bad(row))
    };
    let (on_their_way, others): (Vec<_>, Vec<_>) = view.rows.iter().partition(|row| is_at_it(row));
    let left: Vec<_> = others.into_iter().filter(|row| has_bad(row)).collect();
    let all_back = on_their_way.is_empty() && left.is_empty();
    (!all_back).then_some(Back {
        from,
        to,
        on_their_way,
        left,
    })
}

/// The rollout, for `status` and `rollout status`.
pub(super) fn rollout(view: &View) -> api::Rollout {
    let rollout = &view.rollout;
    let run = rollout.running();
    let running = run.zip(view.tallies.as_ref());
    let running =
        running.map(|(run, (all, wave))| running_of(view, run, all.clone(), wave.clone()));
    let back = going_back(view);
    let blocking = match (&running, &back) {
        (Some(run), _) => {
            let waits_for = run.waits_for.iter().map(|it| &it.agent);
            let waits_for = waits_for.filter(|it| !run.all.named.contains(it));
            Some(hosts(view, run.all.named.iter().chain(waits_for)))
        }
        (None, Some(back)) => Some(named(&back.on_their_way)),
        (None, None) => None,
    };
    let pins = rollout.pins().iter().map(|(group, pin)| Pin {
        group: group.clone(),
        position: pin.target.position,
        reason: pin.reason.clone(),
        since: pin.since,
    });
    api::Rollout {
        state: state(rollout),
        wave: run.map_or(0, over),
        waves: run.map_or(0, waves),
        complete: rollout.complete().map(|complete| complete.position),
        complete_withheld: rollout.withheld_from_complete().cloned().collect(),
        running,
        blocking,
        set_aside: rollout.set_aside().clone(),
        failed: rollout.failed().map(|failed| Failed {
            position: failed.target.position,
            how: failed.how,
            reason: failed.reason.clone(),
            since: failed.since,
        }),
        owed: rollout.owed().map(|owed| Owed {
            to: owed.to.position,
            of: owed.of.position,
        }),
        going_back: back.map(|back| GoingBack {
            from: back.from,
            to: back.to,
            on_their_way: back.on_their_way.len(),
            left: back.left.len(),
            named: named(&back.left),
        }),
        held: rollout.held().cloned(),
        thin: view.thin.clone(),
        pins: pins.collect(),
    }
}

fn running_of(view: &View, run: &Run, all: api::Tally, this_wave: api::Tally) -> api::Run {
    let last = run.begun.last();
    let deadline = SignedDuration::try_from(view.deadline).unwrap_or(SignedDuration::MAX);
    let weighing = run.weighing.iter().map(|(version, it)| {
        let weighing = Weighing {
            refused: it.refused.clone(),
            since: it.since,
            until: it.since.saturating_add(deadline).unwrap_or(it.since),
        };
        (version.clone(), weighing)
    });
    let waiting = view.rollout.waiting();
    api::Run {
        position: run.target.position,
        skipped: run.skipped.clone(),
        name: last.map(|begun| begun.wave.clone()),
        since: last.map(|begun| begun.since),
        paused: run.paused.clone(),
        waits_for: this_wave.waits_for.clone(),
        all,
        this_wave,
        waits_for_window: run.waits_for_window,
        windows: view.windows.clone(),
        waits_for_group: run.waits_for_group.map(|since| api::AwaitedGroup {
            wave: run.ahead.first().cloned(),
            since,
        }),
        waiting: waiting.map(|waiting| waiting.position),
        weighing: weighing.collect(),
        withheld: run.withheld.clone(),
        stragglers: hosts(view, view.stragglers.iter().take(NAMED_MAX)),
        stragglers_total: view.stragglers.len(),
    }
}

fn named(rows: &[&Row]) -> Vec<Host> {
    let rows = rows.iter().take(NAMED_MAX);
    rows.map(|row| Host::from(*row)).collect()
}

fn hosts<'a>(view: &View, names: impl Iterator<Item = &'a AgentName>) -> Vec<Host> {
    let rows = names.filter_map(|name| row_of(view, name));
    rows.map(Host::from).collect()
}

fn row_of<'a>(view: &'a View, name: &AgentName) -> Option<&'a Row> {
    let index = view.rows.binary_search_by(|row| row.name.cmp(name)).ok()?;
    Some(&view.rows[index])
}

/// Why a published generation is not the target of the whole fleet; `None` if it is.
pub(super) fn obstacle(view: &View, position: Position) -> Option<String> {
    if view.counts.total == 0 {
        return None; // there is nobody to have it
    }
    let rollout = &view.rollout;
    let failed = rollout.failed();
    if let Some(failed) = failed.filter(|failed| failed.target.position == position) {
        let how = failed.how;
        return Some(format!("{position} was {how}: {}", failed.reason));
    }
    let running = rollout.running();
    if let Some(run) = running.filter(|run| run.target.position == position) {
        return Some(stands(run, view));
    }
    if rollout.waiting().map(|target| target.position) == Some(position) {
        let target = running?.target.position;
        return Some(format!(
            "{position} waits until {target} has gone through the fleet"
        ));
    }
    if rollout.complete().map(|target| target.position) >= Some(position) {
        return None;
    }
    Some(match rollout.owed() {
        Some(owed) => format!(
            "{position} is not offered: the databases of {} are published again first",
            owed.to.position
        ),
        None => format!("{position} is not offered any more: another one took its place"),
    })
}

/// What `rollout status` waits for, if it waits for anything.
pub(super) fn standing(view: &View) -> Option<String> {
    let rollout = &view.rollout;
    if let Some(run) = rollout.running() {
        return Some(stands(run, view));
    }
    if let Some(owed) = rollout.owed() {
        let (to, of) = (owed.to.position, owed.of.position);
        return Some(format!(
            "the databases of {to} are to be published again, in the place of {of}"
        ));
    }
    let back = going_back(view).filter(|back| !back.on_their_way.is_empty());
    back.map(|back| {
        let (from, to) = (back.from, back.to);
        let hosts = match back.on_their_way.len() {
            1 => "1 host is".to_owned(),
            hosts => format!("{hosts} hosts are"),
        };
        format!("{to} takes the place of {from}, and {hosts} on the way to it")
    })
    .or_else(|| lost(rollout))
}

/// Alarms about hosts that are set aside and versions that are left out, by name.
fn alarms(rollout: &Rollout) -> Vec<Alarm> {
    let set_aside = rollout.set_aside().iter().map(|(host, it)| Alarm {
        name: "set-aside".to_owned(),
        text: format!(
            "{host} is set aside: {}; its refusals do not count until it proves a generation live, \
             or `rollout restore {host}`",
            it.reason
        ),
        since: it.since,
    });
    let run = rollout.running();
    let withheld = run.into_iter().flat_map(|run| {
        run.withheld.iter().map(|(version, it)| Alarm {
            name: "withheld".to_owned(),
            text: format!(
                "{} is withheld from hosts with {version}: {}",
                run.target.position, it.reason
            ),
            since: it.since,
        })
    });
    let weighing = run.into_iter().flat_map(|run| {
        run.weighing.iter().map(|(version, it)| {
            let refused: Vec<_> = it.refused.iter().map(AgentName::as_str).collect();
            Alarm {
                name: "weighing".to_owned(),
                text: format!(
                    "{} refused {}: no further host is offered it until the other hosts with \
                     {version} have answered",
                    refused.join(", "),
                    run.target.position
                ),
                since: it.since,
            }
        })
    });
    set_aside.chain(withheld).chain(weighing).collect()
}

/// Some of the agents that `rollout status` waits for.
pub(super) fn waited(view: &View) -> Vec<AgentName> {
    if let Some((_, wave)) = &view.tallies {
        return wave.waits_for.iter().map(|it| it.agent.clone()).collect();
    }
    let back = going_back(view);
    let rows = back.iter().flat_map(|back| &back.on_their_way);
    rows.take(NAMED_MAX).map(|row| row.name.clone()).collect()
}

fn stands(run: &Run, view: &View) -> String {
    let wave = view.tallies.as_ref().map(|(_, wave)| wave);
    let position = run.target.position;
    if let Some(pause) = &run.paused {
        let before = pause.before.as_ref();
        let before = before.map(|it| format!(", and by itself before: {}", it.reason));
        let before = before.unwrap_or_default();
        return format!("{position} is paused: {}{before}", pause.reason);
    }
    if let (Some(_), Some(wave)) = (run.waits_for_group, run.ahead.first()) {
        return format!("{position} waits: no host of wave {wave} is connected");
    }
    if run.waits_for_window {
        return format!(
            "{position} waits: the next wave begins when a window of its members opens: {}",
            view.windows.join("; ")
        );
    }
    let (Some(begun), Some(wave)) = (run.begun.last(), wave) else {
        return format!("{position} waits for the first wave to begin");
    };
    format!(
        "{position} is not through: {} of {} are live with it in wave {} of {} ({})",
        wave.live,
        wave.members,
        over(run),
        waves(run),
        begun.wave
    )
}

/// Waves that have begun or were skipped.
fn over(run: &Run) -> usize {
    run.begun.len() + run.skipped.len()
}

fn waves(run: &Run) -> usize {
    over(run) + run.ahead.len()
}
