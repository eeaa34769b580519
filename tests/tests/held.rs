//! A mirror with one bad unit: what the fleet gets, and what `status` says.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clamcast_proto::Digest;
use clamcast_tests::lab::{
    Agent, Clamd, Container, Fleet, Master, PATIENCE, Scratch, Strace, signatures, until,
};
use clamcast_tests::require;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;

/// A file of a unit, and how its versions are made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Official,
    Container,
    Loose,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Official, Self::Container, Self::Loose];

    fn file(self) -> &'static str {
        match self {
            Self::Official => "daily.cud",
            Self::Container => "alpha.cud",
            Self::Loose => "feed.hsb",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Official => "official",
            Self::Container => "alpha",
            Self::Loose => "feed.hsb",
        }
    }

    /// A version of the file, with so many signatures.
    fn content(self, version: u64, count: u64) -> Vec<u8> {
        let lines = signatures(version * 1000..version * 1000 + count);
        let container = |base| Container::new(base, version).member("hsb", &*lines);
        match self {
            Self::Official => container("daily").bytes(),
            Self::Container => container("alpha").bytes(),
            Self::Loose => lines.into_bytes(),
        }
    }
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Unreadable,
    DanglingLink,
    Directory,
    Pipe,
    Empty,
    Structure,
    Signature,
    Unloadable,
    Shrunk,
    Older,
    BeingWritten,
}

impl Fault {
    /// Puts it in the place of a file. The result keeps it alive.
    fn apply(self, kind: Kind, site: &Site, version: u64) -> Option<Alive> {
        let path = site.mirror.join(kind.file());
        let next = kind.content(version, 100);
        let container = kind != Kind::Loose;
        match self {
            Self::Unreadable => {
                replace(&path, &next);
                let place = path.to_str().unwrap();
                let (pid, scratch) = (site.master.pid(), site.scratch.path());
                let strace = Strace::spoil(pid, scratch, "openat", place, "error=EACCES", "1+");
                return Some(Alive::Strace(strace));
            }
            Self::DanglingLink => {
                fs::remove_file(&path).unwrap();
                symlink("nowhere", &path).unwrap();
            }
            Self::Directory => {
                fs::remove_file(&path).unwrap();
                fs::create_dir(&path).unwrap();
            }
            Self::Pipe => {
                fs::remove_file(&path).unwrap();
                mkfifo(&path, Mode::S_IRWXU).unwrap();
            }
            Self::Empty => replace(&path, b""),
            Self::Structure if container => replace(&path, &next[..next.len() - 600]),
            Self::Signature if container => {
                fs::remove_file(&path).unwrap();
                replace(&path.with_extension("cld"), &next);
            }
            Self::Unloadable => {
                let base = path.file_stem().unwrap().to_str().unwrap();
                let container = Container::new(base, version)
                    .member("hsb", signatures(0..100))
                    .member("ndb", "Lab.Nonsense:0:*:these are no hexadecimal digits\n")
                    .bytes();
                let lines = [&next[..], b"no signature at all\n"].concat();
                replace(
                    &path,
                    if kind == Kind::Loose {
                        &lines
                    } else {
                        &container
                    },
                );
            }
            Self::Shrunk => replace(&path, &kind.content(version, 10)),
            Self::Older if container => replace(&path, &kind.content(version - 2, 100)),
            Self::BeingWritten => {
                let mut file = File::options().append(true).open(&path).unwrap();
                file.write_all(&next[..100]).unwrap();
                return Some(Alive::Writer(file));
            }
            Self::Structure | Self::Signature | Self::Older => return None, // a loose file has none
        }
        Some(Alive::Nothing)
    }
}

/// What keeps a fault alive.
#[expect(dead_code, reason = "dropping it ends the fault")]
enum Alive {
    Nothing,
    Writer(File),
    Strace(Strace),
}

/// Another loose file, which never has a fault.
const OTHER: &str = "good.hsb";

/// A fleet of one host, whose mirror has a file of each kind and one more.
struct Site {
    mirror: PathBuf,
    master: Master,
    agent: Agent,
    scratch: Scratch,
    _clamd: Clamd,
    _fleet: Fleet,
}

impl Site {
    fn new() -> Self {
        let fleet = Fleet::new();
        let mirror = fleet.mirror();
        write_all(&mirror, 1);
        let settings = "require = [\"daily\"]\nload_test = \"always\"\n[groups]\nweb = [\"web*\"]";
        let (mut master, mut agent, mut clamd) = fleet.one_host(settings);
        master.start_with(&mut agent, &mut clamd);
        Self {
            mirror,
            master,
            agent,
            scratch: Scratch::new(),
            _clamd: clamd,
            _fleet: fleet,
        }
    }

    fn status(&self) -> Value {
        self.master.json(&["status"]).unwrap_or_default()
    }

    /// The digests of the newest generation by name, with its number.
    fn newest(&self) -> (u64, Value) {
        let generations = self.master.json(&["generations"]).unwrap_or_default();
        let newest = generations.as_array().and_then(|it| it.last());
        let newest = newest.cloned().unwrap_or_default();
        let number = newest["generation"].as_u64().unwrap_or(0);
        (number, newest["files"].clone())
    }

    /// Waits until the newest generation has exactly these files and these units are held; then until the
    /// host is live with it. Returns the generation.
    #[track_caller]
    fn wait(&self, files: &[(&str, Vec<u8>)], held: &[&str]) -> u64 {
        let expected = |listed: &Value| {
            let has = |(name, content): &(&str, Vec<u8>)| {
                let digest = Digest::of(content).to_string();
                let mut listed = listed.as_array().into_iter().flatten();
                listed.any(|it| it["name"] == *name && it["sha256"] == digest)
            };
            listed.as_array().map(Vec::len) == Some(files.len()) && files.iter().all(has)
        };
        let generation = until(PATIENCE, "the others are published", || {
            let (generation, listed) = self.newest();
            let status = self.status();
            let units = status["held"].as_array().into_iter().flatten();
            let units: Vec<_> = units.map(|it| it["unit"].as_str().unwrap()).collect();
            match expected(&listed) && units == held {
                true => Ok(generation),
                false => Err(format!("{listed} {status}")),
            }
        });
        self.master.wait_live("web1", generation);
        for (name, content) in files {
            let installed = fs::read(self.agent.database().join(name)).unwrap();
            assert_eq!(Digest::of(&installed), Digest::of(content), "{name}");
        }
        generation
    }

    /// The line of `status` about a held unit.
    fn line(&self) -> String {
        let status = self.master.command(&["status"]);
        let text = String::from_utf8(status.stdout).unwrap();
        let lines = text.lines().filter(|line| line.starts_with("held: "));
        lines.collect::<Vec<_>>().join(" ")
    }

    fn remove(&self, kind: Kind) {
        let path = self.mirror.join(kind.file());
        for path in [path.with_extension("cld"), path] {
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)); // whatever it is
        }
    }
}

fn replace(path: &Path, content: &[u8]) {
    let part = path.with_extension("part");
    fs::write(&part, content)
        .and_then(|()| fs::rename(&part, path))
        .unwrap();
}

/// A version of all files.
fn all(version: u64) -> Vec<(&'static str, Vec<u8>)> {
    let kinds = Kind::ALL.map(|kind| (kind.file(), kind.content(version, 100)));
    let other = (OTHER, signatures(version..version + 100).into_bytes());
    kinds.into_iter().chain([other]).collect()
}

fn write_all(mirror: &Path, version: u64) {
    for (name, content) in all(version) {
        replace(&mirror.join(name), &content);
    }
}

fn check(kind: Kind) {
    require!(Clamd, Clamscan, Strace);
    let site = Site::new();
    let mut version = 1;
    for fault in [
        Fault::DanglingLink,
        Fault::Directory,
        Fault::Pipe,
        Fault::Empty,
        Fault::Structure,
        Fault::Signature,
        Fault::Unloadable,
        Fault::Shrunk,
        Fault::Older,
        Fault::BeingWritten,
        Fault::Unreadable,
    ] {
        let good = all(version);
        let next = all(version + 1);
        let Some(alive) = fault.apply(kind, &site, version + 1) else {
            continue;
        };
        for (name, content) in next.iter().filter(|(name, _)| *name != kind.file()) {
            replace(&site.mirror.join(name), content);
        }
        let choose = |(good, next): (_, &(&'static str, Vec<u8>))| match next.0 == kind.file() {
            true => good,
            false => next.clone(),
        };
        let mixed: Vec<_> = good.into_iter().zip(&next).map(choose).collect();
        if matches!(fault, Fault::BeingWritten) {
            // A program that has only begun is no news, and is not among the held units yet.
            site.wait(&mixed, &[]);
            let waits = site.status()["waits"].to_string();
            assert!(waits.contains(kind.file()), "{waits}");
            let ordered = site.master.command(&["publish"]);
            let said = String::from_utf8_lossy(&ordered.stdout).into_owned();
            assert!(said.contains("is open for writing"), "{said}");
            println!("| {fault:?} | {kind:?} | last version kept, others new | {waits} |");
        } else {
            site.wait(&mixed, &[kind.unit()]);
            println!(
                "| {fault:?} | {kind:?} | last version kept, others new | {} |",
                site.line()
            );
            assert_eq!(site.master.command(&["publish"]).status.code(), Some(4));
        }
        drop(alive);
        version += 2;
        site.remove(kind);
        write_all(&site.mirror, version);
        site.wait(&all(version), &[]);
    }
}

#[test]
fn whatever_is_wrong_with_the_official_databases_the_other_units_go_out() {
    check(Kind::Official);
}

#[test]
fn whatever_is_wrong_with_a_container_the_other_units_go_out() {
    check(Kind::Container);
}

#[test]
fn whatever_is_wrong_with_a_loose_file_the_other_units_go_out() {
    check(Kind::Loose);
}

#[test]
fn a_held_unit_stays_as_it_is_through_a_force_sync_a_pin_a_rollback_and_a_restored_master() {
    require!(Clamd, Clamscan);
    let mut site = Site::new();
    let feed = site.mirror.join(Kind::Loose.file());
    let mut second = all(2);
    replace(&feed, b"");
    for (name, content) in &second[..2] {
        replace(&site.mirror.join(name), content);
    }
    let first = all(1);
    (second[2], second[3]) = (first[2].clone(), first[3].clone());
    let generation = site.wait(&second, &["feed.hsb"]);

    let run = |site: &Site, arguments: &[&str]| {
        let output = site.master.command(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    run(&site, &["force-sync", "web1"]);
    run(&site, &["pin", "web"]);
    site.wait(&second, &["feed.hsb"]);
    run(&site, &["unpin", "web"]);
    run(&site, &["rollback", "1", "--reason", "a test"]);
    let back = site.wait(&first, &["feed.hsb"]);
    assert_eq!(back, generation + 1);
    // What was new in the generation that was taken back stays away; the other list does not.
    run(&site, &["rollout", "resume"]);
    let mut third = first.clone();
    third[3].1 = signatures(3000..3100).into_bytes();
    replace(&site.mirror.join(OTHER), &third[3].1);
    let held = ["official", "alpha", "feed.hsb"];
    let last = site.wait(&third, &held);
    let accepted = site
        .master
        .command(&["publish", "--accept", "a test", "alpha", "daily.cud"]);
    assert!(accepted.status.success(), "{accepted:?}");
    let mut fourth = third.clone();
    (fourth[0], fourth[1]) = (second[0].clone(), second[1].clone());
    let accepted = site.wait(&fourth, &["feed.hsb"]);
    assert!(accepted > last);

    // A master that lost its state has nothing to carry for the held list.
    site.master.stop();
    fs::remove_dir_all(site.master.directory().join("state")).unwrap();
    site.master.start();
    let mut left = fourth.clone();
    left.remove(2);
    site.master.wait_generation(accepted + 1); // before it knows the fleet it publishes 1.1
    site.wait(&left, &["feed.hsb"]);
    replace(&feed, &third[2].1);
    site.wait(&fourth, &[]);
}

#[test]
fn one_bad_list_of_fifty_delays_the_official_databases_by_one_load() {
    require!(Clamscan);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let list = |number: u64| mirror.join(format!("list-{number:02}.hsb"));
    let write = |version: u64| {
        for number in 0..50 {
            let lines = signatures(number * 1000 + version..number * 1000 + version + 200);
            replace(&list(number), lines.as_bytes());
        }
        replace(
            &mirror.join("daily.cud"),
            &Kind::Official.content(version, 20_000),
        );
    };
    write(1);
    let mut master = fleet.master(&mirror);
    master.configure(
        "require = []",
        "require = [\"daily\"]\nload_test = \"always\"",
    );
    master.start();
    master.wait_generation(1);
    let publish = |version: u64, bad: bool| {
        write(version);
        if bad {
            replace(&list(17), b"no signature at all\n");
        }
        let begun = Instant::now();
        master.wait_generation(version);
        begun.elapsed()
    };
    let (good, bad) = (publish(2, false), publish(3, true));
    println!("all good: {good:?} until published; one bad of fifty: {bad:?}");
    let status = master.json(&["status"]).unwrap();
    assert_eq!(status["held"][0]["unit"], "list-17.hsb");
    assert_eq!(status["held"].as_array().unwrap().len(), 1);
}
