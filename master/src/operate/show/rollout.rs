//! How far a rollout is, who holds it up, and what is pinned.

use clamcast_daemon::say;
use clamcast_daemon::table::{Table, terminal_width};
use serde_json::Value;

use super::{Lines, or_dash, position, text, time};

/// Hosts that a line names.
const WAITS_SHOWN: usize = 5;

/// What `rollout status` prints, and every order about the rollout.
pub(crate) fn status(result: &Value) {
    let mut lines = Lines {
        width: terminal_width(),
        lines: Vec::new(),
    };
    lines.field("state", &text(&result["state"]));
    if let Some(complete) = result.get("complete") {
        lines.field("complete", &position(complete));
    }
    standing(&mut lines, result);
    hosts(&mut lines, "WAITS FOR", &result["blocking"]);
    hosts(&mut lines, "STRAGGLERS", &result["stragglers"]);
    set_aside(&mut lines, &result["set_aside"]);
    let back = &result["going_back"];
    hosts(&mut lines, "STILL HAS IT", &back["named"]);
    for line in lines.lines {
        say!("{line}");
    }
}

/// Hosts that do what `title` says, and what they say.
fn hosts(lines: &mut Lines, title: &str, hosts: &Value) {
    let mut table = Table::with_width([title, "OUTCOME", "WHY"], lines.width);
    let mut any = false;
    for row in hosts.as_array().into_iter().flatten() {
        any = true;
        let [name, outcome, error] = ["name", "outcome", "error"].map(|key| text(&row[key]));
        table.row([name, outcome, or_dash(error)]);
    }
    if any {
        lines.lines.push(String::new());
        let table = table.to_string();
        lines.lines.extend(table.lines().map(str::to_owned));
    }
}

/// Hosts whose refusals do not count.
fn set_aside(lines: &mut Lines, hosts: &Value) {
    let hosts = hosts.as_object().into_iter().flatten();
    let mut table = Table::with_width(["SET ASIDE", "REFUSED", "SINCE", "WHY"], lines.width);
    let mut any = false;
    for (host, why) in hosts {
        any = true;
        let refused = &why["refused"];
        let refused = match refused.is_null() {
            true => "-".to_owned(),
            false => position(refused),
        };
        table.row([
            host.clone(),
            refused,
            time(&why["since"]),
            text(&why["reason"]),
        ]);
    }
    if any {
        lines.lines.push(String::new());
        let table = table.to_string();
        lines.lines.extend(table.lines().map(str::to_owned));
    }
}

/// Where a rollout is that is not through, and why; what is pinned, and what is held.
pub(super) fn standing(lines: &mut Lines, rollout: &Value) {
    if !rollout["running"].is_null() {
        let number = |of: &str, key: &str| rollout[of][key].as_u64().unwrap_or(0);
        let wave = match rollout["name"].as_str() {
            Some(name) => format!(
                "wave {} of {} ({name}): {} of {} live, waits for {}, {} refused, {} unwell",
                text(&rollout["wave"]),
                text(&rollout["waves"]),
                number("this_wave", "live"),
                number("this_wave", "members"),
                number("this_wave", "unsettled"),
                number("all", "refused"),
                number("all", "unwell"),
            ),
            None => "no wave has begun yet".to_owned(),
        };
        lines.field(
            "rollout",
            &format!("{} is on its way: {wave}", position(&rollout["running"])),
        );
    }
    for wave in rollout["skipped"].as_array().into_iter().flatten() {
        lines.field("", &format!("wave {} is skipped", text(wave)));
    }
    waits(lines, rollout);
    if rollout["waits_for_window"] == true {
        let windows = rollout["windows"].as_array().into_iter().flatten();
        let windows: Vec<_> = windows.map(text).collect();
        let windows = windows.join("; ");
        lines.field(
            "",
            &format!("the next wave begins when a window of its members opens: {windows}"),
        );
    }
    if let Some(waiting) = rollout.get("waiting") {
        lines.field("", &format!("{} waits for it", position(waiting)));
    }
    if let Some(paused) = rollout.get("paused") {
        lines.alarm(&format!("paused: {}", text(&paused["reason"])));
        if let Some(before) = paused.get("before") {
            let reason = text(&before["reason"]);
            lines.alarm(&format!("paused by itself before: {reason}"));
        }
    }
    for pin in rollout["pins"].as_array().into_iter().flatten() {
        let (group, position) = (text(&pin["group"]), position(pin));
        let reason = match text(&pin["reason"]) {
            none if none.is_empty() => none,
            reason => format!(": {reason}"),
        };
        lines.line(&format!("group {group} is pinned to {position}{reason}"));
    }
    for thin in rollout["thin"].as_array().into_iter().flatten() {
        let [version, canaries, hosts, one] =
            ["version", "canaries", "hosts", "one"].map(|key| text(&thin[key]));
        lines.line(&format!(
            "canaries with {version}: {canaries}, other hosts: {hosts} ({one}); three canaries of each \
             version keep a single one from deciding"
        ));
    }
    if let Some(owed) = rollout.get("owed") {
        let [to, of] = ["to", "of"].map(|key| position(&owed[key]));
        lines.alarm(&format!(
            "the databases of {to} have to be published again, in the place of {of}"
        ));
    }
    if let Some(back) = rollout.get("going_back") {
        lines.field("rollback", &going_back(back));
    }
    if let Some(held) = rollout.get("held") {
        let reason = text(&held["reason"]);
        lines.alarm(&format!(
            "nothing is published until `rollout resume`: {reason}"
        ));
    }
    if rollout["state"] == "halted" {
        let failed = &rollout["failed"];
        let (position, how) = (position(failed), text(&failed["how"]));
        lines.alarm(&format!("{how}: {position}: {}", text(&failed["reason"])));
    }
}

/// Whom and what a rollout waits for, and who is left out.
fn waits(lines: &mut Lines, rollout: &Value) {
    let until = |it: &Value| format!("{} until {}", text(&it["agent"]), time(&it["until"]));
    let waits_for = rollout["waits_for"].as_array().into_iter().flatten();
    let waits_for: Vec<_> = waits_for.map(until).collect();
    if !waits_for.is_empty() {
        let shown = &waits_for[..waits_for.len().min(WAITS_SHOWN)];
        let more = rollout["this_wave"]["unsettled"].as_u64().unwrap_or(0);
        let more = more.saturating_sub(shown.len() as u64);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        lines.field("", &format!("waits for {}{more}", shown.join(", ")));
    }
    if let Some(group) = rollout.get("waits_for_group") {
        let (wave, since) = (text(&group["wave"]), time(&group["since"]));
        let line = format!("waits since {since}: no host of wave {wave} is connected");
        lines.field("", &line);
    }
    for (version, weighing) in rollout["weighing"].as_object().into_iter().flatten() {
        let refused = weighing["refused"].as_array().into_iter().flatten();
        let refused: Vec<_> = refused.map(text).collect();
        lines.alarm(&format!(
            "{} with {version} refused it: no further host is offered it until the others of that \
             version have answered, at most until {}",
            refused.join(", "),
            time(&weighing["until"])
        ));
    }
    for (version, why) in rollout["withheld"].as_object().into_iter().flatten() {
        lines.alarm(&format!(
            "withheld from hosts with {version}: {}",
            text(&why["reason"])
        ));
    }
    let complete = rollout["complete_withheld"]
        .as_array()
        .into_iter()
        .flatten();
    for version in complete.map(text) {
        let complete = position(&rollout["complete"]);
        lines.alarm(&format!("{complete} is withheld from hosts with {version}"));
    }
    let stragglers = rollout["stragglers_total"].as_u64().unwrap_or(0);
    if stragglers > 0 {
        let named = rollout["stragglers"].as_array().into_iter().flatten();
        let named: Vec<_> = named
            .take(WAITS_SHOWN)
            .map(|row| text(&row["name"]))
            .collect();
        let named = named.join(", ");
        lines.field(
            "",
            &format!("stragglers, which catch up: {stragglers} ({named})"),
        );
    }
    let set_aside: Vec<_> = rollout["set_aside"]
        .as_object()
        .into_iter()
        .flatten()
        .collect();
    if !set_aside.is_empty() {
        let hosts: Vec<_> = set_aside.iter().map(|(host, _)| host.as_str()).collect();
        lines.alarm(&format!(
            "set aside, their refusals do not count (`rollout status` says why): {}",
            hosts.join(", ")
        ));
    }
}

/// How far a rollback is.
fn going_back(back: &Value) -> String {
    let [from, to] = ["from", "to"].map(|key| position(&back[key]));
    let [on_their_way, left] = ["on_their_way", "left"].map(|key| text(&back[key]));
    format!(
        "{to} takes the place of {from}: {on_their_way} on the way to it, {left} away or unable \
         that still have what was taken back"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn status_says_where_a_rollout_is_and_why_it_stands() {
        let check = |rollout: Value, expected: &[&str]| {
            let mut lines = Lines {
                width: None,
                lines: Vec::new(),
            };
            standing(&mut lines, &rollout);
            assert_eq!(lines.lines, expected);
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
                    "reason": "freeze",
                    "before": { "reason": "2 of 5 hosts have trouble of their own: web1, web2" },
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
                    "on_their_way": 1, "left": 2,
                },
            }),
            &[
                "rollback     1.8 takes the place of 1.7: 1 on the way to it, 2 away or unable that still have what was taken back",
            ],
        );
        let failed = json!({
            "epoch": 1, "generation": 7, "how": "halted",
            "reason": "clamd refused it on 1 of 2 hosts: web1",
        });
        check(
            json!({ "state": "halted", "failed": failed }),
            &["halted: 1.7: clamd refused it on 1 of 2 hosts: web1"],
        );
    }

    #[test]
    fn status_names_whom_a_rollout_waits_for_and_who_is_left_out() {
        let mut lines = Lines {
            width: None,
            lines: Vec::new(),
        };
        let since = "2026-11-30T08:00:00Z";
        standing(
            &mut lines,
            &json!({
                "state": "running", "wave": 2, "waves": 3, "name": "10%",
                "running": { "epoch": 1, "generation": 7 },
                "this_wave": { "live": 3, "members": 5, "unsettled": 7 },
                "all": { "refused": 0, "unwell": 0 },
                "waits_for": [{ "agent": "web1", "until": since }],
                "weighing": { "ClamAV 1.4.6": { "refused": ["web2"], "until": since } },
                "withheld": { "ClamAV 1.0.9": { "reason": "web3 refused it", "since": since } },
                "stragglers": [{ "name": "web4" }], "stragglers_total": 1,
                "set_aside": { "web5": { "reason": "it lies", "since": since } },
                "thin": [{ "version": "ClamAV 1.4.6", "canaries": 1, "hosts": 2, "one": "web6" }],
            }),
        );
        assert_eq!(
            lines.lines,
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
        let mut lines = Lines {
            width: None,
            lines: Vec::new(),
        };
        hosts(&mut lines, "WAITS FOR", &json!([]));
        assert!(lines.lines.is_empty());
        let blocking = json!([
            { "name": "web1", "outcome": "refused", "error": "1.7: no digits" },
            { "name": "web2", "outcome": "fetching", "error": null },
        ]);
        hosts(&mut lines, "WAITS FOR", &blocking);
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
