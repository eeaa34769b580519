//! How far a rollout is and what holds it up, for operators and scripts.

use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AgentName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::fleet::agents::Row;
use crate::fleet::hub::View;
use crate::fleet::rollout::{Ending, Rollout, Run};
use crate::publish::withdrawn::Withdrawn;

/// Where the rollout is, in one word.
pub(super) fn state(rollout: &Rollout) -> &'static str {
    let taken_back = |how| matches!(how, Ending::Halted | Ending::Aborted);
    match (rollout.running(), rollout.failed()) {
        (Some(run), _) if run.paused.is_some() => "paused",
        (Some(_), _) => "running",
        (None, Some(failed)) if taken_back(failed.how) => "halted",
        (None, _) if rollout.complete().is_some() => "complete",
        (None, _) => "none",
    }
}

/// An alarm, if it is not known where the rollout stood.
pub(super) fn lost(rollout: &Rollout) -> Option<String> {
    let is_lost = rollout.held().is_some() && rollout.complete().is_none();
    is_lost.then(|| "nobody is offered anything until `rollout resume`".to_owned())
}

/// Hosts of one kind that `rollout status` names, at most; `agents` has them all.
const NAMED_MAX: usize = 20;

/// A rollback that is not at everybody yet.
#[derive(Debug)]
pub(super) struct Back<'a> {
    /// What it takes away.
    from: Position,
    /// The rollback.
    to: Position,
    /// Who is at work on it, or about to be: connected, or waited for after a start of the master.
    pub on_their_way: Vec<&'a Row>,
    /// Who still has what was taken back, and is away or could not go back.
    left: Vec<&'a Row>,
}

/// Where a rollback is that was published: nothing where everybody is back.
pub(super) fn going_back(view: &View) -> Option<Back<'_>> {
    let rollout = &view.rollout;
    let (from, to) = (rollout.went_back_from()?, rollout.complete()?.position);
    let has_bad = |row: &Row| {
        let at = row.position();
        !row.conformant && at.is_some_and(|at| rollout.is_taken_back(at))
    };
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

/// What `status` and `rollout status` say of it.
pub(super) fn rollout(view: &View) -> Value {
    let rollout = &view.rollout;
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| {
        fields.insert(key.to_owned(), value);
    };
    set("state", state(rollout).into());
    let run = rollout.running();
    set("wave", run.map_or(0, over).into());
    set(
        "waves",
        run.map_or(0, |run| over(run) + run.ahead.len()).into(),
    );
    if let Some(complete) = rollout.complete() {
        set("complete", json!(complete.position));
    }
    if let Some(run) = run {
        set("running", json!(run.target.position));
        set("skipped", json!(run.skipped));
        set("waits_for_window", run.waits_for_window.into());
        set("windows", json!(view.windows));
        let last = run.begun.last();
        set("name", json!(last.map(|begun| &begun.wave)));
        set("since", json!(last.map(|begun| begun.since)));
        if let Some(pause) = &run.paused {
            set("paused", json!(pause));
        }
        if let Some((all, wave)) = &view.tallies {
            set("all", json!(all));
            set("this_wave", json!(wave));
            set("waits_for", json!(wave.waits_for));
            let waits_for = wave.waits_for.iter().map(|it| &it.agent);
            let waits_for = waits_for.filter(|it| !all.named.contains(it));
            let blocking = all.named.iter().chain(waits_for);
            let blocking = blocking.filter_map(|name| row_of(view, name));
            set("blocking", blocking.map(said).collect());
        }
        if let Some(waiting) = rollout.waiting() {
            set("waiting", json!(waiting.position));
        }
        if let Some(since) = run.waits_for_group {
            set(
                "waits_for_group",
                json!({ "wave": run.ahead.first(), "since": since }),
            );
        }
        let deadline = SignedDuration::try_from(view.deadline).unwrap_or(SignedDuration::MAX);
        let weighing = run.weighing.iter().map(|(version, it)| {
            let until = it.since.saturating_add(deadline).unwrap_or(it.since);
            let weighing = json!({ "refused": it.refused, "since": it.since, "until": until });
            (version.clone(), weighing)
        });
        set("weighing", Value::Object(weighing.collect()));
        set("withheld", json!(run.withheld));
        let stragglers = view.stragglers.iter().take(NAMED_MAX);
        let stragglers = stragglers.filter_map(|name| row_of(view, name));
        set("stragglers", stragglers.map(said).collect());
        set("stragglers_total", view.stragglers.len().into());
    }
    let from_complete: Vec<_> = rollout.withheld_from_complete().collect();
    if !from_complete.is_empty() {
        set("complete_withheld", json!(from_complete));
    }
    set("set_aside", json!(rollout.set_aside()));
    if let Some(failed) = rollout.failed() {
        let position = failed.target.position;
        set(
            "failed",
            json!({
                "epoch": position.epoch, "generation": position.generation,
                "how": failed.how, "reason": failed.reason, "since": failed.since,
            }),
        );
    }
    if let Some(owed) = rollout.owed() {
        let (to, of) = (owed.to.position, owed.of.position);
        set("owed", json!({ "to": to, "of": of }));
    }
    if let Some(back) = going_back(view) {
        let said = |rows: &[&Row]| -> Value {
            let named = rows.iter().take(NAMED_MAX);
            named.map(|row| said(row)).collect()
        };
        set(
            "going_back",
            json!({
                "from": back.from, "to": back.to,
                "on_their_way": back.on_their_way.len(), "left": back.left.len(),
                "named": said(&back.left),
            }),
        );
        if run.is_none() {
            set("blocking", said(&back.on_their_way));
        }
    }
    if let Some(held) = rollout.held() {
        set("held", json!(held));
    }
    set("thin", json!(view.thin));
    let pins = rollout.pins().iter().map(|(group, pin)| {
        let position = pin.target.position;
        json!({
            "group": group, "epoch": position.epoch, "generation": position.generation,
            "reason": pin.reason, "since": pin.since,
        })
    });
    set("pins", pins.collect());
    Value::Object(fields)
}

/// Where a host stands, and what it says.
fn said(row: &Row) -> Value {
    json!({ "name": row.name, "outcome": row.outcome, "error": row.error })
}

fn row_of<'a>(view: &'a View, name: &AgentName) -> Option<&'a Row> {
    let index = view.rows.binary_search_by(|row| row.name.cmp(name)).ok()?;
    Some(&view.rows[index])
}

/// What became of a generation.
pub(super) fn state_of(
    manifest: &Manifest,
    rollout: &Rollout,
    withdrawn: &Withdrawn,
) -> &'static str {
    let position = manifest.position();
    let is = |target: Option<Position>| target == Some(position);
    if is(rollout.running().map(|run| run.target.position)) {
        return "running";
    }
    if is(rollout.complete().map(|target| target.position)) {
        return "current";
    }
    if is(rollout.waiting().map(|target| target.position)) {
        return "waiting";
    }
    match withdrawn.of(position).map(|it| it.outcome) {
        Some(Ending::Halted) => "halted",
        Some(Ending::Aborted) => "aborted",
        Some(Ending::RolledBack) => "rolled_back",
        None => "superseded",
    }
}

/// Why a generation that was published is not what everybody is wanted at, if it is not.
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
pub(super) fn alarms(rollout: &Rollout) -> Vec<Alarm> {
    let set_aside = rollout.set_aside().iter().map(|(host, it)| Alarm {
        name: "set-aside",
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
            name: "withheld",
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
                name: "weighing",
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

/// Something that an operator should look at.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Alarm {
    /// What kind.
    pub name: &'static str,
    /// On which object, why, and the next step.
    pub text: String,
    /// Since when.
    pub since: Timestamp,
}

/// Some of those that `rollout status` waits for.
pub(super) fn waited(view: &View) -> Vec<&AgentName> {
    if let Some((_, wave)) = &view.tallies {
        return wave.waits_for.iter().map(|it| &it.agent).collect();
    }
    let back = going_back(view);
    let rows = back.iter().flat_map(|back| &back.on_their_way);
    rows.take(NAMED_MAX).map(|row| &row.name).collect()
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
        over(run) + run.ahead.len(),
        begun.wave
    )
}

/// Waves that have begun or were passed over.
fn over(run: &Run) -> usize {
    run.begun.len() + run.skipped.len()
}
