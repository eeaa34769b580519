//! The directory where the demo takes place, and its processes: it ends all of them and removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::screen::Screen;

/// How long to wait for what takes a moment. Reached only when something is wrong.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How long a process that was told to end may take. The daemons need less than a second.
const GRACE: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(50);

/// How much of each log is shown when the demo fails.
const LOG_LINES: usize = 15;

/// The directory, and what runs in it. Dropping it ends everything, too.
pub(super) struct Stage<'s> {
    screen: &'s Screen,
    directory: PathBuf,
    search_path: OsString,
    processes: Vec<Process>,
    interrupted: Arc<AtomicBool>,
}

struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl<'s> Stage<'s> {
    /// Makes the directory, where the system has those for temporary files: the path of a Unix
    /// socket must be short, and clamd's AppArmor profile allows it. From now on signals that would
    /// end us are only noted.
    pub(super) fn new(screen: &'s Screen, target: &Path) -> anyhow::Result<Self> {
        let interrupted = Arc::<AtomicBool>::default();
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, interrupted.clone())?;
        }
        let binaries = env::join_paths([target.join("debug")])?;
        let search_path = [binaries, crate::programs::search_path(target)?].join(OsStr::new(":"));
        let directory = env::temp_dir().join(format!("clamcast-demo-{}", process::id()));
        let made = DirBuilder::new().mode(0o700).create(&directory);
        made.with_context(|| format!("cannot make {}", directory.display()))?;
        let stage = Self {
            screen,
            directory,
            search_path,
            processes: Vec::new(),
            interrupted,
        };
        for name in ["mirror", "master", "copy"] {
            fs::create_dir(stage.path(name))?;
        }
        screen.say(&format!(
            "\nEverything happens in {}",
            stage.directory.display()
        ))?;
        Ok(stage)
    }

    /// Where to say what happens.
    pub(super) fn screen(&self) -> &'s Screen {
        self.screen
    }

    /// The directory.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of something in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Shows and runs a command line of the shell, which must succeed, and returns what it printed.
    pub(super) fn run(&self, line: &str) -> anyhow::Result<String> {
        let text = self.run_quietly(line)?;
        self.screen.output(&text)?;
        Ok(text)
    }

    /// The same without showing what it printed.
    pub(super) fn run_quietly(&self, line: &str) -> anyhow::Result<String> {
        self.screen.command(line)?;
        let (text, code) = self.output(line)?;
        if code != Some(0) {
            self.screen.bad_output(&text)?;
            bail!("`{line}` failed");
        }
        Ok(text)
    }

    /// Shows and runs a command that must end with this exit code, because it finds something bad.
    pub(super) fn run_bad(&self, line: &str, expected: i32) -> anyhow::Result<String> {
        self.screen.command(line)?;
        let (text, code) = self.output(line)?;
        self.screen.bad_output(&text)?;
        ensure!(
            code == Some(expected),
            "`{line}` ended with {code:?} instead of {expected}"
        );
        Ok(text)
    }

    /// What a command prints on standard output, without showing anything; nothing if it fails.
    pub(super) fn ask(&self, line: &str) -> String {
        let ran = self.shell(line).stderr(Stdio::null()).output();
        let text = ran.map(|ran| String::from_utf8_lossy(&ran.stdout).into_owned());
        text.unwrap_or_default()
    }

    /// Standard output and standard error, as they come.
    fn output(&self, line: &str) -> anyhow::Result<(String, Option<i32>)> {
        let ran = self.shell(&format!("exec 2>&1\n{line}")).output()?;
        if self.interrupted() {
            bail!("interrupted");
        }
        let text = String::from_utf8_lossy(&ran.stdout).into_owned();
        Ok((text, ran.status.code()))
    }

    fn shell(&self, line: &str) -> Command {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", line])
            .current_dir(&self.directory)
            .env("PATH", &self.search_path)
            .env_remove("CLAMCAST_LOG") // the demo reads the log
            .stdin(Stdio::null());
        shell
    }

    /// Shows a command line and leaves it running, in a process group of its own: Ctrl-C is for us.
    pub(super) fn start(&mut self, line: &str, log: &str) -> anyhow::Result<()> {
        self.screen.command(&format!("{line} 2>{log} &"))?;
        let log = self.path(log);
        let child = self
            .shell(&format!("exec {line}"))
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let name = line.to_owned();
        self.processes.push(Process { name, log, child });
        Ok(())
    }

    /// Polls a condition until it holds; its error is the state in which it does not yet.
    pub(super) fn until(
        &mut self,
        condition: impl Fn(&Self) -> Result<(), String>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(state) = condition(self) {
            if self.interrupted() {
                bail!("interrupted");
            }
            for process in &mut self.processes {
                if let Some(status) = process.child.try_wait()? {
                    bail!("`{}` ended with {status}", process.name);
                }
            }
            ensure!(
                Instant::now() < deadline,
                "after {} s still: {state}",
                PATIENCE.as_secs()
            );
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether somebody wants us to end.
    pub(super) fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Waits until somebody wants us to end.
    pub(super) fn wait_interrupted(&self) {
        while !self.interrupted() {
            thread::sleep(POLL);
        }
    }

    /// The end of every log, on standard error.
    pub(super) fn show_logs(&self) {
        for process in &self.processes {
            let log = fs::read_to_string(&process.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("\n---- `{}` said last", process.name);
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                eprintln!("{line}");
            }
        }
    }

    /// Ends all processes, the last one first, removes the directory, and says so.
    pub(super) fn end(&mut self) -> anyhow::Result<String> {
        let ended = self.processes.len();
        while let Some(mut process) = self.processes.pop() {
            end(&mut process.child).with_context(|| format!("cannot end `{}`", process.name))?;
        }
        let directory = self.directory.display();
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("cannot remove {directory}"))?;
        Ok(format!("{ended} processes ended, {directory} removed"))
    }

    /// Writes a file.
    pub(super) fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        // Only a panic comes here before `end`.
        if self.directory.exists() {
            let _ = self.end();
        }
    }
}

/// Asks a process to end, waits, and insists.
fn end(child: &mut Child) -> anyhow::Result<()> {
    // Until it is waited for, its number is nobody else's.
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    if child.try_wait()?.is_none() {
        kill(pid, Signal::SIGTERM)?;
    }
    let deadline = Instant::now() + GRACE;
    while child.try_wait()?.is_none() {
        if deadline <= Instant::now() {
            child.kill()?;
        }
        thread::sleep(POLL);
    }
    Ok(())
}
