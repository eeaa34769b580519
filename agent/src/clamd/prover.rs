//! Makes the host's clamds reload, and finds out what they scan with.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clamcast_daemon::{clamscan, input};
use clamcast_proto::container::Header;
use clamcast_proto::receipt::{ClamdReport, ClamdState, InstallNumber, Proof};
use jiff::civil::DateTime;
use tokio::sync::OnceCell;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;

use super::attempt::{Asked, Attempt, DEAD, End, Evidence, LoadTest, Sight, Step, Terms};
use super::client::{Clamd, ClamdError, Scan};
use super::last_load::LastLoad;
use super::log::Loads;
use super::proof::{Nonce, found_number, sample};
use super::scanner::{self, Fingerprint};
use super::settings::{Instance, ProofBy, Reload, Settings};
use super::signal;
use super::tail::Tail;
use crate::chain;

/// Load tests that are kept: of a set alone and beside the files of others, and of the set before.
const SCANS_MAX: usize = 4;

/// Why a proof was broken off: the agent stops.
const STOPPED: &str =
    "the agent stopped before clamd was seen with the install, its next start asks again";

/// Why a proof was broken off: something else needs the directory or clamd.
const INTERRUPTED: &str = "an install or a change of the databases interrupted the wait for clamd, \
                           the agent asks again";

/// What came of an install, as far as clamd is concerned.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Every clamd was seen scanning with it, or the host has none.
    Live(ClamdReport),
    /// clamd reported that it cannot use the databases, or `clamscan` did in its place. Whether the
    /// set is at fault is not decided yet: `install` does that.
    Refused {
        /// In the words of clamd, and of `clamscan` where it is there.
        reason: String,
        /// What `clamscan` made of the same files.
        scan: LoadTest,
        /// Whether clamd itself reported it and can load another set as a control.
        control: bool,
        /// What is known of clamd.
        report: ClamdReport,
    },
    /// It is not known: clamd is silent, or did not show the install in time.
    Unproven(ClamdReport),
    /// Nobody is there to ask.
    Absent(ClamdReport),
}

impl Verdict {
    /// What is known of clamd.
    pub fn report(&self) -> &ClamdReport {
        match self {
            Self::Live(report)
            | Self::Refused { report, .. }
            | Self::Unproven(report)
            | Self::Absent(report) => report,
        }
    }
}

/// A place in clamd's log.
#[derive(Debug)]
pub struct LogMark {
    tail: Option<Tail>,
}

/// Proves installs. Cheap to clone; the clones share what they know.
#[derive(Clone, Debug)]
pub struct Prover {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    nonce: Nonce,
    report: Mutex<ClamdReport>,
    /// The answers to VERSION, one for each clamd, as of the last look.
    versions: Mutex<Vec<Option<String>>>,
    last_load: LastLoad,
    /// Load tests of this install, the newest last.
    scans: Mutex<Vec<Scanned>>,
    watch: tokio::sync::Mutex<Option<Watch>>,
    /// Fires when the agent stops.
    stop: CancellationToken,
}

/// What goes on being known of an install that was not proven in time.
#[derive(Debug)]
struct Watch {
    install: InstallNumber,
    log: Log,
    evidence: Evidence,
}

/// A load test that is made once, whoever asks.
#[derive(Debug)]
struct Scanned {
    files: Fingerprint,
    test: Arc<OnceCell<LoadTest>>,
}

/// The log of one attempt.
#[derive(Debug, Default)]
struct Log {
    tail: Option<Tail>,
    loads: Loads,
}

impl Prover {
    /// A prover for the clamds of this host.
    pub fn new(settings: Settings, nonce: Nonce) -> Self {
        let stop = CancellationToken::new();
        Self::with_last_load(settings, nonce, LastLoad::default(), stop)
    }

    /// The same, which keeps the duration of clamd's last load in the directory `state`. `stop`
    /// fires when the agent stops, which is then the reason of a proof that was broken off. Blocking.
    pub fn with_state(
        settings: Settings,
        nonce: Nonce,
        state: &Path,
        stop: CancellationToken,
    ) -> Self {
        Self::with_last_load(settings, nonce, LastLoad::open(state), stop)
    }

    fn with_last_load(
        settings: Settings,
        nonce: Nonce,
        last_load: LastLoad,
        stop: CancellationToken,
    ) -> Self {
        let state = if settings.instances.is_empty() {
            ClamdState::None
        } else {
            ClamdState::default()
        };
        let report = ClamdReport {
            state,
            ..ClamdReport::default()
        };
        Self {
            shared: Arc::new(Shared {
                settings,
                nonce,
                report: Mutex::new(report),
                versions: Mutex::default(),
                last_load,
                scans: Mutex::default(),
                watch: tokio::sync::Mutex::default(),
                stop,
            }),
        }
    }

    /// How clamd is treated.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Where clamd's log ends now: after the renames, before the first RELOAD. What begins after
    /// it reads what is on disk now.
    pub fn mark(&self) -> LogMark {
        let settings = &self.shared.settings;
        let logs = settings.instances.iter().any(|instance| instance.logs);
        let Some(path) = settings.log_file.as_deref().filter(|_| logs) else {
            return LogMark { tail: None };
        };
        let tail = Tail::at_end(path);
        if let Err(error) = &tail {
            let path = path.display();
            tracing::warn!(%path, %error, "cannot read clamd's log; may this user read it?");
        }
        LogMark { tail: tail.ok() }
    }

    /// Asks every clamd to reload until it is seen with install `n`, or until there is evidence
    /// that it cannot use the databases, the deadline passes or `stop` fires. A clamd that was
    /// seen with it is not asked again, so that an install is one hit in its log.
    pub async fn prove(&self, n: InstallNumber, mark: LogMark, stop: CancellationToken) -> Verdict {
        let settings = &self.shared.settings;
        if settings.instances.is_empty() {
            return Verdict::Live(self.report());
        }
        *self.shared.watch.lock().await = None;
        let enough = stop.child_token();
        let mut tail = mark.tail;
        let mut attempts = JoinSet::new();
        for (index, instance) in settings.instances.iter().enumerate() {
            let courier = Courier {
                shared: self.shared.clone(),
                clamd: Clamd::new(instance.address.clone()),
                instance: instance.clone(),
                log: Log {
                    tail: tail.take_if(|_| instance.logs),
                    loads: Loads::default(),
                },
            };
            let (stop, enough) = (stop.clone(), enough.clone());
            attempts.spawn(async move { (index, courier.bring(n, stop, enough).await) });
        }
        let mut findings = BTreeMap::new();
        let mut load_took = None;
        while let Some(ended) = attempts.join_next().await {
            let (index, brought) = match ended {
                Ok(ended) => ended,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            };
            if matches!(brought.finding.end, End::Refused { .. }) {
                enough.cancel(); // The others would wait for what is perhaps taken back.
            }
            if let Some(watch) = brought.watch {
                *self.shared.watch.lock().await = Some(watch);
            }
            load_took = load_took.max(brought.load_took);
            findings.insert(index, brought.finding);
        }
        if let Some(took) = load_took {
            let shared = self.shared.clone();
            let kept = spawn_blocking(move || shared.last_load.keep(took)).await;
            kept.expect("writing a record does not panic");
        }
        self.conclude(findings.into_values().collect(), &stop).await
    }

    /// One look at every clamd, without a reload: for what was not proven in time, and at start. A
    /// clamd that answers and does not show the install was not asked since its deadline; then
    /// [`prove`](Self::prove) it again.
    pub async fn probe(&self, n: InstallNumber) -> Verdict {
        if self.shared.settings.instances.is_empty() {
            return Verdict::Live(self.report());
        }
        let mut watch = self.shared.watch.lock().await;
        if watch.as_ref().is_some_and(|watch| watch.install != n) {
            *watch = None;
        }
        if let Some(watch) = &mut *watch {
            for load in watch.log.read().await {
                watch.evidence.take(&load);
            }
        }
        let mut findings = Vec::new();
        for instance in &self.shared.settings.instances {
            let clamd = Clamd::new(instance.address.clone());
            let sight = self.shared.look(&clamd, n).await;
            let evidence = watch.as_ref().filter(|_| instance.logs);
            findings.push(self.shared.glance(clamd, sight, evidence).await);
        }
        drop(watch);
        self.conclude(findings, &CancellationToken::new()).await
    }

    /// What is known of clamd without asking.
    pub fn report(&self) -> ClamdReport {
        let report = self.shared.report.lock();
        report.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether every clamd was older than ClamAV 1.5 when it was asked last.
    pub fn ignores_signature_files(&self) -> bool {
        let versions = self.shared.versions.lock();
        let versions = versions.unwrap_or_else(PoisonError::into_inner);
        let is_before = |it: &Option<String>| it.as_deref().is_some_and(is_before_signature_files);
        !versions.is_empty() && versions.iter().all(is_before)
    }

    /// Asks every clamd whether it is there, and returns what is known then. It proves nothing.
    pub async fn look(&self) -> ClamdReport {
        let mut findings = Vec::new();
        for instance in &self.shared.settings.instances {
            let clamd = Clamd::new(instance.address.clone());
            let (state, trouble) = match clamd.ping().await {
                Ok(()) => (ClamdState::Up, None),
                Err(error) => (state_of(&error), Some(chain(&error))),
            };
            findings.push(
                self.shared
                    .finding(&clamd, End::Unproven, state, trouble, false)
                    .await,
            );
        }
        let mut report = report_of(&findings);
        report.proof = self.report().proof;
        self.remember(&report, &findings);
        report
    }

    /// A new install begins: `clamscan` may judge anew what it has judged before.
    pub fn begin_install(&self) {
        let scans = self.shared.scans.lock();
        scans.unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Loads `directory` with `clamscan`, once for each set of files in an install. It takes as much
    /// memory as clamd.
    pub async fn load_test(&self, directory: &Path) -> LoadTest {
        self.shared.load_test(directory.to_owned()).await
    }

    /// Every clamd must have it; one that reports a content error is enough to look for its cause.
    async fn conclude(&self, mut findings: Vec<Finding>, stop: &CancellationToken) -> Verdict {
        for finding in &mut findings {
            let reason = match finding.end {
                End::Live => continue,
                End::Refused { .. } => "it rejected the databases",
                End::Unproven | End::Absent => "it was not seen with the install yet",
            };
            finding.note.get_or_insert_with(|| reason.to_owned());
        }
        let report = report_of(&findings);
        self.remember(&report, &findings);
        let refusal = findings.iter().find_map(|finding| match &finding.end {
            End::Refused { clamd, scan } => Some((clamd.clone(), scan.clone())),
            End::Live | End::Unproven | End::Absent => None,
        });
        let any = |end| findings.iter().any(|finding| finding.end == end);
        if let Some((clamd, scan)) = refusal {
            let scanning = async {
                match scan {
                    Some(scan) => scan,
                    None => self.shared.load_test_of_databases().await,
                }
            };
            match stop.run_until_cancelled(scanning).await {
                Some(scan) => self.refused(clamd, scan, report),
                None => Verdict::Unproven(report),
            }
        } else if any(End::Unproven) {
            Verdict::Unproven(report)
        } else if any(End::Absent) {
            Verdict::Absent(report)
        } else {
            Verdict::Live(report)
        }
    }

    /// clamd's log says only what kind of error it is; the scanner names the file.
    fn refused(&self, clamd: Option<String>, scan: LoadTest, report: ClamdReport) -> Verdict {
        let concurrent = self.shared.settings.concurrent_reload;
        let control = clamd.is_some() && concurrent;
        let dead = (clamd.is_some() && !concurrent).then(|| DEAD.to_owned());
        let scanned = match &scan {
            LoadTest::Passed => Some("clamscan can load it".to_owned()),
            LoadTest::Failed(why) => Some(format!("clamscan: {why}")),
            LoadTest::Hindered(why) => Some(format!("clamscan could not tell: {why}")),
            LoadTest::Missing(_) => None,
        };
        let said: Vec<_> = [clamd, scanned, dead].into_iter().flatten().collect();
        Verdict::Refused {
            reason: said.join("; "),
            scan,
            control,
            report,
        }
    }

    fn remember(&self, report: &ClamdReport, findings: &[Finding]) {
        let known = self.shared.report.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = report.clone();
        let versions = findings.iter().map(|finding| finding.version.clone());
        let known = self.shared.versions.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = versions.collect();
    }
}

/// Whether an answer to VERSION is that of a clamd that reads no signature files.
fn is_before_signature_files(version: &str) -> bool {
    clamscan::parse_version(version).is_some_and(|it| it < clamscan::READS_SIGNATURE_FILES)
}

/// What was found out about one clamd.
#[derive(Debug)]
struct Finding {
    address: String,
    end: End,
    state: ClamdState,
    version: Option<String>,
    proof: Proof,
    note: Option<String>,
}

/// The worst state, the weakest proof; and every note, with the name of its clamd where there are
/// several.
fn report_of(findings: &[Finding]) -> ClamdReport {
    let named = findings.len() > 1;
    let mut note = String::new();
    for finding in findings {
        let Some(said) = &finding.note else { continue };
        if !note.is_empty() {
            note.push_str("; ");
        }
        if named {
            write!(note, "clamd at {}: ", finding.address).expect("a string takes everything");
        }
        note.push_str(said);
    }
    let state = [ClamdState::Down, ClamdState::Silent, ClamdState::Up];
    let proof = [Proof::None, Proof::Version, Proof::Canary];
    let worst = |state: &ClamdState| findings.iter().any(|finding| finding.state == *state);
    let weakest = |proof: &Proof| findings.iter().any(|finding| finding.proof == *proof);
    ClamdReport {
        state: state.into_iter().find(worst).unwrap_or(ClamdState::None),
        version: findings.iter().find_map(|finding| finding.version.clone()),
        proof: proof.into_iter().find(weakest).unwrap_or_default(),
        note: (!note.is_empty()).then_some(note),
    }
}

/// Brings one clamd to an install: carries out what its [`Attempt`] decides.
struct Courier {
    shared: Arc<Shared>,
    clamd: Clamd,
    instance: Instance,
    log: Log,
}

/// What a courier comes back with.
struct Brought {
    finding: Finding,
    watch: Option<Watch>,
    /// How long the load took that ended in a proof.
    load_took: Option<Duration>,
}

impl Courier {
    /// `stop` ends the waiting for all clamds, `enough` that for this one.
    async fn bring(
        mut self,
        n: InstallNumber,
        stop: CancellationToken,
        enough: CancellationToken,
    ) -> Brought {
        let settings = &self.shared.settings;
        let start = Instant::now();
        let logs = self.log.tail.is_some();
        let mut attempt = Attempt::new(Terms {
            start,
            deadline: start + settings.deadline,
            concurrent: settings.concurrent_reload,
            reloads: self.instance.reload != Reload::Never,
            logs,
            scanner: settings.scanner.is_some(),
            last_load: self.shared.last_load.get(),
        });
        let mut state = ClamdState::Silent;
        let carried = enough.run_until_cancelled(self.carry_out(n, &mut attempt, &mut state));
        let carried = carried.await;
        let mut trouble = attempt.trouble().map(str::to_owned);
        if carried.is_none() {
            let why = match (self.shared.stop.is_cancelled(), stop.is_cancelled()) {
                (true, _) => STOPPED,
                (false, true) => INTERRUPTED,
                (false, false) => "not proven when another clamd rejected the databases",
            };
            trouble = Some(match trouble {
                Some(last) => format!("{why}; before that: {last}"),
                None => why.into(),
            });
        }
        let end = carried.unwrap_or(End::Unproven);
        let finding = self
            .shared
            .finding(&self.clamd, end, state, trouble, logs)
            .await;
        let load_took = attempt.load_took();
        let watch = logs.then(|| Watch {
            install: n,
            log: self.log,
            evidence: attempt.into_evidence(),
        });
        Brought {
            finding,
            watch,
            load_took,
        }
    }

    async fn carry_out(
        &mut self,
        n: InstallNumber,
        attempt: &mut Attempt,
        state: &mut ClamdState,
    ) -> End {
        loop {
            for load in self.log.read().await {
                tracing::debug!(clamd = %self.instance.address, ?load, "clamd's log");
                attempt.logged(&load, Instant::now());
            }
            attempt.load_under_way(self.log.loads.under_way());
            match attempt.next(Instant::now()) {
                Step::Look => {
                    let sight = self.shared.look(&self.clamd, n).await;
                    *state = sight_state(&sight);
                    attempt.seen(sight, Instant::now());
                }
                Step::Reload => {
                    let asked = self.ask().await;
                    tracing::debug!(clamd = %self.instance.address, ?asked, "asked for a reload");
                    attempt.asked(asked, Instant::now());
                }
                Step::LoadTest => {
                    let test = self.shared.load_test_of_databases().await;
                    attempt.tested(test);
                }
                Step::Wait(until) => sleep_until(until.into()).await,
                Step::Done(end) => return end,
            }
        }
    }

    async fn ask(&self) -> Asked {
        if let Reload::Signal(pid_file) = &self.instance.reload {
            match signal::reload(pid_file) {
                Ok(()) => return Asked::Taken,
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "clamd gets RELOAD over its socket instead");
                }
            }
        }
        match self.clamd.reload().await {
            Ok(()) => Asked::Taken,
            Err(ClamdError::Unavailable { .. }) => Asked::NotAllowed,
            Err(error @ ClamdError::Absent { .. }) => Asked::Absent(chain(&error)),
            Err(error) => Asked::Failed(chain(&error)),
        }
    }
}

impl Shared {
    async fn load_test_of_databases(&self) -> LoadTest {
        self.load_test(self.settings.database_directory.clone())
            .await
    }

    /// Runs `clamscan`, or returns what it said of the same files before.
    async fn load_test(&self, directory: PathBuf) -> LoadTest {
        let place = directory.clone();
        let files = match spawn_blocking(move || Fingerprint::of(&place)).await {
            Ok(files) => files,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let Some(files) = files else {
            return LoadTest::Hindered("the directory cannot be read".into());
        };
        let test = self.scanned(files);
        let load = || scanner::load(&self.settings, &directory);
        test.get_or_init(load).await.clone()
    }

    fn scanned(&self, files: Fingerprint) -> Arc<OnceCell<LoadTest>> {
        let mut scans = self.scans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = scans.iter().find(|known| known.files == files) {
            return known.test.clone();
        }
        let test = Arc::<OnceCell<LoadTest>>::default();
        scans.push(Scanned {
            files,
            test: test.clone(),
        });
        let surplus = scans.len().saturating_sub(SCANS_MAX);
        scans.drain(..surplus);
        test
    }

    /// One look. PING goes first: a clamd that is busy with a blocking load would scan an
    /// abandoned sample later, and log a hit that nobody waits for.
    async fn look(&self, clamd: &Clamd, n: InstallNumber) -> Sight {
        if let Err(error) = clamd.ping().await {
            return sight_of(error);
        }
        match self.settings.proof {
            ProofBy::Canary => match clamd.scan(&sample(&self.nonce, n)).await {
                Ok(Scan::Found(name)) if found_number(&name) == Some(n) => Sight::Canary,
                Ok(Scan::Clean) => Sight::NoCanary(None),
                Ok(Scan::Found(said) | Scan::Error(said)) => Sight::NoCanary(Some(said)),
                Err(error) => sight_of(error),
            },
            ProofBy::Version => match clamd.version().await {
                Ok(version) => match daily(self.settings.database_directory.clone()).await {
                    None => Sight::VersionUnknown,
                    Some(daily) if names(&version, &daily) => Sight::VersionRight,
                    Some(_) => Sight::VersionWrong(version),
                },
                Err(ClamdError::Unavailable { .. }) => Sight::VersionUnknown,
                Err(error) => sight_of(error),
            },
        }
    }

    /// What a single look comes to, with what the log has shown since the install.
    async fn glance(&self, clamd: Clamd, sight: Sight, watch: Option<&Watch>) -> Finding {
        let state = sight_state(&sight);
        let loaded = watch.map(|watch| watch.evidence.loaded());
        let (end, trouble) = match sight {
            Sight::Canary => (End::Live, None),
            // Without a log since the install VERSION is all there is.
            Sight::VersionRight if loaded != Some(false) => (End::Live, None),
            Sight::VersionUnknown if loaded == Some(true) => (End::Live, None),
            Sight::VersionRight | Sight::VersionUnknown => (End::Unproven, None),
            Sight::NoCanary(said) => (End::Unproven, said),
            Sight::VersionWrong(version) => {
                (End::Unproven, Some(format!("VERSION says `{version}`")))
            }
            Sight::Absent(error) => (End::Absent, Some(error)),
            Sight::Forbidden(error) | Sight::Silent(error) => (End::Unproven, Some(error)),
        };
        let refusal = watch.and_then(|watch| watch.evidence.refusal());
        let end = match refusal {
            Some(reason) if end != End::Live => End::Refused {
                clamd: Some(reason),
                scan: None,
            },
            Some(_) | None => end,
        };
        self.finding(&clamd, end, state, trouble, watch.is_some())
            .await
    }

    async fn finding(
        &self,
        clamd: &Clamd,
        end: End,
        state: ClamdState,
        trouble: Option<String>,
        watched: bool,
    ) -> Finding {
        let version = match state {
            ClamdState::Up => clamd.version().await.ok(),
            ClamdState::Down | ClamdState::Silent | ClamdState::None => None,
        };
        let live = end == End::Live;
        let (proof, note) = match self.settings.proof {
            ProofBy::Canary if live => (Proof::Canary, trouble),
            ProofBy::Version if live => (Proof::Version, Some(self.weakness(watched))),
            ProofBy::Canary | ProofBy::Version => (Proof::None, trouble),
        };
        Finding {
            address: clamd.address().to_string(),
            end,
            state,
            version,
            proof,
            note,
        }
    }

    fn weakness(&self, watched: bool) -> String {
        let why = if self.settings.official_only {
            "OfficialDatabaseOnly yes, so that clamd loads no canary"
        } else {
            "proof = \"version\""
        };
        let what = if watched {
            "VERSION and clamd's log"
        } else {
            "VERSION alone"
        };
        format!("{why}: the proof is {what}")
    }
}

impl Log {
    /// The loads that ended since the last call. A log that cannot be read any more shows nothing.
    async fn read(&mut self) -> Vec<super::log::Load> {
        let Some(mut tail) = self.tail.take() else {
            return Vec::new();
        };
        let mut loads = std::mem::take(&mut self.loads);
        // A busy log may have grown by megabytes.
        let reading = spawn_blocking(move || {
            let ended = tail.read(&mut loads);
            (tail, loads, ended)
        });
        let (tail, loads, ended) = match reading.await {
            Ok(read) => read,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.tail = Some(tail);
        self.loads = loads;
        ended.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot read clamd's log");
            Vec::new()
        })
    }
}

/// What VERSION names in `directory`: it prefers `.cld` and `.cvd`, the higher version of them, and
/// is read from the disk because that is what clamd read.
async fn daily(directory: PathBuf) -> Option<Header> {
    let header = move |extension: &str| {
        let path = directory.join("daily").with_extension(extension);
        Header::read(input::open(&path).ok()?).ok()
    };
    let reading = spawn_blocking(move || {
        let signed = ["cvd", "cld"].into_iter().filter_map(&header);
        signed
            .max_by_key(|header| header.version)
            .or_else(|| header("cud"))
    });
    reading.await.ok().flatten()
}

/// Whether an answer to VERSION names this daily database: its version, and its time in whatever
/// zone clamd lives (`ClamAV 1.4.6/101/Sun Nov 22 06:43:59 2026`).
fn names(version: &str, daily: &Header) -> bool {
    let mut fields = version.splitn(3, '/').skip(1);
    let number = fields.next().and_then(|number| number.parse().ok());
    let time = fields.next().unwrap_or_default();
    number == Some(daily.version) && is_somewhere(time, daily.built)
}

/// Whether `local`, as ctime(3) writes it, is `time` in some zone: less than 15 hours away, by
/// whole quarters of an hour.
fn is_somewhere(local: &str, time: jiff::Timestamp) -> bool {
    let Ok(local) = DateTime::strptime("%a %b %e %H:%M:%S %Y", local) else {
        return false;
    };
    let Ok(local) = local.to_zoned(jiff::tz::TimeZone::UTC) else {
        return false;
    };
    let away = local.timestamp().as_second().abs_diff(time.as_second());
    away < 15 * 3600 && away % (15 * 60) == 0
}

fn sight_of(error: ClamdError) -> Sight {
    let said = chain(&error);
    match error {
        ClamdError::Absent { .. } => Sight::Absent(said),
        ClamdError::Forbidden { .. } => Sight::Forbidden(said),
        ClamdError::Silent { .. }
        | ClamdError::Unavailable { .. }
        | ClamdError::Unexpected { .. } => Sight::Silent(said),
    }
}

fn state_of(error: &ClamdError) -> ClamdState {
    match error {
        ClamdError::Absent { .. } => ClamdState::Down,
        ClamdError::Forbidden { .. }
        | ClamdError::Silent { .. }
        | ClamdError::Unavailable { .. }
        | ClamdError::Unexpected { .. } => ClamdState::Silent,
    }
}

fn sight_state(sight: &Sight) -> ClamdState {
    match sight {
        Sight::Absent(_) => ClamdState::Down,
        Sight::Forbidden(_) | Sight::Silent(_) => ClamdState::Silent,
        Sight::Canary
        | Sight::NoCanary(_)
        | Sight::VersionRight
        | Sight::VersionWrong(_)
        | Sight::VersionUnknown => ClamdState::Up,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    use super::super::client::Address;
    use super::super::fake::Fake;
    use super::*;

    const NONCE: Nonce = Nonce([7; 16]);
    const VERSION: &[u8] = b"ClamAV 1.4.6/101/Sun Nov 22 06:43:59 2026\0";

    /// A directory with a log and databases, and what is asked of its clamds.
    struct Host {
        directory: tempfile::TempDir,
        proof: ProofBy,
        deadline: Duration,
        scanner: Option<PathBuf>,
    }

    impl Host {
        fn new() -> Self {
            Self {
                directory: tempfile::tempdir().unwrap(),
                proof: ProofBy::Canary,
                deadline: Duration::from_secs(60),
                scanner: None,
            }
        }

        /// Puts a shell script in the place of clamscan: a mock, which counts its runs in `runs` and
        /// says what the real one says only under conditions that a test cannot make.
        fn with_scanner(mut self, script: &str) -> Self {
            let path = self.directory.path().join("clamscan");
            let runs = self.directory.path().join("runs");
            let text = format!("#!/bin/sh\necho run >> {}\n{script}\n", runs.display());
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            self.scanner = Some(path);
            self
        }

        fn scanner_runs(&self) -> usize {
            let runs = fs::read_to_string(self.directory.path().join("runs"));
            runs.unwrap_or_default().lines().count()
        }

        fn log(&self) -> PathBuf {
            self.directory.path().join("clamav.log")
        }

        /// The first address is the one whose log we have.
        fn prover(&self, addresses: &[Address]) -> Prover {
            let instance = |(index, address): (usize, &Address)| Instance {
                address: address.clone(),
                reload: Reload::Command,
                logs: index == 0,
            };
            let settings = Settings {
                instances: addresses.iter().enumerate().map(instance).collect(),
                log_file: Some(self.log()),
                concurrent_reload: true,
                proof: self.proof,
                official_only: false,
                database_directory: self.directory.path().to_owned(),
                scanner: self.scanner.clone(),
                deadline: self.deadline,
                splay: Duration::ZERO,
                user: None,
            };
            Prover::new(settings, NONCE)
        }

        async fn prove(&self, addresses: &[Address], n: u64) -> String {
            let prover = self.prover(addresses);
            let stop = CancellationToken::new();
            words_of(&prover.prove(InstallNumber(n), prover.mark(), stop).await)
        }
    }

    /// Verdict, state, proof and note, or the reason of a refusal.
    fn words_of(verdict: &Verdict) -> String {
        let report = verdict.report();
        let state = format!("{:?} {:?}", report.state, report.proof).to_lowercase();
        let (word, said) = match verdict {
            Verdict::Live(_) => ("live", report.note.as_deref()),
            Verdict::Refused { reason, .. } => ("refused", Some(reason.as_str())),
            Verdict::Unproven(_) => ("unproven", report.note.as_deref()),
            Verdict::Absent(_) => ("absent", report.note.as_deref()),
        };
        format!("{word}, {state}: {}", said.unwrap_or("-"))
    }

    /// A clamd that scans with install `n` after it was asked `reloads` times.
    fn clamd(n: u64, reloads: u64) -> Fake {
        let asked = AtomicU64::new(0);
        Fake::new(move |command| {
            let found = || format!("stream: Clamcast.Install-{n}.UNOFFICIAL FOUND\0");
            Some(match command {
                "PING" => b"PONG\0".to_vec(),
                "VERSION" => VERSION.to_vec(),
                "RELOAD" => {
                    asked.fetch_add(1, SeqCst);
                    b"RELOADING\0".to_vec()
                }
                _ if asked.load(SeqCst) >= reloads => found().into_bytes(),
                _ => b"stream: OK\0".to_vec(),
            })
        })
    }

    #[tokio::test]
    async fn without_a_clamd_an_install_is_live() {
        let host = Host::new();
        assert_eq!(host.prove(&[], 7).await, "live, none none: -");
    }

    #[tokio::test]
    async fn a_clamd_that_is_seen_with_the_install_is_live() {
        let fake = clamd(7, 1);
        let verdict = Host::new().prove(&[fake.address()], 7).await;
        assert_eq!(verdict, "live, up canary: -");
    }

    #[tokio::test]
    async fn each_of_several_clamds_is_proven_and_none_twice() {
        let (quick, slow) = (clamd(7, 0), clamd(7, 2));
        let verdict = Host::new()
            .prove(&[quick.address(), slow.address()], 7)
            .await;
        assert_eq!(verdict, "live, up canary: -");
        let scans = |fake: &Fake| fake.asked().iter().filter(|c| *c == "INSTREAM").count();
        assert_eq!(scans(&quick), 1);
        assert!(scans(&slow) > 1);
        assert!(!quick.asked().contains(&"RELOAD".to_owned()));
    }

    #[tokio::test]
    async fn one_clamd_down_keeps_the_install_from_being_live() {
        let (up, mut down) = (clamd(7, 0), clamd(7, 0));
        down.kill().await;
        let (up, down) = (up.address(), down.address());
        let mut host = Host::new();
        host.deadline = Duration::from_millis(50);
        let verdict = host.prove(&[up, down.clone()], 7).await;
        let expected = format!(
            "absent, down none: clamd at {down}: no clamd at {down}: Connection refused (os error 111)"
        );
        assert_eq!(verdict, expected);
    }

    #[tokio::test]
    async fn another_install_is_not_this_one() {
        let fake = clamd(6, 0);
        let mut host = Host::new();
        host.deadline = Duration::from_millis(50);
        let verdict = host.prove(&[fake.address()], 7).await;
        let expected = "unproven, up none: to the sample it said `Clamcast.Install-6.UNOFFICIAL`";
        assert_eq!(verdict, expected);
    }

    #[tokio::test]
    async fn a_silent_clamd_leaves_it_unproven() {
        let fake = Fake::new(|_| Some(Vec::new()));
        let mut host = Host::new();
        host.deadline = Duration::from_millis(50);
        let verdict = host.prove(&[fake.address()], 7).await;
        assert!(
            verdict.starts_with("unproven, silent none: clamd at"),
            "{verdict}"
        );
    }

    #[tokio::test]
    async fn stopping_ends_the_wait() {
        let fake = Fake::new(|_| None);
        let prover = Host::new().prover(&[fake.address()]);
        let stop = CancellationToken::new();
        stop.cancel();
        let verdict = words_of(&prover.prove(InstallNumber(7), prover.mark(), stop).await);
        assert_eq!(verdict, format!("unproven, silent none: {INTERRUPTED}"));
    }

    #[tokio::test]
    async fn a_proof_that_is_broken_off_names_the_agents_stop_only_if_the_agent_stops() {
        let fake = clamd(6, 0);
        let state = tempfile::tempdir().unwrap();
        for (agent_stops, why) in [(false, INTERRUPTED), (true, STOPPED)] {
            let (agent, probe) = (CancellationToken::new(), CancellationToken::new());
            let settings = Host::new().prover(&[fake.address()]).settings().clone();
            let prover = Prover::with_state(settings, NONCE, state.path(), agent.clone());
            let proving = prover.prove(InstallNumber(7), prover.mark(), probe.clone());
            let stopping = async {
                while fake.asked().len() < 3 {
                    tokio::task::yield_now().await;
                }
                if agent_stops {
                    agent.cancel();
                }
                probe.cancel();
            };
            let (verdict, ()) = tokio::join!(proving, stopping);
            let said = words_of(&verdict);
            assert!(said.contains(why), "{said}");
        }
    }

    #[tokio::test]
    async fn of_several_clamds_those_that_did_not_prove_the_install_are_named() {
        let (live, other) = (
            clamd(7, 0),
            Fake::new(|command| {
                Some(match command {
                    "PING" => b"PONG\0".to_vec(),
                    "VERSION" => VERSION.to_vec(),
                    "RELOAD" => b"RELOADING\0".to_vec(),
                    _ => b"stream: OK\0".to_vec(),
                })
            }),
        );
        let mut host = Host::new();
        host.deadline = Duration::from_millis(50);
        let verdict = host.prove(&[live.address(), other.address()], 7).await;
        let expected = format!(
            "unproven, up none: clamd at {}: it was not seen with the install yet",
            other.address()
        );
        assert_eq!(verdict, expected);
    }

    /// A clamd that never finds the canary, and for each RELOAD writes these lines into its log.
    fn logging(host: &Host, lines: &'static str) -> Fake {
        let log = host.log();
        Fake::new(move |command| {
            Some(match command {
                "PING" => b"PONG\0".to_vec(),
                "VERSION" => VERSION.to_vec(),
                "RELOAD" => {
                    let log = File::options().append(true).create(true).open(&log);
                    log.unwrap().write_all(lines.as_bytes()).unwrap();
                    b"RELOADING\0".to_vec()
                }
                _ => b"stream: OK\0".to_vec(),
            })
        })
    }

    #[tokio::test]
    async fn two_failed_loads_in_the_log_are_a_refusal() {
        let host = Host::new();
        let fake = logging(&host, FAILED_LOAD);
        let verdict = host.prove(&[fake.address()], 7).await;
        assert_eq!(verdict, "refused, up none: clamd: Malformed database");
        let reloads = fake.asked().iter().filter(|c| *c == "RELOAD").count();
        assert_eq!(reloads, 2);
    }

    const FAILED_LOAD: &str = "Reading databases from /var/lib/clamav\n\
         ERROR: reload_th: Database load failed: Malformed database\n\
         WARNING: Database reload failed, keeping the previous instance\n";

    #[tokio::test]
    async fn clamscan_runs_once_for_one_set_of_files_in_an_install() {
        let host = Host::new().with_scanner("exit 0");
        let fake = logging(&host, FAILED_LOAD);
        let prover = host.prover(&[fake.address()]);
        let said = "refused, up none: clamd: Malformed database; clamscan can load it";
        for _ in 0..2 {
            let stop = CancellationToken::new();
            let verdict = prover.prove(InstallNumber(7), prover.mark(), stop).await;
            assert_eq!(words_of(&verdict), said);
            assert_eq!(words_of(&prover.probe(InstallNumber(7)).await), said);
            assert_eq!(host.scanner_runs(), 1);
        }
        fs::write(host.directory.path().join("new.ndb"), "").unwrap();
        assert_eq!(words_of(&prover.probe(InstallNumber(7)).await), said);
        assert_eq!(host.scanner_runs(), 2, "other files");
        prover.begin_install();
        prover.probe(InstallNumber(7)).await;
        assert_eq!(host.scanner_runs(), 3, "another install");
    }

    #[tokio::test]
    async fn a_clamscan_that_cannot_be_executed_is_missing_and_one_that_was_killed_was_hindered() {
        let scan = async |host: Host| host.prover(&[]).load_test(host.directory.path()).await;
        let missing = scan(Host::new()).await;
        assert!(matches!(missing, LoadTest::Missing(_)), "{missing:?}");
        let mut host = Host::new();
        host.scanner = Some(host.directory.path().join("nowhere"));
        let missing = scan(host).await;
        assert!(matches!(missing, LoadTest::Missing(_)), "{missing:?}");
        let killed = scan(Host::new().with_scanner("kill -KILL $$")).await;
        assert!(matches!(killed, LoadTest::Hindered(_)), "{killed:?}");
    }

    #[tokio::test]
    async fn the_duration_of_a_load_is_measured_at_its_proof() {
        let fake = clamd(7, 1);
        let host = Host::new();
        let state = tempfile::tempdir().unwrap();
        let settings = host.prover(&[fake.address()]).settings().clone();
        let prover = Prover::with_state(settings, NONCE, state.path(), CancellationToken::new());
        let stop = CancellationToken::new();
        let verdict = prover.prove(InstallNumber(7), prover.mark(), stop).await;
        assert_eq!(words_of(&verdict), "live, up canary: -");
        assert!(prover.shared.last_load.get().is_some());
        assert!(LastLoad::open(state.path()).get().is_some());
    }

    #[tokio::test]
    async fn a_clamd_that_waits_while_another_rejects_is_not_reported_as_stopped() {
        let mut host = Host::new();
        host.deadline = Duration::from_secs(300);
        let (rejects, waits) = (logging(&host, FAILED_LOAD), clamd(7, u64::MAX));
        let prover = host.prover(&[rejects.address(), waits.address()]);
        let stop = CancellationToken::new();
        let verdict = prover.prove(InstallNumber(7), prover.mark(), stop).await;
        let note = verdict.report().note.clone().unwrap_or_default();
        assert!(note.contains("another clamd rejected"), "{note}");
        assert!(!note.contains("stopped"), "{note}");
    }

    #[tokio::test]
    async fn what_was_not_proven_in_time_is_live_when_it_is_seen() {
        let fake = clamd(7, u64::MAX);
        let mut host = Host::new();
        host.deadline = Duration::from_millis(50);
        let prover = host.prover(&[fake.address()]);
        let stop = CancellationToken::new();
        let verdict = prover.prove(InstallNumber(7), prover.mark(), stop).await;
        assert_eq!(
            words_of(&verdict),
            "unproven, up none: it was not seen with the install yet"
        );
        assert_eq!(
            words_of(&prover.probe(InstallNumber(7)).await),
            "unproven, up none: it was not seen with the install yet"
        );
        let fake = clamd(7, 0);
        let prover = host.prover(&[fake.address()]);
        assert_eq!(
            words_of(&prover.probe(InstallNumber(7)).await),
            "live, up canary: -"
        );
        assert_eq!(
            prover.report().version.unwrap().as_bytes(),
            &VERSION[..VERSION.len() - 1]
        );
    }

    #[test]
    fn clamds_before_1_5_read_no_signature_files() {
        for (version, expected) in [
            ("ClamAV 1.4.6/27890/Sun Nov 22 06:43:59 2026", true),
            ("ClamAV 0.103.12", true),
            ("ClamAV 1.4.0-rc", true),
            ("ClamAV 1.5.0/27890/Sun Nov 22 06:43:59 2026", false),
            ("ClamAV 1.10.1", false),
            ("ClamAV 2.0.0", false),
            ("ClamAV devel-20260101", false),
            ("ClamAV 1", false),
            ("something else", false),
            ("", false),
        ] {
            assert_eq!(is_before_signature_files(version), expected, "{version}");
        }
    }

    #[tokio::test]
    async fn a_clamd_that_was_not_asked_or_is_gone_may_read_signature_files() {
        let (first, mut second) = (clamd(7, 0), clamd(7, 0));
        let prover = Host::new().prover(&[first.address(), second.address()]);
        assert!(!prover.ignores_signature_files());
        prover.probe(InstallNumber(7)).await;
        assert!(prover.ignores_signature_files());
        second.kill().await;
        prover.probe(InstallNumber(7)).await;
        assert!(!prover.ignores_signature_files());
    }

    #[tokio::test]
    async fn a_look_tells_who_is_there() {
        let mut fake = clamd(7, 0);
        let prover = Host::new().prover(&[fake.address()]);
        assert_eq!(prover.report().state, ClamdState::Down);
        assert_eq!(prover.look().await.state, ClamdState::Up);
        assert_eq!(prover.report().state, ClamdState::Up);
        fake.kill().await;
        assert_eq!(prover.look().await.state, ClamdState::Down);
    }

    #[tokio::test]
    async fn where_the_proof_is_version_it_takes_a_load_in_the_log() {
        let mut host = Host::new();
        host.proof = ProofBy::Version;
        let head = "ClamAV-VDB:22 Nov 2026 06-43 +0000:101:2:90:X:X:lab:1795329839";
        fs::write(
            host.directory.path().join("daily.cud"),
            format!("{head:512}"),
        )
        .unwrap();
        let fake = logging(
            &host,
            "Reading databases from /var/lib/clamav\n\
             Database correctly reloaded (2 signatures)\n\
             Activating the newly loaded database...\n",
        );
        let verdict = host.prove(&[fake.address()], 7).await;
        let expected =
            "live, up version: proof = \"version\": the proof is VERSION and clamd's log";
        assert_eq!(verdict, expected);
        assert!(!fake.asked().contains(&"INSTREAM".to_owned()));
    }

    #[test]
    fn version_names_a_database_in_any_time_zone() {
        let head = |version| {
            let text =
                format!("ClamAV-VDB:22 Nov 2026 06-43 +0000:{version}:2:90:X:X:lab:1795329839");
            Header::parse(format!("{text:512}").as_bytes().try_into().unwrap()).unwrap()
        };
        for (version, right) in [
            ("ClamAV 1.4.6/101/Sun Nov 22 06:43:59 2026", true),
            ("ClamAV 1.4.6/101/Sun Nov 22 12:28:59 2026", true),
            ("ClamAV 1.4.6/101/Sat Nov 21 19:43:59 2026", true),
            ("ClamAV 1.4.6/101/Sun Nov 22 06:44:59 2026", false),
            ("ClamAV 1.4.6/101/Mon Nov 23 06:43:59 2026", false),
            ("ClamAV 1.4.6/100/Sun Nov 22 06:43:59 2026", false),
            ("ClamAV 1.4.6/4294967295/invalid timestam", false),
            ("ClamAV 1.4.6/101", false),
            ("ClamAV 1.4.6", false),
        ] {
            assert_eq!(names(version, &head(101)), right, "{version}");
        }
    }
}
