//! How far a rollout is and what holds it up, for operators and scripts.

use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AgentName, Position};
use serde_json::{Map, Value, json};

use crate::hub::View;
use crate::publish::Rejected;
use crate::rollout::{Ending, Rollout, Run};

/// Where the rollout is, in one word.
pub fn state(rollout: &Rollout) -> &'static str {
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
pub fn lost(rollout: &Rollout) -> Option<String> {
    let is_lost = rollout.held().is_some() && rollout.complete().is_none();
    is_lost.then(|| "nobody is offered anything until `rollout resume`".to_owned())
}

/// What `status` and `rollout status` say of it.
pub fn rollout(view: &View) -> Value {
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
            let waited = wave.waited.iter().filter(|it| !all.named.contains(it));
            let blocking = all.named.iter().chain(waited);
            set(
                "blocking",
                blocking.map(|name| row_of(view, name)).collect(),
            );
        }
        if let Some(waiting) = rollout.waiting() {
            set("waiting", json!(waiting.position));
        }
    }
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
    if let Some(held) = rollout.held() {
        set("held", json!(held));
    }
    let untried = view
        .untried
        .iter()
        .map(|(version, hosts, one)| json!({ "version": version, "hosts": hosts, "one": one }));
    set("untried", untried.collect());
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
fn row_of(view: &View, name: &AgentName) -> Value {
    let row = view.rows.iter().find(|row| row.name == *name);
    let (outcome, error) = row.map(|row| (&row.outcome, &row.error)).unzip();
    json!({ "name": name, "outcome": outcome, "error": error.and_then(Option::as_ref) })
}

/// What became of a generation.
pub fn state_of(manifest: &Manifest, rollout: &Rollout, rejected: &[Rejected]) -> &'static str {
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
    let rejected = rejected.iter().find(|it| it.position == position);
    match rejected.map(|it| it.outcome.as_str()) {
        Some("halted") => "halted",
        Some("aborted") => "aborted",
        Some(_) => "rolled_back",
        None => "superseded",
    }
}

/// Why a generation that was published is not what everybody is wanted at, if it is not.
pub fn obstacle(view: &View, position: Position) -> Option<String> {
    if view.counts.total == 0 {
        return None; // there is nobody to have it
    }
    let rollout = &view.rollout;
    let failed = rollout.failed();
    if let Some(failed) = failed.filter(|failed| failed.target.position == position) {
        let how = failed.how.word();
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

/// Where the generation stands that goes through the waves, if one does.
pub fn standing(view: &View) -> Option<String> {
    let run = view.rollout.running()?;
    Some(stands(run, view))
}

fn stands(run: &Run, view: &View) -> String {
    let wave = view.tallies.as_ref().map(|(_, wave)| wave);
    let position = run.target.position;
    if let Some(pause) = &run.paused {
        return format!("{position} is paused: {}", pause.reason);
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
