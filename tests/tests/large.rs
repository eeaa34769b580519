//! A mirror with 6,000 loose files, on the way to a real agent and its clamd: a first install, one changed
//! file, a rollback.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clamcast_tests::lab::{Agent, Clamd, Fleet, Master, Update, Usage, hash_signature, until};
use clamcast_tests::require;
use serde_json::Value;

/// So many small databases. Their manifest does not fit a control frame uncompressed.
const FILES: usize = 6_000;

/// Only a failing test waits so long: the load test and clamd open every file, on two cores beside
/// other tests.
const LONG: Duration = Duration::from_secs(300);

fn name(number: usize) -> String {
    format!("feed-{number:04}-of-a-list-with-a-name.hsb")
}

fn signature(number: usize, version: u32) -> String {
    let sample = format!("sample {number} of version {version}");
    hash_signature(sample.as_bytes(), "Lab.Large")
}

/// What the test measures at one point.
struct Measured {
    at: Instant,
    received: u64,
    sent: u64,
}

struct Site {
    fleet: Fleet,
    master: Master,
    agent: Agent,
    clamd: Clamd,
}

impl Site {
    fn new() -> Self {
        let fleet = Fleet::new();
        let mirror = fleet.mirror();
        for number in 0..FILES {
            fs::write(mirror.join(name(number)), signature(number, 1)).unwrap();
        }
        let settings = "require = []\nload_test = \"never\"\n[rollout]\nwaves = [\"100%\"]";
        let (master, agent, clamd) = fleet.one_host(settings);
        Self {
            fleet,
            master,
            agent,
            clamd,
        }
    }

    /// Waits until the agent is live at a generation.
    fn wait_live(&self, generation: u64) -> Value {
        until(LONG, "it is live", || {
            let row = self.master.agent("web1").ok_or(Value::Null)?;
            let live = row["live"] == true && row["conformant"] == true;
            if live && row["generation"] == generation {
                Ok(row)
            } else {
                Err(row)
            }
        })
    }

    fn finds(&self, number: usize, version: u32) -> bool {
        let sample = format!("sample {number} of version {version}");
        let said = self.clamd.scan(sample.as_bytes()).expect("clamd answers");
        said.contains("FOUND")
    }

    fn measure(&self) -> Measured {
        let (received, sent) = traffic();
        Measured {
            at: Instant::now(),
            received,
            sent,
        }
    }

    /// Prints what a step has cost since `before`.
    fn report(&self, step: &str, before: &Measured) {
        let now = self.measure();
        let [master, agent] = [self.master.pid(), self.agent.pid()].map(Usage::of);
        println!(
            "{step}: {:.1} s, {} kB over loopback, agent {} MB ({} MB peak) {:.1} s CPU, master {} MB \
             {:.1} s CPU",
            now.at.duration_since(before.at).as_secs_f64(),
            (now.received - before.received + now.sent - before.sent) / 2 / 1000,
            agent.memory >> 20,
            agent.memory_peak >> 20,
            agent.processor.as_secs_f64(),
            master.memory >> 20,
            master.processor.as_secs_f64(),
        );
    }

    /// Bytes of the newest receipt in the audit log, as it is signed.
    fn receipt_bytes(&self) -> usize {
        let receipts = self.master.audit("receipt");
        let payload = &receipts.last().unwrap()["detail"]["receipt"]["payload"];
        payload.as_str().unwrap().len() * 3 / 4
    }
}

/// Bytes that loopback has received and sent. Other tests may add to it.
fn traffic() -> (u64, u64) {
    let table = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix("lo:"));
    let fields = line.into_iter().flat_map(str::split_whitespace);
    let numbers: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
    match numbers[..] {
        [received, _, _, _, _, _, _, _, sent, ..] => (received, sent),
        _ => (0, 0),
    }
}

fn count(directory: &Path) -> usize {
    let names = fs::read_dir(directory).unwrap().flatten();
    let is_feed = |name: &str| name.starts_with("feed-");
    names
        .filter(|entry| entry.file_name().to_str().is_some_and(is_feed))
        .count()
}

#[test]
fn six_thousand_loose_files_are_installed_updated_and_rolled_back() {
    require!(Clamd);
    let mut site = Site::new();
    let begin = site.measure();
    site.master.start();
    site.agent.start();
    until(LONG, "the first set is on disk", || {
        let row = site.master.agent("web1").ok_or(Value::Null)?;
        if row["outcome"] == "installed" {
            Ok(())
        } else {
            Err(row)
        }
    });
    site.report("first install, on disk", &begin);
    site.clamd.start();
    site.wait_live(1);
    site.report("first install, live", &begin);
    println!("receipt: {} bytes", site.receipt_bytes());
    assert_eq!(count(&site.agent.database()), FILES);
    assert!(site.finds(0, 1) && site.finds(FILES - 1, 1));

    let begin = site.measure();
    let changed = FILES / 2;
    Update::begin(site.fleet.mirror()).put(&name(changed), signature(changed, 2));
    site.wait_live(2);
    site.report("one changed file", &begin);
    println!("receipt: {} bytes", site.receipt_bytes());
    assert!(site.finds(changed, 2) && !site.finds(changed, 1));

    let begin = site.measure();
    assert!(site.master.command(&["rollback", "1"]).status.success());
    site.wait_live(3);
    site.report("rollback", &begin);
    assert!(site.finds(changed, 1) && !site.finds(changed, 2));
    assert_eq!(count(&site.agent.database()), FILES);

    // A restarted agent says what it has without sending the manifest again.
    site.agent.stop();
    let connected = |wanted: bool| {
        until(LONG, "the agent comes or goes", || {
            let row = site.master.agent("web1").ok_or(Value::Null)?;
            if row["connected"] == wanted {
                Ok(())
            } else {
                Err(row)
            }
        });
    };
    connected(false);
    let begin = site.measure();
    site.agent.start();
    connected(true);
    site.wait_live(3);
    site.report("reconnect", &begin);
}
