//! No single host stops or misleads a rollout: real daemons, real clamds, and hosts that lie, crawl,
//! vanish or are switched off.

use std::time::Instant;

use clamcast_proto::receipt::{ClamdReport, Outcome, Receipt};
use clamcast_proto::wire::{Hello, Offer, Phase, ToMaster};
use clamcast_tests::lab::{
    Agent, Clamd, Container, Conversation, Fleet, Link, Master, PATIENCE, Rogue, UdpProxy, receipt,
    signatures, until,
};
use clamcast_tests::require;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::{Duration, interval};

/// A wave waits so long for its members.
const DEADLINE: &str = "6s";

/// A set that clamd loads.
fn good(version: u64) -> Container {
    Container::new("daily", version).member("hsb", signatures(0..50 + version))
}

/// One that no clamd loads.
fn bad(version: u64) -> Container {
    let nonsense = "Lab.Nonsense:0:*:these are no hexadecimal digits\n";
    good(version).member("ndb", nonsense)
}

/// A set of some megabytes that does not compress away.
fn large(version: u64) -> Container {
    let first = version * 100_000;
    Container::new("daily", version).member("hsb", signatures(first..first + 60_000))
}

/// A master whose canaries are `web1`, `web2` and `web3`. Not started, and its mirror is empty.
fn master(fleet: &Fleet) -> Master {
    let master = fleet.master(&fleet.mirror());
    let tables = format!(
        "require = []\nload_test = \"never\"\n[groups]\ncanary = [\"web*\"]\n[rollout]\n\
         waves = [\"group:canary\", \"100%\"]\ndeadline = \"{DEADLINE}\""
    );
    master.configure("require = []", &tables);
    master
}

/// The name of a host, or where it is in `status`.
fn rollout(master: &Master) -> Value {
    master.json(&["status"]).unwrap_or_default()["rollout"].clone()
}

/// Waits until these hosts are live at a generation, and says how long that took.
#[track_caller]
fn all_live(master: &Master, names: &[&str], generation: u64, since: Instant) {
    for name in names {
        master.wait_live(name, generation);
    }
    let took = since.elapsed().as_secs_f64();
    println!(
        "{} live with {generation} after {took:.1} s",
        names.join(", ")
    );
}

/// `status` as an operator sees it, and its JSON.
fn shown(master: &Master) -> (String, Value) {
    let output = master.command(&["status"]);
    let text = String::from_utf8(output.stdout).unwrap();
    println!("{text}");
    (text, master.json(&["status"]).unwrap())
}

/// A host that somebody has taken over: it answers each offer as it likes. `web1`, beside honest hosts.
struct Liar {
    runtime: Runtime,
}

impl Liar {
    /// Enters the fleet with a clamd of `version`, and does with each offer what `answer` says.
    fn enter<F, A>(fleet: &Fleet, version: Option<String>, answer: A) -> Self
    where
        A: Fn(Rogue, Conversation, Box<Offer>) -> F + Send + 'static,
        F: Future<Output = Conversation> + Send,
    {
        let runtime = Runtime::new().unwrap();
        let rogue = {
            let _inside = runtime.enter();
            Rogue::new(fleet, "web1")
        };
        runtime.spawn(async move {
            let mut conversation = rogue.greet(rogue.config()).await;
            let clamd = ClamdReport {
                version,
                ..ClamdReport::default()
            };
            let hello = ToMaster::Hello(Box::new(Hello::new("0.1.0", clamd)));
            conversation.say(&hello).await;
            loop {
                let offer = conversation.offer().await;
                conversation = answer(rogue.clone(), conversation, offer).await;
            }
        });
        Self { runtime }
    }

    /// It is switched off.
    fn leave(self) {
        self.runtime.shutdown_background();
    }
}

/// Says that it refused the offer.
async fn refuse(rogue: Rogue, mut conversation: Conversation, offer: Box<Offer>) -> Conversation {
    let claim = Receipt {
        outcome: Outcome::Refused,
        error: Some("clamscan: Can't load daily.cud: Malformed database".to_owned()),
        ..receipt(&offer, "web1", 1)
    };
    let receipt = rogue.sign(claim);
    conversation.say(&ToMaster::Receipt { receipt }).await;
    conversation
}

#[test]
fn a_lone_refusal_is_outweighed_by_two_real_clamds_and_its_host_is_set_aside() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mut master = master(&fleet);
    let databases = ["web2", "web3"].map(|name| fleet.database(name));
    let mut clamds = Clamd::several([&databases[0], &databases[1]]);
    let mut agents = [
        fleet.agent_of("web2", &clamds[0]),
        fleet.agent_of("web3", &clamds[1]),
        fleet.agent("db1"),
    ];
    good(1).write(&fleet.mirror());
    master.start();
    for agent in &mut agents {
        agent.start();
    }
    for (name, clamd) in ["web2", "web3"].into_iter().zip(&mut clamds) {
        master.wait_agent(name, "the first set is there", |row| row["generation"] == 1);
        clamd.start();
    }
    for name in ["web2", "web3", "db1"] {
        master.wait_live(name, 1);
    }

    let version = master.agent("web2").unwrap()["clamd"]["version"].clone();
    let version = version.as_str().unwrap().to_owned();
    let _liar = Liar::enter(&fleet, Some(version), refuse);
    master.wait_agent("web1", "the liar refuses the first set", |row| {
        row["outcome"] == "refused"
    });
    let since = Instant::now();
    good(2).write(&fleet.mirror());
    all_live(&master, &["web2", "web3", "db1"], 2, since);
    let (text, status) = shown(&master);
    let set_aside = &status["rollout"]["set_aside"]["web1"];
    assert_eq!(set_aside["refused"]["generation"], 2, "{status}");
    assert!(text.contains("set aside"), "{text}");
    let mut alarms = status["alarms"].as_array().unwrap().iter();
    assert!(alarms.any(|it| it["name"] == "set-aside"), "{status}");
    assert_eq!(master.audit("set-aside")[0]["subject"], "web1");
    assert!(master.audit("halt").is_empty());
    // An operator ends it by hand, and can set a host aside.
    for (order, code) in [
        ("restore", 0),
        ("restore", 4),
        ("set-aside", 0),
        ("set-aside", 4),
    ] {
        let output = master.command(&["rollout", order, "web1", "--reason", "ticket 12"]);
        assert_eq!(output.status.code(), Some(code), "{order}: {output:?}");
    }
    let unknown = master.command(&["rollout", "set-aside", "web9"]);
    assert_eq!(unknown.status.code(), Some(4));
    let said = String::from_utf8(unknown.stderr).unwrap();
    assert!(said.contains("no agent `web9` is enrolled"), "{said}");
    assert_eq!(master.audit("counted-again").len(), 1);
}

#[test]
fn a_set_that_three_real_clamds_cannot_load_gets_no_further_and_is_taken_back() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mut master = master(&fleet);
    let names = ["web1", "web2", "web3"];
    let databases = names.map(|name| fleet.database(name));
    let mut clamds = Clamd::several([&databases[0], &databases[1], &databases[2]]);
    let mut agents: Vec<Agent> = names
        .iter()
        .zip(&clamds)
        .map(|(name, clamd)| fleet.agent_of(name, clamd))
        .collect();
    agents.push(fleet.agent("db1"));
    good(1).write(&fleet.mirror());
    master.start();
    for agent in &mut agents {
        agent.start();
    }
    for (name, clamd) in names.into_iter().zip(&mut clamds) {
        master.wait_agent(name, "the first set is there", |row| row["generation"] == 1);
        clamd.start();
    }
    for name in names.into_iter().chain(["db1"]) {
        master.wait_live(name, 1);
    }
    let since = Instant::now();
    bad(2).write(&fleet.mirror());
    let halt = master.wait_audit("halt", 1).remove(0);
    let took = since.elapsed().as_secs_f64();
    println!("halted after {took:.1} s: {}", halt["detail"]["reason"]);
    all_live(&master, &["web1", "web2", "web3", "db1"], 3, since);
    let offers = master.audit("offer").into_iter();
    let offers: Vec<_> = offers
        .filter(|offer| offer["subject"] == "db1")
        .map(|offer| offer["generation"].clone())
        .collect();
    assert_eq!(offers, [1, 3], "never 2");
    let (_, status) = shown(&master);
    assert_eq!(status["rollout"]["state"], "halted", "{status}");
    assert_eq!(status["rollout"]["set_aside"], serde_json::json!({}));
}

/// Starts the master and these agents, which have no clamd, and waits until all of them and the liar
/// are there.
fn start(master: &mut Master, agents: &mut [Agent]) {
    master.start();
    for agent in agents.iter_mut() {
        agent.start();
    }
    for agent in agents {
        let name = agent.name();
        master.wait_agent(&name, "it is there", |row| row["connected"] == true);
    }
}

#[test]
fn a_host_that_repeats_progress_delays_a_wave_for_its_deadline_only() {
    let fleet = Fleet::new();
    let mut master = master(&fleet);
    let mut agents = ["web2", "web3", "db1"].map(|name| fleet.agent(name));
    start(&mut master, &mut agents);
    let _liar = Liar::enter(&fleet, None, async |_, mut conversation, offer| {
        let phases = [
            Phase::Fetching,
            Phase::Staged,
            Phase::Swapping,
            Phase::Proving,
        ];
        let mut pace = interval(Duration::from_millis(100));
        for phase in phases.into_iter().cycle() {
            pace.tick().await;
            let progress = ToMaster::Progress {
                offer: offer.offer,
                phase,
                until: Some(jiff::Timestamp::MAX),
            };
            conversation.say(&progress).await;
            if conversation.connection.close_reason().is_some() {
                break;
            }
        }
        conversation
    });
    master.wait_agent("web1", "the liar is there", |row| row["connected"] == true);
    let since = Instant::now();
    good(1).write(&fleet.mirror());
    let waits = until(PATIENCE, "status names whom the wave waits for", || {
        let rollout = rollout(&master);
        let one = rollout["waits_for"]
            .as_array()
            .is_some_and(|it| it.len() == 1);
        if one { Ok(rollout) } else { Err(rollout) }
    });
    assert_eq!(waits["waits_for"][0]["agent"], "web1", "{waits}");
    assert!(waits["waits_for"][0]["until"].is_string(), "{waits}");
    shown(&master);
    all_live(&master, &["web2", "web3", "db1"], 1, since);
    let stragglers = master.wait_audit("stragglers", 1).remove(0);
    let reason = stragglers["detail"]["reason"].as_str().unwrap();
    assert!(reason.ends_with("without 1 of its hosts: web1"), "{reason}");
    assert_eq!(master.agent("web1").unwrap()["wanted"]["generation"], 1);
}

/// A link of 60 kbit/s.
const SLOW: Link = Link {
    loss: 0.0,
    delay: Duration::from_millis(20),
    bandwidth: Some(7_500),
    cut: false,
};

/// Four agents live at generation 1, of which `web1` is behind a slow link; then a large set is
/// published, and `web1` begins to fetch it.
fn with_a_slow_host(fleet: &Fleet) -> (Master, Vec<Agent>, UdpProxy, Instant) {
    let mut master = master(fleet);
    let proxy = UdpProxy::start(([127, 0, 0, 1], fleet.port()).into(), 1);
    let mut agents: Vec<_> = ["web1", "web2", "web3", "db1"]
        .into_iter()
        .map(|name| fleet.agent(name))
        .collect();
    let port = fleet.port();
    agents[0].configure(&format!("127.0.0.1:{port}"), &proxy.address().to_string());
    start(&mut master, &mut agents);
    good(1).write(&fleet.mirror());
    all_live(&master, &["web1", "web2", "web3", "db1"], 1, Instant::now());
    proxy.set(SLOW);
    let since = Instant::now();
    large(2).write(&fleet.mirror());
    master.wait_agent("web1", "it fetches", |row| row["outcome"] == "fetching");
    (master, agents, proxy, since)
}

#[test]
fn a_host_behind_60_kbit_s_delays_a_wave_for_its_deadline_only_and_catches_up() {
    let fleet = Fleet::new();
    let (master, _agents, proxy, since) = with_a_slow_host(&fleet);
    all_live(&master, &["web2", "web3", "db1"], 2, since);
    let row = master.agent("web1").unwrap();
    println!("web1 meanwhile: {} {}", row["outcome"], row["error"]);
    assert_eq!(row["generation"], 1, "{row}");
    shown(&master);
    assert_eq!(master.audit("rollout-paused").len(), 0);
    proxy.set(Link::default());
    all_live(&master, &["web1"], 2, since);
}

#[test]
fn a_host_that_is_killed_after_its_offer_is_not_waited_for_and_catches_up() {
    let fleet = Fleet::new();
    let (master, mut agents, proxy, since) = with_a_slow_host(&fleet);
    agents[0].kill();
    all_live(&master, &["web2", "web3", "db1"], 2, since);
    shown(&master);
    proxy.set(Link::default());
    agents[0].start();
    all_live(&master, &["web1"], 2, since);
}

#[test]
fn a_host_that_is_switched_off_delays_nobody_in_a_fleet_of_three() {
    let fleet = Fleet::new();
    let mut master = master(&fleet);
    // The only canary.
    let mut agents = ["web1", "db1", "db2"].map(|name| fleet.agent(name));
    start(&mut master, &mut agents);
    good(1).write(&fleet.mirror());
    all_live(&master, &["web1", "db1", "db2"], 1, Instant::now());
    agents[0].stop();
    master.wait_agent("web1", "it is off", |row| row["connected"] == false);
    let since = Instant::now();
    good(2).write(&fleet.mirror());
    all_live(&master, &["db1", "db2"], 2, since);
    let (_, status) = shown(&master);
    assert_eq!(status["rollout"]["state"], "complete", "{status}");
    // A restarted master does not wait for it either.
    master.kill();
    master.start();
    let since = Instant::now();
    good(3).write(&fleet.mirror());
    all_live(&master, &["db1", "db2"], 3, since);
    agents[0].start();
    all_live(&master, &["web1"], 3, since);
}

#[test]
fn a_liar_that_vanishes_does_not_hold_the_others() {
    let fleet = Fleet::new();
    let mut master = master(&fleet);
    let mut agents = ["web2", "web3", "db1"].map(|name| fleet.agent(name));
    start(&mut master, &mut agents);
    let (sent, offered) = std::sync::mpsc::channel();
    let liar = Liar::enter(&fleet, None, move |_, conversation, _| {
        sent.send(()).unwrap();
        async { conversation }
    });
    master.wait_agent("web1", "the liar is there", |row| row["connected"] == true);
    let since = Instant::now();
    good(1).write(&fleet.mirror());
    offered
        .recv_timeout(PATIENCE)
        .expect("it is offered the set");
    liar.leave();
    all_live(&master, &["web2", "web3", "db1"], 1, since);
}
