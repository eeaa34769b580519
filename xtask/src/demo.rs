//! `cargo xtask demo`: a fleet on this machine does the main job, and shows each step.
//!
//! What is shown is asserted: each `=>` line stands for something that was checked, and the demo
//! fails where it does not hold.

mod mirror;
mod screen;
mod stage;

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::Value;

use self::mirror::Mirror;
use self::screen::Screen;
use self::stage::{PATIENCE, Stage};
use crate::{command, debian, finish, programs, target};

/// A fleet on this machine that does the main job: a real freshclam, a real clamd, a master and
/// three agents.
///
/// Nothing is installed and no root is needed: ClamAV's programs that are not here are unpacked
/// from Debian's packages in the target directory, and all else happens in a directory for
/// temporary files, which is removed at the end, as all processes are ended.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Leave it running until Ctrl-C, and say how to look around
    #[arg(long)]
    keep: bool,
}

/// The hosts. Each has a directory of its name, which would be `/etc/clamcast` on a real one.
const HOSTS: [&str; 3] = ["web1", "db1", "db2"];

/// How the master is asked.
const MASTER: &str = "clamcast-master --socket master/admin.sock";

/// Builds the programs, tells the story, and cleans up, whatever came of it.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let screen = Screen::new();
    let target = target()?;
    build(&screen, &target)?;
    let mut stage = Stage::new(&screen, &target)?;
    let mut told = tell(&mut stage, &target);
    if told.is_ok() && arguments.keep {
        told = linger(&stage, &target);
    }
    if told.is_err() && stage.interrupted() {
        told = Err(anyhow::anyhow!("interrupted"));
    } else if told.is_err() {
        stage.show_logs();
    }
    // Nobody may be reading any more, and that is no reason to leave anything behind.
    let _ = screen.heading("Cleaning up");
    let cleaned = stage.end();
    let _ = match &cleaned {
        Ok(done) => screen.fact(done),
        Err(error) => screen.warning(&format!("{error:#}")),
    };
    told.and(cleaned.map(drop))
}

/// Builds what the demo runs, in the profile and the selection that the tests build too, so that
/// whoever runs one need not wait for most of the other. Nothing here is big enough to gain from the
/// release profile.
fn build(screen: &Screen, target: &Path) -> anyhow::Result<()> {
    screen.heading("The programs")?;
    let started = Instant::now();
    let line = "build --bins -p clamcast-master -p clamcast-agent -p clamcast-certs";
    screen.command(&format!("cargo {line}"))?;
    let arguments: Vec<_> = line.split(' ').collect();
    finish(command(&arguments).env("CARGO_TARGET_DIR", target))?;
    screen.fact(&format!("built in {} s", started.elapsed().as_secs()))?;
    if let Err(error) = debian::provide(target, &["clamd", "clamscan", "freshclam"]) {
        screen.warning(&format!("{error:#}"))?;
    }
    Ok(())
}

fn tell(stage: &mut Stage<'_>, target: &Path) -> anyhow::Result<()> {
    let clamd = programs::find("clamd", target).is_some();
    pki(stage)?;
    stage.screen().heading("A mirror")?;
    let mirror = Mirror::new(stage, target)?;
    mirror.first(stage)?;
    start(stage, clamd)?;
    update(stage, clamd, &mirror)?;
    mend(stage, &mirror)?;
    audit(stage)
}

fn pki(stage: &Stage<'_>) -> anyhow::Result<()> {
    stage.screen().heading("A PKI of the fleet's own")?;
    stage.run("clamcast-certs init --dir pki --fleet demo")?;
    let list = "Each of the others says as much; here is the list of what they made:";
    stage.screen().say(list)?;
    stage.run_quietly("clamcast-certs master --dir pki --host 127.0.0.1")?;
    stage.run_quietly("clamcast-certs agent --dir pki web1 --group canary")?;
    stage.run_quietly("clamcast-certs agent --dir pki db1")?;
    stage.run_quietly("clamcast-certs agent --dir pki db2")?;
    let list = stage.run("clamcast-certs list --dir pki")?;
    ensure!(
        list.matches(" valid ").count() == 1 + HOSTS.len(),
        "there should be a valid certificate for the master and each host"
    );
    Ok(())
}

/// Starts everything, and sees the first version reach every host.
fn start(stage: &mut Stage<'_>, clamd: bool) -> anyhow::Result<()> {
    let screen = stage.screen();
    screen.heading("A master, and agents that have no database yet")?;
    screen.say("Each host gets its bundle, here with the paths in agent.toml changed.")?;
    for host in HOSTS {
        stage.run(&format!("cp -r pki/agents/{host} ."))?;
    }
    configure(stage, clamd)?;
    stage.start(
        "clamcast-master -v serve --config master/master.toml",
        "master/log",
    )?;
    for host in HOSTS {
        stage.start(
            &format!("clamcast-agent run --config {host}/agent.toml"),
            &format!("{host}/log"),
        )?;
    }
    wait_for(stage, "web1", |row| row["generation"] == 1)?;
    if clamd {
        stage.run(&format!("{MASTER} agents"))?;
        screen.say(
            "web1 is `installed`, not `live`: its files are there, but no clamd was seen scanning\n\
             with them. It is the canary, and the others wait until it is live. Now that there are\n\
             databases, its clamd can start.",
        )?;
        stage.start("clamd --config-file web1/clamd.conf", "web1/clamd.stderr")?;
    }
    wait_live(stage, 1)?;
    stage.run(&format!("{MASTER} publish --wait"))?;
    let status = stage.run(&format!("{MASTER} status"))?;
    if status.contains("alarm") {
        screen.say("The alarm is right: ClamAV's test database is that old.")?;
    }
    stage.run(&format!("{MASTER} agents"))?;
    screen.fact("all hosts are live at generation 1")?;
    Ok(())
}

/// Updates the mirror, and sees what came of it on the hosts.
fn update(stage: &mut Stage<'_>, clamd: bool, mirror: &Mirror) -> anyhow::Result<()> {
    let screen = stage.screen();
    let sample = mirror.sample();
    screen.heading("An update of the mirror reaches every host")?;
    if clamd {
        screen
            .say("web1's clamd about a sample that only the next version of the database knows:")?;
        scan(stage, &sample, "OK")?;
    }
    mirror.second(stage)?;
    let updated = Instant::now();
    wait_live(stage, 2)?;
    screen.fact(&format!(
        "all hosts are live at generation 2, {:.1} s after the update (1 s to see that it is over)",
        updated.elapsed().as_secs_f64()
    ))?;
    stage.run(&format!("{MASTER} agents"))?;
    stage.run(&format!("{MASTER} generations"))?;

    let file = mirror.file();
    let sums = stage.run(&format!("sha256sum mirror/{file} */db/{file}"))?;
    let sums: Vec<_> = sums.lines().filter_map(|line| line.get(..64)).collect();
    ensure!(
        sums.len() == 1 + HOSTS.len() && sums.iter().all(|sum| *sum == sums[0]),
        "every host should have what the mirror has"
    );
    let size = fs::metadata(stage.path(&format!("mirror/{file}")))?.len();
    let log = stage.run(&format!(
        "grep 'sent agent=.* file={file} ' master/log | tail -n {}",
        HOSTS.len()
    ))?;
    let sent = log.lines().filter_map(|line| line.split_once(" bytes="));
    let sent: Vec<u64> = sent.flat_map(|(_, bytes)| bytes.parse()).collect();
    let most = sent.iter().copied().max().unwrap_or_default();
    ensure!(
        sent.len() == HOSTS.len() && most < size / 2,
        "each host should have got less than half of the {size} bytes"
    );
    screen.fact(&format!(
        "the file has {size} bytes; over the wire went {most} for each host, {:.1} %",
        most as f64 * 100.0 / size as f64
    ))?;

    screen.heading("The proof: does clamd scan with it?")?;
    if clamd {
        screen.say("web1's clamd about the same sample:")?;
        scan(stage, &sample, &format!("{} FOUND", sample.name))?;
        wait_for(stage, "web1", |row| row["clamd"]["proof"] == "canary")?;
        screen.say(
            "The agent did not take clamd's word for its reload: it installed a canary signature\n\
             made for this install alone, and saw clamd find it.",
        )?;
    } else {
        screen.warning("there is no clamd here; where there is none, installed counts as live")?;
    }
    stage.run("clamcast-agent --socket web1/admin.sock status")?;
    stage.run("clamcast-agent --socket web1/admin.sock verify")?;
    screen.fact("web1 has what was published, and says so")?;
    Ok(())
}

/// Writes the configuration of the master, the agents and clamd.
fn configure(stage: &Stage<'_>, clamd: bool) -> anyhow::Result<()> {
    // Free now; whoever would take it before the master does has many others to choose from.
    let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    stage.write(
        "master/master.toml",
        &format!(
            r#"fleet = "demo"
state = "state"
[mirror]
path = "../mirror"
quiet = "1s"
require = []
[listen]
quic = "127.0.0.1:{port}"
admin = "admin.sock"
http = ""
[tls]
ca = "../pki/ca.pem"
cert = "../pki/master/cert.pem"
key = "../pki/master/key.pem"
revoked = "../pki/revoked.json"
[signing]
manifest_key = "../pki/manifest.key"
audit_key = "../pki/audit.key"
keys = "../pki/manifest.pub"
"#
        ),
    )?;
    for host in HOSTS {
        let clamd = match host {
            "web1" if clamd => r#"config = "clamd.conf""#,
            _ => "config = \"\"\nsocket = \"none\"",
        };
        let drift = if host == "db2" { "report" } else { "repair" };
        stage.write(
            &format!("{host}/agent.toml"),
            &format!(
                r#"master = ["127.0.0.1:{port}"]
state = "state"
[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"
[trust]
keys = "manifest.pub"
[listen]
admin = "admin.sock"
[database]
path = "db"
drift = "{drift}"
[clamd]
{clamd}
"#
            ),
        )?;
        fs::create_dir(stage.path(&format!("{host}/db")))?;
    }
    let web1 = stage.path("web1").display().to_string();
    // Without checks of its own, so that every reload is one that the agent caused.
    stage.write(
        "web1/clamd.conf",
        &format!(
            "DatabaseDirectory {web1}/db\nLocalSocket {web1}/clamd.sock\nLogFile {web1}/clamd.log\n\
             LogTime yes\nForeground yes\nSelfCheck 0\n"
        ),
    )?;
    Ok(())
}

fn wait_live(stage: &mut Stage<'_>, generation: u64) -> anyhow::Result<()> {
    for host in HOSTS {
        wait_for(stage, host, |row| {
            row["generation"] == generation && row["live"] == true && row["conformant"] == true
        })?;
    }
    Ok(())
}

/// Waits until a host's row in `agents --json` is as `wanted` says.
fn wait_for(
    stage: &mut Stage<'_>,
    host: &str,
    wanted: impl Fn(&Value) -> bool,
) -> anyhow::Result<()> {
    stage.until(|stage| {
        let rows = stage.ask(&format!("{MASTER} agents --json"));
        let rows: Value = serde_json::from_str(&rows).unwrap_or_default();
        let row = rows.as_array().into_iter().flatten();
        match row.into_iter().find(|row| row["name"] == host) {
            Some(row) if wanted(row) => Ok(()),
            Some(row) => Err(format!("{host} is at {row}")),
            None => Err(format!("{host} is not connected")),
        }
    })
}

/// Has web1's clamd scan a few bytes, by the command INSTREAM of its protocol (clamd(8)).
fn scan(stage: &Stage<'_>, sample: &mirror::Sample, expected: &str) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(stage.path("web1/clamd.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = u32::try_from(sample.bytes.len())?.to_be_bytes();
    let end = 0_u32.to_be_bytes();
    stream.write_all(&[b"zINSTREAM\0", &length[..], &sample.bytes, &end].concat())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let answer = answer.trim_end_matches('\0');
    stage.screen().output(answer)?;
    ensure!(
        answer == format!("stream: {expected}"),
        "clamd should say {expected}"
    );
    Ok(())
}

fn mend(stage: &mut Stage<'_>, mirror: &Mirror) -> anyhow::Result<()> {
    let screen = stage.screen();
    screen.heading("Two hosts are broken: one mends itself, one is mended by force-sync")?;
    let file = mirror.file();
    let good = stage.ask(&format!("sha256sum < db1/db/{file}"));
    screen.say(
        "One byte is changed in place, size and time kept: rsync would never see it. First on db2,\n\
         which is told to report drift and leave the rest to operators (drift = \"report\").",
    )?;
    stage.run(&damage("db2", file))?;
    wait_for(stage, "db2", |row| row["conformant"] == false)?;
    stage.run(&format!("{MASTER} status"))?;
    stage.run(&format!("{MASTER} force-sync db2"))?;
    screen.say("The same on db1, which is left to itself:")?;
    stage.run(&damage("db1", file))?;
    stage.run("until clamcast-agent --socket db1/admin.sock verify; do sleep 1; done")?;
    for host in ["db1", "db2"] {
        ensure!(
            stage.ask(&format!("sha256sum < {host}/db/{file}")) == good,
            "{host} should have the published file again"
        );
    }
    screen.fact("db1 saw it, told the master, fetched the file again, and put it in place")?;
    stage.run(&format!("{MASTER} audit show --agent 'db*' --since 1m"))?;
    stage.run(&format!("{MASTER} status"))?;
    Ok(())
}

/// A command that changes a byte of a database and nothing else.
fn damage(host: &str, file: &str) -> String {
    format!(
        "touch -r {host}/db/{file} time && printf X | dd of={host}/db/{file} bs=1 seek=5000 \
         conv=notrunc status=none && touch -r time {host}/db/{file}"
    )
}

fn audit(stage: &Stage<'_>) -> anyhow::Result<()> {
    let screen = stage.screen();
    screen.heading("The audit log tells the story")?;
    stage.run(&format!("{MASTER} audit show --agent web1"))?;
    screen.say("web1's last receipt, which it signed with its key:")?;
    let show = format!("{MASTER} audit show --agent web1 --event receipt --json");
    let receipt = stage.run(&format!(
        r#"{show} | tail -n 1 | grep -o '"payload":"[^"]*' | cut -d '"' -f 4 | base64 -d"#
    ))?;
    let receipt: Value = serde_json::from_str(&receipt).context("the receipt is no JSON")?;
    ensure!(
        receipt["agent"] == "web1" && receipt["generation"] == 2 && receipt["outcome"] == "live",
        "this is not web1's receipt for generation 2"
    );
    stage.run("clamcast-master audit verify --config master/master.toml")?;
    screen.fact("every record is as it was written")?;

    let records = stage.ask(&show);
    let record: Value = serde_json::from_str(records.lines().last().unwrap_or_default())?;
    let line = record["seq"].as_u64().context("a record has no number")?;
    screen.say("In a copy, somebody makes the log say that web1 refused it:")?;
    stage.run("cp -r master/state/audit copy/")?;
    stage.run(&format!(
        r#"sed -i '{line}s/"outcome":"live"/"outcome":"refused"/' copy/audit/log.jsonl"#
    ))?;
    let verify = "clamcast-master audit verify --state copy --keys pki/manifest.pub";
    let found = stage.run_bad(verify, 1)?;
    ensure!(
        found.contains(&format!("line {line}:")),
        "line {line} was changed and should be named"
    );
    screen.fact("found, and where")?;
    Ok(())
}

/// Waits for Ctrl-C.
fn linger(stage: &Stage<'_>, target: &Path) -> anyhow::Result<()> {
    let screen = stage.screen();
    screen.heading("All of it goes on until Ctrl-C")?;
    screen.say("Look around from another terminal:")?;
    let target = target.display();
    screen.command(&format!("cd {}", stage.directory().display()))?;
    screen.command(&format!("PATH={target}/debug:$PATH:{target}/debian/bin"))?;
    screen.command(&format!("{MASTER} status"))?;
    screen.command(&format!("{MASTER} --help"))?;
    screen.command("clamcast-agent --socket db1/admin.sock status")?;
    screen.command("tail -f master/log db1/log")?;
    screen.say(&format!(
        "Break something: damage a file in mirror/ or db1/db/, end the clamd, and look again.\n\
         Ctrl-C here ends it, as does `kill {}`.",
        std::process::id()
    ))?;
    stage.wait_interrupted();
    Ok(())
}
