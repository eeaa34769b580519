//! What an agent reports as evidence against a set, and what as a fault of its host: with a real
//! clamd that lacks memory, one that rejects everything, and sets that are really bad.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clamcast_agent::clamd::proof::{CANARY, canary_number};
use clamcast_tests::lab::{
    Agent, Clamd, Container, Fleet, Master, PATIENCE, Update, hash_signature, signatures, until,
};
use clamcast_tests::require;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// The master does not load what it publishes, so that a set may be one that no clamd loads; and it
/// does not take one back, so that the numbers of generations are the test's.
const ALONE: &str = "require = []\nload_test = \"never\"\n[rollout]\nrollback_on_halt = false";

/// An address space, in KiB, in which clamd 1.4 loads a small set and not one of 50 MB. Measured: it
/// logs `Malformed database`.
const SMALL_MEMORY_KIB: u64 = 330_000;

/// What no ClamAV loads.
const BAD: &str = "Lab.Bad:0:*:no hexadecimal digits\n";

/// A fleet of one host.
struct Site {
    fleet: Fleet,
    master: Master,
}

impl Site {
    fn new() -> Self {
        let fleet = Fleet::new();
        let master = fleet.master(&fleet.mirror());
        master.configure("quiet = \"300ms\"", "quiet = \"20ms\"");
        master.configure("require = []", ALONE);
        let site = Self { fleet, master };
        let always = hash_signature(b"a sample", "Lab.Always");
        site.put(
            "daily.cud",
            Container::new("daily", 1).member("hsb", always).bytes(),
        );
        site
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        Update::begin(self.fleet.mirror()).put(name, content);
    }

    /// Publishes what the mirror has, also past a set that this host did not take.
    fn publish(&self) {
        until(PATIENCE, "it is published", || {
            let published = self.master.command(&["publish", "--supersede"]);
            published.status.code() == Some(0)
        });
    }

    /// Waits until generation 2 has come to this; the reason that the master shows.
    #[track_caller]
    fn wait_outcome(&self, outcome: &str) -> String {
        let row = self.master.wait_agent("web1", outcome, |row| {
            row["outcome"] == outcome
                && row["error"]
                    .as_str()
                    .is_some_and(|error| error.contains(".2: "))
        });
        row["error"].as_str().unwrap_or_default().to_owned()
    }

    fn row(&self) -> Value {
        self.master.agent("web1").unwrap_or_default()
    }
}

fn remembers_a_refusal(agent: &Agent) -> bool {
    agent.directory().join("state/refused.json").exists()
}

/// Starts an agent that finds no clamscan. Where the machine has one in the places in which every agent
/// looks, the agent runs in a mount namespace of its own that hides them, which takes root.
fn start_without_clamscan(site: &Site, agent: &mut Agent) {
    let agents_own = agent.process();
    let hide = "for it in /usr/bin/clamscan /usr/local/bin/clamscan; do \
                if [ -e $it ]; then mount --bind /dev/null $it || exit 1; fi; done; \
                export PATH=$0; exec \"$@\"";
    let usual = ["/usr/bin/clamscan", "/usr/local/bin/clamscan"];
    let is_here = usual.iter().any(|path| Path::new(path).exists());
    let mut process = match is_here {
        true => Command::new("unshare"),
        false => Command::new("sh"),
    };
    if is_here {
        process.args(["-m", "sh"]);
    }
    process.args(["-c", hide]).arg(site.fleet.join(""));
    process
        .arg(agents_own.get_program())
        .args(agents_own.get_args());
    if let Some(directory) = agents_own.get_current_dir() {
        process.current_dir(directory);
    }
    for (key, value) in agents_own.get_envs() {
        if let Some(value) = value {
            process.env(key, value);
        }
    }
    agent.launch(process);
    agent.wait_ready();
}

#[test]
fn a_clamd_that_lacks_memory_is_a_host_fault_and_live_once_it_has_some() {
    require!(Clamd, Clamscan);
    let mut site = Site::new();
    let (mut agent, mut clamd) = site.fleet.agent_and_clamd("web1");
    site.master.start_with(&mut agent, &mut clamd);
    clamd.limit_memory(Some(SMALL_MEMORY_KIB));
    clamd.restart();

    let body = |n: u64| {
        format!(
            "Lab.Body-{n}:1:*:{:064x}\n",
            n.wrapping_mul(0x9E37_79B9_7F4A_7C15)
        )
    };
    let bodies: String = (0..300_000).map(body).collect();
    let big = Container::new("daily", 2)
        .member("hsb", signatures(0..300_000))
        .member("ndb", bodies);
    site.put("daily.cud", big.bytes());
    site.publish();
    let said = site.wait_outcome("host_fault");
    assert!(said.contains("clamd: Malformed database"), "{said}");
    assert!(said.contains("clamscan can load it"), "{said}");
    assert!(said.contains("memory and limits"), "{said}");
    assert!(!remembers_a_refusal(&agent));
    let installed = fs::read(agent.database().join("daily.cud")).unwrap();
    assert!(installed == big.bytes(), "the set stays");

    clamd.limit_memory(None);
    clamd.restart();
    site.master.wait_live("web1", 2);
}

/// A mock of clamd that can be told to reject everything from now on: it logs the lines of a failed
/// load for every RELOAD, which no honest clamd does on demand. Before that, it shows the canary that
/// lies in the directory.
struct Mock {
    rejects: Arc<AtomicBool>,
    config: PathBuf,
}

impl Mock {
    fn start(site: &Site) -> Self {
        let (socket, log) = (site.fleet.join("mock.sock"), site.fleet.join("mock.log"));
        let config = site.fleet.join("mock.conf");
        let databases = site.fleet.database("web1");
        let lines = format!(
            "LocalSocket {}\nLogFile {}\nDatabaseDirectory {}\n",
            socket.display(),
            log.display(),
            databases.display()
        );
        fs::write(&config, lines).unwrap();
        fs::write(&log, "").unwrap();
        let listener = UnixListener::bind(socket).unwrap();
        let rejects = Arc::new(AtomicBool::new(false));
        let told = rejects.clone();
        // It ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let rejects = told.load(Ordering::Relaxed);
                // Whoever hangs up early gets no answer.
                let _ = stream.and_then(|stream| answer(stream, rejects, &log, &databases));
            }
        });
        Self { rejects, config }
    }
}

fn answer(
    mut stream: UnixStream,
    rejects: bool,
    log: &Path,
    databases: &Path,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut command = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte != [0] {
        command.push(byte[0]);
    }
    let said = match &command[..] {
        b"zPING" => "PONG".to_owned(),
        b"zRELOAD" => {
            let end = match rejects {
                true => {
                    "ERROR: reload_th: Database load failed: Malformed database\n\
                     WARNING: Database reload failed, keeping the previous instance\n"
                }
                false => {
                    "Database correctly reloaded (1 signatures)\n\
                     Activating the newly loaded database...\n"
                }
            };
            let mut log = File::options().append(true).open(log)?;
            log.write_all(format!("Reading databases from /db\n{end}").as_bytes())?;
            "RELOADING".to_owned()
        }
        b"zINSTREAM" => {
            let mut length = [0; 4];
            stream.read_exact(&mut length)?;
            let mut sample = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut sample)?;
            stream.read_exact(&mut length)?;
            let canary = fs::read_to_string(databases.join(CANARY)).unwrap_or_default();
            match canary_number(&canary) {
                Some(n) if !rejects && canary.contains(&hex::encode(Sha256::digest(&sample))) => {
                    format!("stream: Clamcast.Install-{n}.UNOFFICIAL FOUND")
                }
                Some(_) | None => "stream: OK".to_owned(),
            }
        }
        _ => "ClamAV 1.4.6".to_owned(),
    };
    stream.write_all(format!("{said}\0").as_bytes())
}

/// Offers a good set to a clamd that only logs failures; what the master shows then.
fn rejected_by_a_mock(clamscan: bool) -> (String, Site, Agent) {
    let mut site = Site::new();
    let mock = Mock::start(&site);
    let mut agent = site
        .fleet
        .agent_with("web1", &format!("config = {:?}", mock.config));
    site.master.start();
    match clamscan {
        true => agent.start(),
        false => start_without_clamscan(&site, &mut agent),
    }
    site.master.wait_live("web1", 1);
    mock.rejects.store(true, Ordering::Relaxed);
    site.put("own.ndb", "Lab.Own:0:*:deadbeefdeadbeef\n");
    site.publish();
    let said = site.wait_outcome("host_fault");
    assert!(said.contains("clamd: Malformed database"), "{said}");
    assert!(!remembers_a_refusal(&agent));
    (said, site, agent)
}

#[test]
fn a_clamd_that_only_logs_failures_is_a_host_fault_where_clamscan_loads_the_set() {
    require!(Clamscan);
    let (said, _site, agent) = rejected_by_a_mock(true);
    assert!(said.contains("clamscan can load it"), "{said}");
    assert_eq!(agent.names(), ["daily.cud", "own.ndb"], "the set stays");
}

#[test]
fn a_clamd_that_only_logs_failures_is_a_host_fault_without_clamscan_too() {
    let (said, _site, agent) = rejected_by_a_mock(false);
    assert!(said.contains("clamd does not load it either"), "{said}");
    assert_eq!(agent.names(), ["daily.cud"], "the previous set is back");
}

#[test]
fn without_clamscan_a_bad_set_is_refused_after_clamd_accepted_the_previous_one_in_between() {
    require!(Clamd);
    let mut site = Site::new();
    let (mut agent, mut clamd) = site.fleet.agent_and_clamd("web1");
    site.master.start();
    start_without_clamscan(&site, &mut agent);
    site.master.wait_installed("web1");
    clamd.start();
    site.master.wait_live("web1", 1);
    let before = clamd.log().len();
    site.put("bad.ndb", BAD);
    site.publish();
    let said = site.wait_outcome("refused");
    assert!(said.contains("Malformed database, twice"), "{said}");
    assert!(
        said.contains("accepted the previous set in between"),
        "{said}"
    );
    assert!(remembers_a_refusal(&agent));
    assert_eq!(agent.names(), ["daily.cud"]);

    let log = clamd.log()[before..].to_owned();
    let words = log.lines().filter_map(|line| {
        let failed = line.contains("Database load failed: Malformed database");
        let active = line.contains("Activating the newly loaded database");
        failed.then_some('x').or(active.then_some('o'))
    });
    let mut words: Vec<_> = words.collect();
    words.dedup();
    assert_eq!(words.iter().collect::<String>(), "xoxo", "{log}");
}

#[test]
fn where_clamd_logs_to_syslog_alone_a_bad_set_is_refused_after_twice_its_last_load() {
    require!(Clamd, Clamscan);
    let mut site = Site::new();
    let silent = |clamd: Clamd| clamd.without("LogFile").with("LogSyslog", "yes");
    let mut clamd = silent(Clamd::new(site.fleet.database("web1")));
    let mut agent = site.fleet.agent_of("web1", &clamd);
    site.master.start_with(&mut agent, &mut clamd);
    // The first set may have been seen without a RELOAD.
    site.put("own.ndb", "Lab.Own:0:*:deadbeefdeadbeef\n");
    site.publish();
    site.master.wait_live("web1", 2);
    let measured = fs::read_to_string(agent.directory().join("state/last-load")).unwrap();
    let millis: u64 = measured.trim_end().parse().unwrap();
    // Half the deadline, which counted before, is more than this test waits for anything.
    assert!(millis < 20_000, "{measured}");

    site.put("bad.ndb", BAD);
    site.publish();
    let row = site
        .master
        .wait_agent("web1", "refused", |row| row["outcome"] == "refused");
    let said = row["error"].as_str().unwrap_or_default();
    assert!(
        said.contains("Can't load bad.ndb: Malformed database"),
        "{row}"
    );
    assert!(!said.contains("clamd: "), "clamd has said nothing: {said}");
    assert_eq!(agent.names(), ["daily.cud", "own.ndb"]);
    assert_eq!(site.row()["outcome"], "refused");
    assert!(clamd.is_running());
}
