//! The way to the master, and the clock that the certificates are judged by.
//!
//! A master takes a connection that got through the handshake for the host's only one and closes
//! the one before. So the agent that runs is asked, and what is tried beside it ends at the master's
//! certificate, before this host's own was sent: the master does not know who knocked. Only where
//! an agent has run, and none runs, does the probe go on to the master's first words.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use clamcast_daemon::admin::{self, CallError};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::Finding;
use crate::chain;
use crate::config::{Config, DAEMON};
use crate::core::CLOCK_SKEW_SECS_MAX;
use crate::core::status::Status;
use crate::host::Process;
use crate::link;
use crate::link::endpoint::{self, Credentials, Knock};
use crate::operate::admin::Request;

/// Addresses that are tried, at most.
const ADDRESSES_MAX: usize = 32;

/// An agent that has not answered by then hangs, or is starting: `status` waits three seconds for a
/// clamd that is silent.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Clocks that differ by this much are worth a word: audit logs are compared by time.
const CLOCK_NOTE_SECS: i64 = 5;

/// The agent of this configuration.
#[derive(Debug)]
pub(super) enum Agent {
    /// It runs.
    Runs(Box<Status>),
    /// It does not.
    Away,
    /// It cannot be told: why, and what to do.
    Unknown(String, &'static str),
}

impl Agent {
    /// Asks at its admin socket, and waits so long for the answer.
    pub(super) async fn ask(socket: &Path, patience: Duration) -> Self {
        let (tell, told) = oneshot::channel();
        let path = socket.to_owned();
        // A thread that nobody waits for: one that an agent never answers ends with this process.
        std::thread::spawn(move || tell.send(Self::call(&path)));
        match tokio::time::timeout(patience, told).await {
            Ok(Ok(agent)) => agent,
            Ok(Err(_)) | Err(_) => {
                let secs = patience.as_secs();
                Self::Unknown(
                    format!("it did not answer at {} in {secs} s", socket.display()),
                    "look again in a minute; if it is still silent: journalctl -u clamcast-agent, \
                     systemctl restart clamcast-agent",
                )
            }
        }
    }

    /// Blocking.
    fn call(socket: &Path) -> Self {
        match admin::call(DAEMON, socket, &Request::Status, |_| {}) {
            Ok(finish) => match serde_json::from_value(finish.result) {
                Ok(status) => Self::Runs(Box::new(status)),
                Err(error) => Self::Unknown(
                    finish.message.unwrap_or_else(|| error.to_string()),
                    "look again in a moment: clamcast-agent status",
                ),
            },
            Err(CallError::Unreachable { .. }) => Self::Away,
            Err(
                error @ (CallError::Forbidden { .. }
                | CallError::NotASocket { .. }
                | CallError::Stranger { .. }
                | CallError::Lost { .. }
                | CallError::Answer { .. }),
            ) => Self::Unknown(chain(&error), "run this as root"),
        }
    }
}

/// What came of trying one address.
#[derive(Debug)]
pub(super) struct Tried {
    /// `host:port` as configured.
    pub(super) name: String,
    /// What it was resolved to, and what answered there.
    pub(super) answer: Result<(SocketAddr, Answer), String>,
}

/// What answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// A master of this fleet; nothing is known of what it thinks of this host.
    Master,
    /// The same, and it welcomed this host; so far this host's clock is ahead.
    Welcome(SignedDuration),
    /// Nobody.
    Nobody,
    /// Somebody else, or a master that does not want this host.
    Refused(String),
}

/// Tries every address of every name, all at once. `fully` goes on to the master's first words, at
/// the first address that answers.
pub(super) async fn try_all(config: &Config, credentials: &Credentials, fully: bool) -> Vec<Tried> {
    let mut tried = Vec::new();
    let endpoint = match endpoint::bind() {
        Ok(endpoint) => endpoint,
        Err(error) => {
            let name = config.master.join(", ");
            let answer = Err(format!("cannot open a UDP socket: {error}"));
            return vec![Tried { name, answer }];
        }
    };
    let mut knocks = JoinSet::new();
    let mut known = BTreeSet::new();
    for name in &config.master {
        let found = match tokio::net::lookup_host(name).await {
            Ok(found) => found,
            Err(error) => {
                let answer = Err(error.to_string());
                tried.push(Tried {
                    name: name.clone(),
                    answer,
                });
                continue;
            }
        };
        for address in found
            .filter(|address| known.insert(*address))
            .take(ADDRESSES_MAX)
        {
            let (endpoint, name) = (endpoint.clone(), name.clone());
            let knock = credentials.knock(&endpoint, address);
            knocks.spawn(async move { (name, address, knock.await) });
        }
    }
    while let Some(knocked) = knocks.join_next().await {
        let (name, address, knock) = knocked.expect("a knock does not panic");
        let answer = match knock {
            Knock::Master => Answer::Master,
            Knock::Nobody => Answer::Nobody,
            Knock::Other(what) => Answer::Refused(format!(
                "what answers at {address} is not this fleet's master: {what}"
            )),
        };
        tried.push(Tried {
            name,
            answer: Ok((address, answer)),
        });
    }
    tried.sort_by(|a, b| a.name.cmp(&b.name));
    if fully {
        let mut masters = tried
            .iter_mut()
            .filter_map(|tried| tried.answer.as_mut().ok());
        if let Some((address, answer)) =
            masters.find(|(_, answer)| matches!(answer, Answer::Master))
        {
            *answer = match link::first_words(&endpoint, credentials, *address).await {
                Ok(welcome) => Answer::Welcome(Timestamp::now().duration_since(welcome.time)),
                Err(error) => Answer::Refused(chain(&error)),
            };
        }
    }
    // The master need not hear that we go; where there is none, nobody would.
    let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
    tried
}

/// Judges the way to the master.
pub(super) fn judge(agent: &Agent, tried: &[Tried]) -> Vec<Finding> {
    let check = "master";
    let mut findings = Vec::new();
    match agent {
        Agent::Runs(status) if status.master.connected => {
            let address = status.master.address.as_deref().unwrap_or("the master");
            let found = format!("the agent runs and is connected to {address}");
            findings.push(Finding::good(check, found));
        }
        Agent::Runs(status) => findings.push(match &status.master.error {
            Some(error) => {
                let found = format!("the agent runs and is not connected: {error}");
                Finding::bad(check, found, "see what its addresses answer, below")
            }
            None => {
                let found = "the agent runs and has not heard of its master yet";
                Finding::note(
                    check,
                    found,
                    "look again in a minute: clamcast-agent status",
                )
            }
        }),
        Agent::Away => {
            let welcomed = |tried: &Tried| matches!(&tried.answer, Ok((_, Answer::Welcome(_))));
            let found = match tried.iter().any(welcomed) {
                true => "the agent does not run; this probe took its place for a moment",
                false => "the agent does not run",
            };
            let advice = "systemctl enable --now clamcast-agent";
            findings.push(Finding::note(check, found, advice));
        }
        Agent::Unknown(why, advice) => findings.push(Finding::unknown(
            check,
            format!("the agent cannot be asked: {why}"),
            Some((*advice).into()),
        )),
    }
    if let Agent::Runs(status) = agent {
        findings.extend(judge_freshness(status.fresh_until, status.stale_since));
    }
    let reached =
        |tried: &Tried| matches!(&tried.answer, Ok((_, Answer::Master | Answer::Welcome(_))));
    let any = tried.iter().any(reached);
    for Tried { name, answer } in tried {
        let port = name.rsplit(':').next().unwrap_or("7310");
        // One way is enough; the others are there for the day when it is not.
        let judge = if any { Finding::note } else { Finding::bad };
        findings.push(match answer {
            Err(error) => judge(
                check,
                format!("cannot find the address of {name}: {error}"),
                "correct `master` in agent.toml, or this host's DNS (getent hosts NAME)".into(),
            ),
            Ok((address, Answer::Nobody)) => judge(
                check,
                format!("no answer from {} over UDP", shown(name, address)),
                format!(
                    "is the master running and listening there (on it: ss -lun 'sport = :{port}')? \
                     Else a firewall stops UDP to port {port}, here, there or between"
                ),
            ),
            Ok((_, Answer::Refused(what))) => Finding::bad(
                check,
                what.clone(),
                "compare ca.pem, certificate and clock of both hosts; where the CA is: \
                 clamcast-certs list --dir PKI",
            ),
            Ok((address, Answer::Master)) => Finding::good(
                check,
                format!(
                    "{} answers over UDP as this fleet's master",
                    shown(name, address)
                ),
            ),
            Ok((address, Answer::Welcome(_))) => Finding::good(
                check,
                format!(
                    "{} answers over UDP and welcomes this host",
                    shown(name, address)
                ),
            ),
        });
    }
    findings
}

/// A stale host, with or without an expired freshness statement.
fn judge_freshness(heard: Option<Timestamp>, stale_since: Option<Timestamp>) -> Option<Finding> {
    let since = stale_since?;
    let found = match heard {
        Some(_) => format!("the freshness statement of the master expired at {since}"),
        None => format!("expired at {since}: no freshness statement came since the first start"),
    };
    let advice = "see why the agent is not connected; where the master is: clamcast-master status";
    Some(Finding::bad("freshness", found, advice))
}

/// The name, and the address where that is something else.
fn shown(name: &str, address: &SocketAddr) -> String {
    if name == address.to_string() {
        return name.to_owned();
    }
    format!("{name} ({address})")
}

/// Judges the clock: against the master's, if it said what time it is, and by who keeps it.
pub(super) fn judge_clock(agent: &Agent, tried: &[Tried], processes: &[Process]) -> Vec<Finding> {
    let welcomed = tried.iter().find_map(|tried| match &tried.answer {
        Ok((_, Answer::Welcome(ahead))) => Some(ahead.as_secs()),
        Ok(_) | Err(_) => None,
    });
    let ahead = welcomed.or(match agent {
        Agent::Runs(status) => status.master.clock_ahead_secs,
        Agent::Away | Agent::Unknown(..) => None,
    });
    let set =
        "which one is wrong? timedatectl; systemctl enable --now systemd-timesyncd (or chronyd)";
    let clock = match ahead {
        None => Finding::unknown("clock", "the master did not say what time it has", None),
        Some(ahead) => {
            let side = if ahead < 0 { "behind" } else { "ahead of" };
            let found = format!("{} s {side} the master's", ahead.abs());
            match ahead.abs() {
                0..CLOCK_NOTE_SECS => Finding::good("clock", "within seconds of the master's"),
                CLOCK_NOTE_SECS..=CLOCK_SKEW_SECS_MAX => Finding::note("clock", found, set),
                _ => Finding::bad("clock", found, set),
            }
        }
    };
    const KEEPERS: [&str; 5] = ["systemd-timesyn", "chronyd", "ntpd", "openntpd", "ntpd-rs"];
    let keeper = processes
        .iter()
        .find(|p| KEEPERS.contains(&p.name.as_str()));
    let kept = match keeper {
        Some(process) => Finding::good("time-service", process.to_string()),
        None => Finding::note(
            "time-service",
            "neither systemd-timesyncd nor chronyd nor ntpd runs",
            "systemctl enable --now systemd-timesyncd (or chronyd), unless the hypervisor keeps \
             the clock",
        ),
    };
    vec![clock, kept]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;

    fn tried(name: &str, answer: Answer) -> Tried {
        let address = "192.0.2.1:7310".parse().unwrap();
        Tried {
            name: name.into(),
            answer: Ok((address, answer)),
        }
    }

    #[test]
    fn what_stands_between_host_and_master_is_told_apart() {
        let unresolved = Tried {
            name: "mirror:7310".into(),
            answer: Err("Name or service not known".into()),
        };
        let refused =
            "the master at 192.0.2.1:7310 has this host's certificate on its revocation list";
        for (tried, expected) in [
            (
                unresolved,
                "bad master: | cannot find the address of mirror:7310 | DNS",
            ),
            (
                tried("mirror:7310", Answer::Nobody),
                "bad master: | no answer from mirror:7310 (192.0.2.1:7310) over UDP | firewall",
            ),
            (
                tried("mirror:7310", Answer::Refused(refused.into())),
                "bad master: | revocation list | clamcast-certs list",
            ),
            (
                tried("192.0.2.1:7310", Answer::Welcome(SignedDuration::ZERO)),
                "good master: 192.0.2.1:7310 answers over UDP and welcomes",
            ),
        ] {
            let place = match tried.answer {
                Ok((_, Answer::Welcome(_))) => "does not run; this probe took its place",
                Ok(_) | Err(_) => "the agent does not run ->",
            };
            let findings = judge(&Agent::Away, &[tried]);
            testing::assert_lines(&findings, &[&format!("note master: | {place}"), expected]);
        }
    }

    #[tokio::test]
    async fn an_agent_that_hangs_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("admin.sock");
        let _hangs = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let agent = Agent::ask(&socket, Duration::from_millis(1)).await;
        let expected = "unknown master: | did not answer | journalctl";
        testing::assert_lines(&judge(&agent, &[]), &[expected]);
    }

    #[test]
    fn an_address_that_is_dead_beside_one_that_answers_is_a_note() {
        let both = [
            tried("a:7310", Answer::Nobody),
            tried("b:7310", Answer::Master),
        ];
        let findings = judge(
            &Agent::Unknown("you may not".into(), "run this as root"),
            &both,
        );
        testing::assert_lines(
            &findings,
            &[
                "unknown master: | cannot be asked | run this as root",
                "note master: no answer from a:7310",
                "good master: b:7310 (192.0.2.1:7310) answers over UDP as",
            ],
        );
    }

    #[test]
    fn a_stale_host_is_told_since_when_and_whether_it_ever_heard_of_its_master() {
        let since = Timestamp::UNIX_EPOCH;
        for (heard, stale, expected) in [
            (Some(since), None, None),
            (None, None, None),
            (
                Some(since),
                Some(since),
                Some("bad freshness: | expired at 1970-01-01T00:00:00Z | clamcast-master status"),
            ),
            (
                None,
                Some(since),
                Some("bad freshness: | expired at 1970-01-01T00:00:00Z: no freshness statement"),
            ),
        ] {
            let findings: Vec<_> = judge_freshness(heard, stale).into_iter().collect();
            let expected: Vec<_> = expected.into_iter().collect();
            testing::assert_lines(&findings, &expected);
        }
    }

    #[test]
    fn clocks_may_differ_by_a_few_seconds() {
        for (ahead, expected) in [
            (0, "good clock"),
            (-4, "good clock"),
            (60, "note clock: 60 s ahead of the master's"),
            (-301, "bad clock: 301 s behind the master's | timedatectl"),
        ] {
            let welcome = tried("a:7310", Answer::Welcome(SignedDuration::from_secs(ahead)));
            let findings = judge_clock(&Agent::Away, &[welcome], &[]);
            testing::assert_lines(&findings, &[expected, "note time-service"]);
        }
        let nobody = [tried("a:7310", Answer::Nobody)];
        let findings = judge_clock(&Agent::Away, &nobody, &[]);
        testing::assert_lines(&findings, &["unknown clock", "note time-service"]);
    }
}
