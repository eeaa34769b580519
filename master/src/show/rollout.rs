//! How far a rollout is, who holds it up, and what is pinned.

use clamcast_daemon::say;
use clamcast_daemon::table::{Table, terminal_width};
use serde_json::Value;

use super::{Lines, or_dash, position, text};

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
    hosts(&mut lines, "HOLDS IT UP", &result["blocking"]);
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

/// Where a rollout is that is not through, and why; what is pinned, and what is held.
pub(super) fn standing(lines: &mut Lines, rollout: &Value) {
    if !rollout["running"].is_null() {
        let number = |of: &str, key: &str| rollout[of][key].as_u64().unwrap_or(0);
        let wave = match rollout["name"].as_str() {
            Some(name) => format!(
                "wave {} of {} ({name}): {} of {} live, {} at it, {} refused, {} unwell",
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
        lines.field("", &format!("wave {} has no members", text(wave)));
    }
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
    for untried in rollout["untried"].as_array().into_iter().flatten() {
        let [version, hosts, one] = ["version", "hosts", "one"].map(|key| text(&untried[key]));
        lines.line(&format!(
            "no canary runs {version}, which {hosts} other hosts have ({one}): nobody tries a \
             generation with it first"
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
                "rollout      1.7 is on its way: wave 2 of 3 (10%): 3 of 5 live, 0 at it, 0 refused, 2 unwell",
                "             wave group:canary has no members",
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
    fn who_holds_a_rollout_up_is_named_with_what_it_says() {
        let mut lines = Lines {
            width: None,
            lines: Vec::new(),
        };
        hosts(&mut lines, "HOLDS IT UP", &json!([]));
        assert!(lines.lines.is_empty());
        let blocking = json!([
            { "name": "web1", "outcome": "refused", "error": "1.7: no digits" },
            { "name": "web2", "outcome": "fetching", "error": null },
        ]);
        hosts(&mut lines, "HOLDS IT UP", &blocking);
        assert_eq!(
            lines.lines,
            [
                "",
                "HOLDS IT UP  OUTCOME   WHY",
                "web1         refused   1.7: no digits",
                "web2         fetching  -",
            ]
        );
    }
}
