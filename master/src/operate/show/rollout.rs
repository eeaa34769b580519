//! Renders the rollout: how far it is, who holds it up, and what is pinned.

use clamcast_daemon::say;
use clamcast_daemon::table::{Table, terminal_width};
use clamcast_proto::AgentName;

use super::{Lines, or_dash, position_or_dash};
use crate::operate::api::{Awaited, GoingBack, Host, Owed, Rollout, RolloutState, Run};

/// Hosts that a line names.
const WAITS_SHOWN: usize = 5;

/// What `rollout status` prints, and every order about the rollout.
pub(crate) fn status(rollout: Rollout) {
    let mut lines = Lines::new(terminal_width());
    lines.field("state", rollout.state.word());
    if let Some(complete) = rollout.complete {
        lines.field("complete", &complete.to_string());
    }
    standing(&mut lines, &rollout);
    hosts(&mut lines, "WAITS FOR", rollout.blocking.iter().flatten());
    let run = rollout.running.iter();
    hosts(
        &mut lines,
        "STRAGGLERS",
        run.flat_map(|run| &run.stragglers),
    );
    set_aside(&mut lines, &rollout);
    let back = rollout.going_back.iter();
    hosts(&mut lines, "STILL HAS IT", back.flat_map(|it| &it.named));
    for line in lines.lines {
        say!("{line}");
    }
}

/// A table of hosts below `title`.
fn hosts<'a>(lines: &mut Lines, title: &str, hosts: impl Iterator<Item = &'a Host>) {
    let mut hosts = hosts.peekable();
    if hosts.peek().is_none() {
        return;
    }
    let mut table = Table::with_width([title, "OUTCOME", "WHY"], lines.width);
    for host in hosts {
        let error = or_dash(host.error.as_deref());
        table.row([host.name.as_str(), &host.outcome, error]);
    }
    lines.table(&table);
}

/// The table of hosts whose refusals do not count.
fn set_aside(lines: &mut Lines, rollout: &Rollout) {
    if rollout.set_aside.is_empty() {
        return;
    }
    let mut table = Table::with_width(["SET ASIDE", "REFUSED", "SINCE", "WHY"], lines.width);
    for (host, why) in &rollout.set_aside {
        table.row([
            host.as_str(),
            &position_or_dash(why.refused),
            &format!("{:.0}", why.since),
            &why.reason,
        ]);
    }
    lines.table(&table);
}

/// How far a rollout is, what it waits for, what is pinned, and what is held.
pub(super) fn standing(lines: &mut Lines, rollout: &Rollout) {
    if let Some(run) = &rollout.running {
        let wave = match &run.name {
            Some(name) => format!(
                "wave {} of {} ({name}): {} of {} live, waits for {}, {} refused, {} unwell",
                rollout.wave,
                rollout.waves,
                run.this_wave.live,
                run.this_wave.members,
                run.this_wave.unsettled,
                run.all.refused,
                run.all.unwell,
            ),
            None => "no wave has begun yet".to_owned(),
        };
        let position = run.position;
        lines.field("rollout", &format!("{position} is on its way: {wave}"));
        obstacles(lines, run);
    }
    for version in &rollout.complete_withheld {
        let complete = position_or_dash(rollout.complete);
        lines.alarm(&format!("{complete} is withheld from hosts with {version}"));
    }
    if !rollout.set_aside.is_empty() {
        let hosts: Vec<_> = rollout.set_aside.keys().map(AgentName::as_str).collect();
        lines.alarm(&format!(
            "set aside, their refusals do not count (`rollout status` says why): {}",
            hosts.join(", ")
        ));
    }
    for pin in &rollout.pins {
        let reason = pin.reason.as_ref().map(|reason| format!(": {reason}"));
        let (group, position) = (&pin.group, pin.position);
        let reason = reason.unwrap_or_default();
        lines.line(&format!("group {group} is pinned to {position}{reason}"));
    }
    for thin in &rollout.thin {
        lines.line(&format!(
            "canaries with {}: {}, other hosts: {} ({}); three canaries of each version keep a single \
             one from deciding",
            thin.version, thin.canaries, thin.hosts, thin.one
        ));
    }
    if let Some(Owed { to, of }) = rollout.owed {
        lines.alarm(&format!(
            "the databases of {to} have to be published again, in the place of {of}"
        ));
    }
    if let Some(back) = &rollout.going_back {
        lines.field("rollback", &going_back(back));
    }
    if let Some(held) = &rollout.held {
        let reason = &held.reason;
        lines.alarm(&format!(
            "nothing is published until `rollout resume`: {reason}"
        ));
    }
    if let (RolloutState::Halted, Some(failed)) = (rollout.state, &rollout.failed) {
        let (how, position) = (failed.how, failed.position);
        lines.alarm(&format!("{how}: {position}: {}", failed.reason));
    }
}

/// What a running generation waits for, and who does not get it.
fn obstacles(lines: &mut Lines, run: &Run) {
    for wave in &run.skipped {
        lines.field("", &format!("wave {wave} is skipped"));
    }
    let until = |it: &Awaited| format!("{} until {:.0}", it.agent, it.until);
    let waits_for: Vec<_> = run.waits_for.iter().map(until).take(WAITS_SHOWN).collect();
    if !waits_for.is_empty() {
        let more = match run.this_wave.unsettled.saturating_sub(waits_for.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        lines.field("", &format!("waits for {}{more}", waits_for.join(", ")));
    }
    if let Some(group) = &run.waits_for_group {
        let wave = group.wave.as_ref().map(ToString::to_string);
        let wave = wave.unwrap_or_default();
        let line = format!(
            "waits since {:.0}: no host of wave {wave} is connected",
            group.since
        );
        lines.field("", &line);
    }
    for (version, weighing) in &run.weighing {
        let refused: Vec<_> = weighing.refused.iter().map(AgentName::as_str).collect();
        lines.alarm(&format!(
            "{} with {version} refused it: no further host is offered it until the others of that \
             version have answered, at most until {:.0}",
            refused.join(", "),
            weighing.until
        ));
    }
    for (version, why) in &run.withheld {
        let reason = &why.reason;
        lines.alarm(&format!("withheld from hosts with {version}: {reason}"));
    }
    if run.stragglers_total > 0 {
        let named = run.stragglers.iter().take(WAITS_SHOWN);
        let named: Vec<_> = named.map(|host| host.name.as_str()).collect();
        let (total, named) = (run.stragglers_total, named.join(", "));
        let line = format!("stragglers, which catch up: {total} ({named})");
        lines.field("", &line);
    }
    if run.waits_for_window {
        let windows = run.windows.join("; ");
        lines.field(
            "",
            &format!("the next wave begins when a window of its members opens: {windows}"),
        );
    }
    if let Some(waiting) = run.waiting {
        lines.field("", &format!("{waiting} waits for it"));
    }
    if let Some(paused) = &run.paused {
        lines.alarm(&format!("paused: {}", paused.reason));
        if let Some(before) = &paused.before {
            let reason = &before.reason;
            lines.alarm(&format!("paused by itself before: {reason}"));
        }
    }
}

fn going_back(back: &GoingBack) -> String {
    let GoingBack {
        from,
        to,
        on_their_way,
        left,
        named: _,
    } = back;
    format!(
        "{to} takes the place of {from}: {on_their_way} on the way to it, {left} away or unable \
         that still have what was taken back"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// `rollout` with every key that is always there.
    fn whole(rollout: Value) -> Rollout {
        let mut fields = json!({
            "wave": 0, "waves": 0, "set_aside": {}, "thin": [], "pins": [],
        });
        if rollout.get("running").is_some() {
            let none = json!({ "members": 0, "live": 0, "unsettled": 0, "refused": 0, "unwell": 0,
                "named": [], "waits_for": [] });
            let run = json!({
                "skipped": [], "since": null, "all": none, "this_wave": none, "waits_for": [],
                "waits_for_window": false, "windows": [], "weighing": {}, "withheld": {},
                "stragglers": [], "stragglers_total": 0,
            });
            merge(&mut fields, run);
        }
        merge(&mut fields, rollout);
        serde_json::from_value(fields).unwrap()
    }

    fn merge(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    fn lines(rollout: Value) -> Vec<String> {
        let mut lines = Lines::new(None);
        standing(&mut lines, &whole(rollout));
        lines.lines
    }

    #[test]
    fn status_says_where_a_rollout_is_and_why_it_stands() {
        let since = "2026-11-30T08:00:00Z";
        let check = |rollout: Value, expected: &[&str]| {
            assert_eq!(lines(rollout), expected);
        };
        check(json!({ "state": "complete" }), &[]);
        check(
            json!({
                "state": "paused", "wave": 2, "waves": 3, "skipped": ["group:canary"], "name": "10%",
                "running": { "epoch": 1, "generation": 7 },
                "waiting": { "epoch": 1, "generation": 8 },
                "this_wave": { "live": 3, "members": 5, "unsettled": 0 },
                "all": { "refused": 0, "unwell": 2 },
                "paused": {
                    "kind": "operator", "since": since, "reason": "freeze",
                    "before": { "kind": "unwell", "since": since, "reason": "2 of 5 hosts have trouble of their own: web1, web2" },
                },
            }),
            &[
                "rollout      1.7 is on its way: wave 2 of 3 (10%): 3 of 5 live, waits for 0, 0 refused, 2 unwell",
                "             wave group:canary is skipped",
                "             1.8 waits for it",
                "paused: freeze",
                "paused by itself before: 2 of 5 hosts have trouble of their own: web1, web2",
            ],
        );
        check(
            json!({
                "state": "running", "wave": 0, "waves": 1, "name": null,
                "running": { "epoch": 1, "generation": 7 },
                "waits_for_window": true, "windows": ["db: Mon-Fri 22:00-05:00 UTC"],
            }),
            &[
                "rollout      1.7 is on its way: no wave has begun yet",
                "             the next wave begins when a window of its members opens: db: Mon-Fri 22:00-05:00 UTC",
            ],
        );
        check(
            json!({
                "state": "complete",
                "going_back": {
                    "from": { "epoch": 1, "generation": 7 }, "to": { "epoch": 1, "generation": 8 },
                    "on_their_way": 1, "left": 2, "named": [],
                },
            }),
            &[
                "rollback     1.8 takes the place of 1.7: 1 on the way to it, 2 away or unable that still have what was taken back",
            ],
        );
        let failed = json!({
            "epoch": 1, "generation": 7, "how": "halted",
            "reason": "clamd refused it on 1 of 2 hosts: web1", "since": since,
        });
        check(
            json!({ "state": "halted", "failed": failed }),
            &["halted: 1.7: clamd refused it on 1 of 2 hosts: web1"],
        );
    }

    #[test]
    fn status_names_whom_a_rollout_waits_for_and_who_is_left_out() {
        let since = "2026-11-30T08:00:00Z";
        let shown = lines(json!({
                "state": "running", "wave": 2, "waves": 3, "name": "10%",
                "running": { "epoch": 1, "generation": 7 },
                "this_wave": { "live": 3, "members": 5, "unsettled": 7 },
                "all": { "refused": 0, "unwell": 0 },
                "waits_for": [{ "agent": "web1", "until": since }],
                "weighing": { "ClamAV 1.4.6": { "refused": ["web2"], "since": since, "until": since } },
                "withheld": { "ClamAV 1.0.9": { "cause": "refused", "reason": "web3 refused it", "since": since } },
                "stragglers": [{ "name": "web4", "outcome": "live", "error": null }], "stragglers_total": 1,
                "set_aside": { "web5": { "refused": null, "rollouts": 0, "reason": "it lies", "since": since } },
                "thin": [{ "version": "ClamAV 1.4.6", "canaries": 1, "hosts": 2, "one": "web6" }],
        }));
        assert_eq!(
            shown,
            [
                "rollout      1.7 is on its way: wave 2 of 3 (10%): 3 of 5 live, waits for 7, 0 refused, 0 unwell",
                "             waits for web1 until 2026-11-30T08:00:00Z and 6 more",
                "web2 with ClamAV 1.4.6 refused it: no further host is offered it until the others of that version have answered, at most until 2026-11-30T08:00:00Z",
                "withheld from hosts with ClamAV 1.0.9: web3 refused it",
                "             stragglers, which catch up: 1 (web4)",
                "set aside, their refusals do not count (`rollout status` says why): web5",
                "canaries with ClamAV 1.4.6: 1, other hosts: 2 (web6); three canaries of each version keep a single one from deciding",
            ]
        );
    }

    #[test]
    fn who_holds_a_rollout_up_is_named_with_what_it_says() {
        let mut lines = Lines::new(None);
        hosts(&mut lines, "WAITS FOR", [].iter());
        assert!(lines.lines.is_empty());
        let blocking: Vec<Host> = serde_json::from_value(json!([
            { "name": "web1", "outcome": "refused", "error": "1.7: no digits" },
            { "name": "web2", "outcome": "fetching", "error": null },
        ]))
        .unwrap();
        hosts(&mut lines, "WAITS FOR", blocking.iter());
        assert_eq!(
            lines.lines,
            [
                "",
                "WAITS FOR  OUTCOME   WHY",
                "web1       refused   1.7: no digits",
                "web2       fetching  -",
            ]
        );
    }
}
