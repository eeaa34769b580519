//! The host that these tests are about, its sets, and what must hold on it whatever happens.

use clamcast_proto::receipt::InstallNumber;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use clamcast_agent::clamd::proof::{self, CANARY, GATE, Nonce, canary_number, gate_number};
use clamcast_tests::lab::{
    Agent, Clamd, Container, Fleet, Master, PATIENCE, Update, hash_signature, until,
};
use serde_json::Value;

/// Files by name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Set `version`: two containers, and a loose file whose name changes from one set to the next. Each
/// finds a sample of its own version, and the first one that every version finds.
pub(crate) fn set(version: u64) -> Files {
    let container = |name: &str| {
        let found = hash_signature(&sample(name, version), &format!("Lab.{name}-{version}"));
        let always = hash_signature(ALWAYS, "Lab.Always");
        let container = Container::new(name, version).member("hsb", found + &always);
        (format!("{name}.cud"), container.bytes())
    };
    let loose = format!(
        "Lab.loose-{version}:0:*:{}\n",
        hex::encode(sample("loose", version))
    );
    let name = if version.is_multiple_of(2) {
        "even.ndb"
    } else {
        "odd.ndb"
    };
    let mut set = Files::from(["daily", "main"].map(container));
    set.insert(name.to_owned(), loose.into_bytes());
    set
}

/// The master does not load what it publishes, so that a set may be one that clamd refuses; and it
/// does not take a refused one back, so that the numbers of generations are the test's.
pub(crate) const ALONE: &str =
    "require = []\nload_test = \"never\"\n[rollout]\nrollback_on_halt = false";

/// What every set finds.
pub(crate) const ALWAYS: &[u8] = b"a sample that is found by every set";

pub(crate) fn sample(name: &str, version: u64) -> Vec<u8> {
    format!("a sample that {name} {version} finds").into_bytes()
}

/// A fleet of one host, whose clamd and agent work on one directory.
pub(crate) struct Host {
    pub(crate) fleet: Fleet,
    pub(crate) master: Master,
    pub(crate) agent: Agent,
    pub(crate) clamd: Clamd,
    /// What was published last.
    pub(crate) version: u64,
}

impl Host {
    /// With set 1 live.
    pub(crate) fn new() -> Self {
        Self::bare(Fleet::new()).live()
    }

    /// With an empty mirror, and nothing that runs.
    pub(crate) fn bare(fleet: Fleet) -> Self {
        let (agent, clamd) = fleet.agent_and_clamd("web1");
        let master = fleet.master(&fleet.mirror());
        master.configure("quiet = \"300ms\"", "quiet = \"20ms\"");
        master.configure("require = []", ALONE);
        Self {
            fleet,
            master,
            agent,
            clamd,
            version: 0,
        }
    }

    /// Starts it all, with set 1.
    pub(crate) fn live(mut self) -> Self {
        self.publish();
        self.start();
        self
    }

    /// Starts it all, until generation 1 is live.
    pub(crate) fn start(&mut self) -> Value {
        self.master.start_with(&mut self.agent, &mut self.clamd)
    }

    /// Publishes the next set.
    pub(crate) fn publish(&mut self) {
        self.publish_with(None);
    }

    /// The same, with a file more.
    pub(crate) fn publish_with(&mut self, more: Option<(&str, &str)>) {
        let mut next = set(self.version + 1);
        next.extend(more.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())));
        let there = fs::read_dir(self.fleet.mirror()).unwrap();
        let there: Vec<_> = there
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let gone = there.iter().filter(|name| !next.contains_key(*name));
        let gone: Vec<_> = gone.map(String::as_str).collect();
        let put = next.iter().map(|(name, bytes)| (name.as_str(), &bytes[..]));
        self.put(&put.collect::<Vec<_>>(), &gone);
        self.version += 1;
        // Also past one that this host could not take: it is all of its wave.
        until(PATIENCE, "it is published", || {
            let published = self.master.command(&["publish", "--supersede"]);
            // 3: the master is still to be started.
            matches!(published.status.code(), Some(0 | 3))
        });
    }

    /// Puts files into the mirror and takes others away, all at once.
    pub(crate) fn put(&self, put: &[(&str, &[u8])], remove: &[&str]) {
        let update = Update::begin(self.fleet.mirror());
        for (name, bytes) in put {
            update.put(name, bytes);
        }
        for name in remove {
            update.remove(name);
        }
    }

    pub(crate) fn row(&self) -> Value {
        self.master.agent("web1").unwrap_or_default()
    }

    pub(crate) fn is_live(&self) -> bool {
        let row = self.row();
        row["generation"] == self.version && row["live"] == true
    }

    /// Waits until the last set is live by the agent's receipt.
    #[track_caller]
    pub(crate) fn wait_live(&self) {
        self.master.wait_live("web1", self.version);
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.agent.directory().join("state")
    }

    /// What clamd would load from the directory, canary and gate aside.
    pub(crate) fn there(&self) -> Files {
        let names = self.agent.names().into_iter();
        names
            .map(|name| {
                (
                    name.clone(),
                    fs::read(self.agent.database().join(name)).unwrap(),
                )
            })
            .collect()
    }

    pub(crate) fn proof_file(&self, name: &str) -> String {
        fs::read_to_string(self.agent.database().join(name)).unwrap()
    }

    /// Number of the canary on disk.
    pub(crate) fn canary(&self) -> InstallNumber {
        canary_number(&self.proof_file(CANARY)).expect("a canary is whole")
    }

    /// Waits until the last set has come to this; the reason that the master shows.
    #[track_caller]
    pub(crate) fn wait_failed(&self, outcome: &str) -> String {
        let about = format!(".{}: ", self.version);
        let row = self.master.wait_agent("web1", outcome, |row| {
            let error = row["error"].as_str().unwrap_or_default();
            row["outcome"] == outcome && error.contains(&about)
        });
        row["error"].as_str().unwrap_or_default().to_owned()
    }

    /// How often clamd began to load.
    pub(crate) fn loads(&self) -> usize {
        self.clamd.log().matches("Reading databases from").count()
    }

    pub(crate) fn finds(&self, name: &str, version: u64) -> bool {
        let said = self.clamd.scan(&sample(name, version)).unwrap();
        said == format!("stream: Lab.{name}-{version}.UNOFFICIAL FOUND")
    }

    pub(crate) fn finds_all_of(&self, version: u64) -> bool {
        ["daily", "main", "loose"]
            .iter()
            .all(|name| self.finds(name, version))
    }

    /// Makes clamd load what is there, as a reload of somebody else's would.
    pub(crate) fn load(&self) {
        let loads = || {
            self.clamd
                .log()
                .matches("Activating the newly loaded database")
                .count()
        };
        let before = loads();
        self.clamd.reload().unwrap();
        until(PATIENCE, "clamd to load what is there", || before < loads());
    }
}

/// What clamd cannot read.
pub(crate) const RUBBISH: &str = "Site.Own:0:*:no hexadecimal digits\n";

// The invariants.

/// Every name is whole, and a file of the old set or of the new one.
pub(crate) fn every_database_name_belongs_to_the_old_set_or_the_new_one(host: &Host, at: &str) {
    let sets = [set(host.version - 1), set(host.version)];
    for (name, bytes) in host.there() {
        let whole = sets.iter().any(|set| set.get(&name) == Some(&bytes));
        assert!(whole, "{at}: {name} is of no set");
    }
    assert!(gate_number(&host.proof_file(GATE)).is_some(), "{at}");
}

/// clamd loads whatever is there; and if it then answers to a canary that it was not seen with
/// before, it has all of the new set.
pub(crate) fn clamd_loads_it_and_a_new_canary_means_the_new_set(
    host: &Host,
    proven: InstallNumber,
    at: &str,
) {
    host.load();
    let canary = host.canary();
    let nonce = hex::decode(
        fs::read_to_string(host.state().join("nonce"))
            .unwrap()
            .trim(),
    );
    let nonce = Nonce(nonce.unwrap().try_into().unwrap());
    let said = host.clamd.scan(&proof::sample(&nonce, canary)).unwrap();
    if canary > proven && said.ends_with("FOUND") {
        assert!(
            host.finds_all_of(host.version),
            "{at}: {said} and not all of the set"
        );
    }
}

/// The directory holds the set, all of it and nothing else, and clamd scans with it.
#[track_caller]
pub(crate) fn the_last_set_is_there_and_live(host: &Host, at: &str) {
    assert!(
        host.there() == set(host.version),
        "{at}: {:?}",
        host.agent.names()
    );
    assert!(host.finds_all_of(host.version), "{at}");
    for name in ["daily", "main", "loose"] {
        assert!(
            !host.finds(name, host.version - 1),
            "{at}: {name} is still loaded"
        );
    }
}

/// A start takes away what a kill left half written in the state directory.
pub(crate) fn no_half_record_is_left(host: &Host, at: &str) {
    for directory in ["", "receipts", "audit"] {
        let names = fs::read_dir(host.state().join(directory)).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let half: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        assert!(half.len() <= 1, "{at}: {half:?}"); // one may be in the making
    }
}
