//! Decides whether the configuration can be used.
//! Reads `master.toml` and checks every value in it, so that nothing else has to.
//! Must not know what its values are used for.

mod keys;
mod rollout;
mod settings;
pub mod units;
mod window;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::admin::{Daemon, PATH_BYTES_MAX};
use clamcast_daemon::config::{
    ConfigError, File, FilePath, Key, Percent, Settings, Size, Span, overlap,
};
use clamcast_proto::{DatabaseName, FleetName, GroupName};
use globset::{GlobBuilder, GlobMatcher};
use serde::Deserialize;

pub use keys::{
    FILE_BYTES_MAX, KeyError, audit_origin, check_fleet, load_audit_key, load_keys,
    load_manifest_key,
};
pub use rollout::{Rules, Wave, WaveError};
pub use settings::KEYS;
use units::Units;
pub use window::{Window, WindowError};

/// Where `--config` points unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/clamcast/master.toml";

/// Where the admin socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/clamcast/master.sock";

/// The daemon, as its commands find it.
pub const DAEMON: Daemon = Daemon {
    program: "clamcast-master",
    socket: DEFAULT_SOCKET,
};

/// The configuration, checked: once one exists, nothing downstream validates it again. All paths
/// are absolute or relative to the working directory, no longer to the file.
#[derive(Clone, Debug)]
pub struct Config {
    /// The fleet's name.
    pub fleet: FleetName,
    /// The state directory.
    pub state: PathBuf,
    /// What is published, and when.
    pub mirror: Mirror,
    /// Where agents and operators are listened to.
    pub listen: Listen,
    /// The master's TLS identity.
    pub tls: Tls,
    /// The keys that sign.
    pub signing: Signing,
    /// Groups by name patterns, beside those in the certificates.
    pub groups: Groups,
    /// Generations kept.
    pub keep: usize,
    /// Bulk transfers at a time.
    pub push_concurrent: usize,
    /// How careful rollouts are.
    pub rollout: Rules,
    /// Keys that parse although what they are for does not exist in this version.
    pub without_effect: Vec<&'static str>,
}

/// The name of the load test's socket, beside the admin socket.
pub const LOAD_TEST_SOCKET: &str = "loadtest.sock";

/// `[mirror]`.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// The directory that freshclam writes.
    pub path: PathBuf,
    /// Nothing may have changed for this long.
    pub quiet: Duration,
    /// Time between full looks.
    pub rescan: Duration,
    /// Base names without which nothing is published.
    pub require: Vec<String>,
    /// Whether `.cud` and loose files are published, which carry no signature.
    pub unsigned: Unsigned,
    /// Whether a capture is loaded by clamscan first.
    pub load_test: LoadTest,
    /// Where the service that runs clamscan listens, if it is installed: beside the admin socket.
    pub load_test_socket: PathBuf,
    /// A database that lost a larger part than this is held for an operator; 0 to 1.
    pub shrink_max: Percent,
    /// What a unit that fails a check means for the others.
    pub on_bad_unit: OnBadUnit,
    /// Which files are published or held together.
    pub units: Units,
    /// The certificates that signature files (`.cvd.sign`) are verified with, if any.
    pub cvd_certs: Option<PathBuf>,
    /// Signatures, or a hold, that are older than this are an alarm.
    pub age_alarm: Duration,
}

/// What a unit that fails a check means for the others.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum OnBadUnit {
    /// The others are published.
    #[default]
    Hold,
    /// Nothing is published.
    Refuse,
}

/// What is done with databases that carry no signature.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Unsigned {
    /// They are published.
    #[default]
    Allow,
    /// A capture with one is refused.
    Refuse,
}

/// Whether a capture is loaded by clamscan before it is published.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum LoadTest {
    /// If clamscan is there.
    #[default]
    Auto,
    /// Without clamscan nothing is published.
    Always,
    /// Never.
    Never,
}

/// `[listen]`.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Where agents connect, UDP.
    pub quic: SocketAddr,
    /// The operators' socket.
    pub admin: PathBuf,
    /// The group whose members may act.
    pub admin_group: String,
}

/// `[tls]`.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The fleet's CA.
    pub ca: PathBuf,
    /// The master's certificate chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The list of revoked certificates.
    pub revoked: PathBuf,
}

/// `[signing]`.
#[derive(Clone, Debug)]
pub struct Signing {
    /// The private manifest key.
    pub manifest_key: PathBuf,
    /// The private audit key.
    pub audit_key: PathBuf,
    /// The root-signed key set.
    pub keys: PathBuf,
    /// For how long agents are told that the current generation is current.
    pub fresh: Duration,
}

/// `[groups]`: name patterns of agents that belong to a group.
#[derive(Clone, Debug, Default)]
pub struct Groups(Vec<(GroupName, Vec<GlobMatcher>)>);

impl Groups {
    /// The groups of an agent: its certificate's and those whose patterns its name matches, sorted.
    pub fn of(&self, name: &str, certified: &[GroupName]) -> Vec<GroupName> {
        let matched = self
            .0
            .iter()
            .filter(|(_, globs)| globs.iter().any(|g| g.is_match(name)));
        let mut groups: Vec<_> = certified
            .iter()
            .cloned()
            .chain(matched.map(|(group, _)| group.clone()))
            .collect();
        groups.sort();
        groups.dedup();
        groups
    }

    /// Whether there is a group of this name.
    pub fn has(&self, group: &GroupName) -> bool {
        self.0.iter().any(|(name, _)| name == group)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    fleet: FleetName,
    state: FilePath,
    mirror: RawMirror,
    #[serde(default)]
    listen: RawListen,
    #[serde(default)]
    mirror_http: RawMirrorHttp,
    #[serde(default)]
    audit: RawAudit,
    tls: RawTls,
    signing: RawSigning,
    #[serde(default)]
    groups: BTreeMap<GroupName, Vec<String>>,
    #[serde(default)]
    store: RawStore,
    #[serde(default)]
    push: RawPush,
    #[serde(default)]
    bulk: RawBulk,
    #[serde(default)]
    rollout: RawRollout,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMirror {
    path: FilePath,
    quiet: Option<Span>,
    rescan: Option<Span>,
    require: Option<Vec<String>>,
    #[serde(default)]
    unsigned: Unsigned,
    #[serde(default)]
    load_test: LoadTest,
    shrink_max: Option<Percent>,
    #[serde(default)]
    on_bad_unit: OnBadUnit,
    #[serde(default)]
    units: BTreeMap<String, Vec<DatabaseName>>,
    #[serde(default)]
    cvd_certs: PathBuf,
    age_alarm: Option<Span>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    quic: Option<SocketAddr>,
    #[serde(default)]
    tcp: OptionalAddress,
    admin: Option<FilePath>,
    admin_group: Option<String>,
    http: Option<OptionalAddress>,
    #[serde(default)]
    audit_group: String,
    #[serde(default)]
    two_person: bool,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawMirrorHttp {
    listen: OptionalAddress,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAudit {
    keep: Option<Keep>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawBulk {
    urls: BTreeMap<GroupName, Vec<String>>,
    upload: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: FilePath,
    cert: FilePath,
    key: FilePath,
    revoked: Option<FilePath>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSigning {
    manifest_key: FilePath,
    audit_key: FilePath,
    keys: FilePath,
    fresh: Option<Span>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStore {
    keep: Option<usize>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPush {
    concurrent: Option<usize>,
    bandwidth: Option<Size>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRollout {
    waves: Option<Vec<String>>,
    settle: Option<Span>,
    refused_max: Option<Percent>,
    unwell_max: Option<Percent>,
    rollback_on_halt: Option<bool>,
    deadline: Option<Span>,
    windows: Option<BTreeMap<GroupName, Vec<String>>>,
}

/// How long records are kept, up to [`KEEP_MAX`], written like `"400d"`.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Keep;

impl TryFrom<String> for Keep {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match humantime::parse_duration(&text) {
            Ok(keep) if keep <= KEEP_MAX => Ok(Self),
            Ok(_) | Err(_) => Err("it is no such length of time"),
        }
    }
}

/// An address to listen at; `None` for nowhere.
#[derive(Default, Deserialize)]
#[serde(try_from = "String")]
struct OptionalAddress(Option<SocketAddr>);

impl TryFrom<String> for OptionalAddress {
    type Error = std::net::AddrParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.as_str() {
            "" => Ok(Self(None)),
            address => address.parse().map(|address| Self(Some(address))),
        }
    }
}

impl Settings for Raw {
    const KEYS: &'static [Key] = settings::KEYS;
}

impl Raw {
    /// The keys with a value that asks for a feature which does not exist in this version.
    fn without_effect(&self) -> Vec<&'static str> {
        let mut without_effect = Vec::new();
        let mut later = |key, written: bool| {
            if written {
                without_effect.push(key);
            }
        };
        let listen = &self.listen;
        later("listen.tcp", listen.tcp.0.is_some());
        later(
            "listen.http",
            listen.http.as_ref().is_some_and(|http| http.0.is_some()),
        );
        later("listen.audit_group", !listen.audit_group.is_empty());
        later("listen.two_person", listen.two_person);
        let http = &self.mirror_http;
        later("mirror_http.listen", http.listen.0.is_some());
        later("mirror_http.cert", !http.cert.as_os_str().is_empty());
        later("mirror_http.key", !http.key.as_os_str().is_empty());
        later("audit.keep", self.audit.keep.is_some());
        later(
            "push.bandwidth",
            self.push.bandwidth.is_some_and(|size| size.0 != 0),
        );
        later("bulk.urls", !self.bulk.urls.is_empty());
        later("bulk.upload", !self.bulk.upload.is_empty());
        without_effect
    }
}

/// Shortest freshness: below it the agents' clocks and a restart of the master would make hosts
/// stale.
const FRESH_MIN: Duration = Duration::from_secs(60);

/// Longest quiet: freshclam looks every hour or two, and a mirror that must be quiet for longer than
/// between two of its runs would never be published.
const QUIET_MAX: Duration = Duration::from_secs(60 * 60);

/// Shortest time between full looks: each lists the directory, and that often is no rest in between.
const RESCAN_MIN: Duration = Duration::from_secs(1);

/// Longest: an update whose file event was lost waits for as long, and Talos publishes daily.
const RESCAN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Longest time that records are kept: ten years.
const KEEP_MAX: Duration = Duration::from_secs(3650 * 24 * 60 * 60);

/// Defaults.
const QUIET: Duration = Duration::from_secs(3);
const RESCAN: Duration = Duration::from_secs(5 * 60);
const FRESH: Duration = Duration::from_secs(48 * 60 * 60);
/// Talos publishes daily and skips a day now and then.
const AGE_ALARM: Duration = Duration::from_secs(48 * 60 * 60);
/// A canary group, a few more, everybody.
const WAVES: [&str; 3] = ["group:canary", "10%", "100%"];

const DEADLINE: Duration = Duration::from_secs(15 * 60);

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = File::read(path)?;
        let raw: Raw = file.parse()?;
        let without_effect = raw.without_effect();
        let beside = |other: FilePath| other.beside(path);
        let above_zero = |key: &[&str], span: Option<Span>, default: Duration| match span {
            Some(Span(Duration::ZERO)) => Err(file.wrong::<Raw>(key, None)),
            Some(Span(span)) => Ok(span),
            None => Ok(default),
        };
        let count = |key: &[&str], count: Option<usize>, default: usize| match count {
            Some(0) => Err(file.wrong::<Raw>(key, None)),
            Some(count) => Ok(count),
            None => Ok(default),
        };

        let fresh = raw.signing.fresh.map_or(FRESH, |span| span.0);
        if fresh < FRESH_MIN {
            return Err(file.wrong::<Raw>(&["signing", "fresh"], None));
        }
        let mut groups = Vec::new();
        for (group, patterns) in raw.groups {
            let globs = patterns.iter().map(|pattern| {
                let glob = GlobBuilder::new(pattern).literal_separator(false).build();
                let wrong =
                    |_| file.wrong::<Raw>(&["groups", group.as_str()], Some(pattern.as_str()));
                glob.map(|glob| glob.compile_matcher()).map_err(wrong)
            });
            groups.push((group.clone(), globs.collect::<Result<_, _>>()?));
        }
        let admin = raw
            .listen
            .admin
            .map_or_else(|| DEFAULT_SOCKET.into(), beside);
        if admin.as_os_str().len() > PATH_BYTES_MAX {
            return Err(file.wrong::<Raw>(&["listen", "admin"], None));
        }

        let (state, mirror) = (beside(raw.state), beside(raw.mirror.path));
        // The mirror is freshclam's, and is looked at whole: nothing is written or kept there.
        if overlap(&state, &mirror) {
            return Err(file.wrong::<Raw>(&["state"], None));
        }

        let quiet = raw.mirror.quiet.map_or(QUIET, |span| span.0);
        if quiet > QUIET_MAX {
            return Err(file.wrong::<Raw>(&["mirror", "quiet"], None));
        }
        let rescan = raw.mirror.rescan.map_or(RESCAN, |span| span.0);
        if !(RESCAN_MIN..=RESCAN_MAX).contains(&rescan) {
            return Err(file.wrong::<Raw>(&["mirror", "rescan"], None));
        }

        let units = Units::joining(raw.mirror.units)
            .map_err(|error| file.wrong_part(&["mirror", "units"], &error))?;
        let certs = raw.mirror.cvd_certs;
        let cvd_certs =
            (!certs.as_os_str().is_empty()).then(|| clamcast_daemon::config::beside(path, &certs));

        let mut waves = Vec::new();
        let default = || WAVES.map(str::to_owned).to_vec();
        for wave in raw.rollout.waves.unwrap_or_else(default) {
            let wrong = |error: WaveError| file.wrong_part(&["rollout", "waves"], &error);
            waves.push(wave.parse().map_err(wrong)?);
        }
        // Whoever is in none of them comes last, and is watched as well.
        let everybody = Wave::Share(Percent::new(100).expect("a percentage"));
        if waves.last() != Some(&everybody) {
            waves.push(everybody);
        }
        let mut windows = BTreeMap::new();
        for (group, written) in raw.rollout.windows.unwrap_or_default() {
            let parse = |window: &String| {
                let path = ["rollout", "windows", group.as_str()];
                let wrong = |error: WindowError| file.wrong_part(&path, &error);
                window.parse().map_err(wrong)
            };
            let parsed = written.iter().map(parse).collect::<Result<_, _>>()?;
            windows.insert(group.clone(), parsed);
        }
        let percent = |default: &str| default.parse().expect("a percentage");
        let rollout = Rules {
            waves,
            settle: raw.rollout.settle.map_or(Duration::ZERO, |span| span.0),
            refused_max: raw.rollout.refused_max.unwrap_or_else(|| percent("2%")),
            unwell_max: raw.rollout.unwell_max.unwrap_or_else(|| percent("20%")),
            rollback_on_halt: raw.rollout.rollback_on_halt.unwrap_or(true),
            deadline: above_zero(&["rollout", "deadline"], raw.rollout.deadline, DEADLINE)?,
            windows,
        };

        Ok(Self {
            fleet: raw.fleet,
            state,
            mirror: Mirror {
                path: mirror,
                quiet,
                rescan,
                require: raw
                    .mirror
                    .require
                    .unwrap_or_else(|| vec!["daily".to_owned()]),
                unsigned: raw.mirror.unsigned,
                load_test: raw.mirror.load_test,
                load_test_socket: admin.with_file_name(LOAD_TEST_SOCKET),
                shrink_max: raw
                    .mirror
                    .shrink_max
                    .unwrap_or_else(|| "30%".parse().expect("a percentage")),
                on_bad_unit: raw.mirror.on_bad_unit,
                units,
                cvd_certs,
                age_alarm: above_zero(&["mirror", "age_alarm"], raw.mirror.age_alarm, AGE_ALARM)?,
            },
            listen: Listen {
                quic: raw.listen.quic.unwrap_or_else(|| {
                    (std::net::Ipv6Addr::UNSPECIFIED, clamcast_proto::wire::PORT).into()
                }),
                admin,
                admin_group: raw
                    .listen
                    .admin_group
                    .unwrap_or_else(|| "clamcast".to_owned()),
            },
            tls: Tls {
                ca: beside(raw.tls.ca),
                cert: beside(raw.tls.cert),
                key: beside(raw.tls.key),
                revoked: raw
                    .tls
                    .revoked
                    .map_or_else(|| "/etc/clamcast/revoked.json".into(), beside),
            },
            signing: Signing {
                manifest_key: beside(raw.signing.manifest_key),
                audit_key: beside(raw.signing.audit_key),
                keys: beside(raw.signing.keys),
                fresh,
            },
            groups: Groups(groups),
            keep: count(&["store", "keep"], raw.store.keep, 20)?,
            push_concurrent: count(&["push", "concurrent"], raw.push.concurrent, 64)?,
            rollout,
            without_effect,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_daemon::config::Value;

    const MINIMAL: &str = r#"
fleet = "bank"
state = "state"
[mirror]
path = "/srv/mirror"
[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"
[signing]
manifest_key = "manifest.key"
audit_key = "audit.key"
keys = "manifest.pub"
"#;

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_minimal_file_has_the_documented_defaults() {
        let config = load(MINIMAL).unwrap();
        assert_eq!(config.mirror.quiet, Duration::from_secs(3));
        assert_eq!(config.mirror.rescan, Duration::from_secs(300));
        assert_eq!(config.mirror.require, ["daily"]);
        assert_eq!(config.listen.quic.port(), 7310);
        assert_eq!(config.signing.fresh, Duration::from_secs(48 * 3600));
        assert_eq!((config.keep, config.push_concurrent), (20, 64));
        assert!(
            config.state.is_absolute(),
            "relative paths are relative to the file"
        );
        assert_eq!(config.without_effect, Vec::<&str>::new());
    }

    /// Every key of the documented file, those with a default behind `# `.
    const DOCUMENTED: &str = r#"
fleet = "example"
state = "/var/lib/clamcast/master"

[mirror]
path = "/var/lib/clamav-mirror"
# quiet = "3s"
# rescan = "5m"
# require = ["daily"]
# unsigned = "allow"
# load_test = "auto"
# shrink_max = "30%"
# on_bad_unit = "hold"
# units = { urlhaus = ["urlhaus.ndb", "urlhaus.ign2"] }
# cvd_certs = ""
# age_alarm = "48h"

[listen]
# quic = "[::]:7310"
# tcp = ""
# admin = "/run/clamcast/master.sock"
# admin_group = "clamcast"
# http = "127.0.0.1:7311"
# audit_group = ""
# two_person = false

[mirror_http]
# listen = ""
# cert = ""
# key = ""

[audit]
# keep = "400d"

[tls]
ca = "/etc/clamcast/ca.pem"
cert = "/etc/clamcast/master/cert.pem"
key = "/etc/clamcast/master/key.pem"
# revoked = "/etc/clamcast/revoked.json"

[signing]
manifest_key = "/etc/clamcast/manifest.key"
audit_key = "/etc/clamcast/audit.key"
keys = "/etc/clamcast/manifest.pub"
# fresh = "48h"

[groups]
# canary = ["web1", "db-*"]

[store]
# keep = 20

[push]
# concurrent = 64
# bandwidth = "0"

[bulk]
# urls = {}
# upload = ""

[rollout]
# waves = ["group:canary", "10%", "100%"]
# settle = "0s"
# refused_max = "2%"
# unwell_max = "20%"
# rollback_on_halt = true
# deadline = "15m"
# windows = { db = ["Mon-Fri 22:00-05:00"] }
"#;

    #[test]
    fn the_documented_file_parses_as_it_is_with_every_key_and_with_each_alone() {
        let mut warned = Vec::new();
        load(DOCUMENTED).unwrap();
        for (number, line) in DOCUMENTED.lines().enumerate() {
            let Some(key) = line.strip_prefix("# ") else {
                continue;
            };
            let lines = DOCUMENTED.lines().enumerate();
            let one = lines.map(|(n, line)| if n == number { key } else { line });
            let config = load(&one.collect::<Vec<_>>().join("\n")).expect(key);
            warned.extend(config.without_effect);
        }
        let config = load(&DOCUMENTED.replace("\n# ", "\n")).unwrap();
        assert_eq!(config.without_effect, warned);
        assert_eq!(warned, ["listen.http", "audit.keep",]);
    }

    #[test]
    fn keys_of_later_features_parse_and_are_named() {
        let config = load(&format!(
            r#"{MINIMAL}fresh = "24h"
[listen]
quic = "127.0.0.1:0"
tcp = "[::]:443"
admin = "master.sock"
admin_group = "wheel"
http = "127.0.0.1:7311"
audit_group = "auditors"
two_person = true
[mirror_http]
listen = "[::]:8080"
cert = "cert.pem"
key = "key.pem"
[audit]
keep = "400d"
[groups]
canary = ["web1", "db-*"]
[store]
keep = 3
[push]
concurrent = 2
bandwidth = "10MiB"
[bulk]
urls = {{ site-a = ["https://cache.site-a/clamcast"] }}
upload = "s3://BUCKET/PREFIX"
[rollout]
waves = ["group:canary", "10%", "100%"]
settle = "0s"
refused_max = "2%"
unwell_max = "20%"
rollback_on_halt = true
deadline = "1m"
windows = {{ db = ["Mon-Fri 22:00-05:00"] }}
"#
        ))
        .unwrap();
        assert_eq!(
            config.without_effect,
            [
                "listen.tcp",
                "listen.http",
                "listen.audit_group",
                "listen.two_person",
                "mirror_http.listen",
                "mirror_http.cert",
                "mirror_http.key",
                "audit.keep",
                "push.bandwidth",
                "bulk.urls",
                "bulk.upload",
            ]
        );
        let groups = |name| config.groups.of(name, &["eu".parse().unwrap()]);
        assert_eq!(
            groups("db-7")
                .iter()
                .map(GroupName::as_str)
                .collect::<Vec<_>>(),
            ["canary", "eu"]
        );
        assert_eq!(
            groups("app")
                .iter()
                .map(GroupName::as_str)
                .collect::<Vec<_>>(),
            ["eu"]
        );
    }

    /// Every key with values that it cannot have.
    const WRONG: &[(&str, &[&str])] = &[
        (
            "fleet",
            &["1", "\"\"", "\"a b\"", "\"-a\"", "[\"a\"]", "true"],
        ),
        (
            "state",
            &[
                "\"\"",
                "7",
                "[\"/srv\"]",
                "true",
                "\"/srv/mirror\"",
                "\"/srv/mirror/st\"",
                "\"/srv\"",
            ],
        ),
        ("mirror.path", &["\"\"", "7", "[\"/srv\"]"]),
        (
            "mirror.quiet",
            &[
                "3",
                "\"3\"",
                "\"three\"",
                "\"-3s\"",
                "[\"3s\"]",
                "\"61m\"",
                "\"99999999999d\"",
            ],
        ),
        (
            "mirror.rescan",
            &["\"0s\"", "\"1ms\"", "\"2d\"", "5", "\"\"", "true"],
        ),
        (
            "mirror.require",
            &["\"daily\"", "[1]", "true", "[[\"daily\"]]"],
        ),
        ("mirror.unsigned", &["\"no\"", "false", "1", "[\"allow\"]"]),
        ("mirror.load_test", &["\"yes\"", "true", "0"]),
        (
            "mirror.shrink_max",
            &["30", "\"30\"", "\"101%\"", "\"2.5%\"", "0.3"],
        ),
        (
            "listen.quic",
            &[
                "7310",
                "\"7310\"",
                "\":7310\"",
                "\"localhost:7310\"",
                "\"::1:7310\"",
                "\"1.2.3.4\"",
                "\"1.2.3.4:70000\"",
            ],
        ),
        ("mirror.on_bad_unit", &["\"no\"", "true", "0"]),
        (
            "mirror.units.a",
            &["\"a.ndb\"", "[1]", "[\"a/b.ndb\"]", "7"],
        ),
        ("mirror.cvd_certs", &["1", "[]", "false"]),
        ("mirror.age_alarm", &["48", "\"\"", "\"soon\""]),
        ("listen.tcp", &["443", "true", "\"localhost:443\""]),
        ("listen.admin", &["\"\"", "7", "[]"]),
        ("listen.admin_group", &["0", "[\"wheel\"]"]),
        (
            "listen.http",
            &["7311", "false", "\"localhost\"", "\"none\""],
        ),
        ("listen.audit_group", &["0", "[\"wheel\"]"]),
        ("listen.two_person", &["\"yes\"", "1"]),
        ("mirror_http.listen", &["80", "\"80\"", "\"none\""]),
        ("mirror_http.cert", &["1", "[]"]),
        ("mirror_http.key", &["1", "true"]),
        ("audit.keep", &["400", "\"\"", "\"3651d\""]),
        ("tls.ca", &["\"\"", "1"]),
        ("tls.cert", &["\"\"", "[]"]),
        ("tls.key", &["\"\"", "false"]),
        ("tls.revoked", &["\"\"", "1.5"]),
        ("signing.manifest_key", &["\"\"", "1"]),
        ("signing.audit_key", &["\"\"", "1"]),
        ("signing.keys", &["\"\"", "[\"manifest.pub\"]"]),
        ("signing.fresh", &["\"5s\"", "48", "\"2 fortnights\""]),
        ("groups.canary", &["\"web1\"", "[1]", "true", "7"]),
        (
            "store.keep",
            &["0", "-1", "\"20\"", "2.5", "99999999999999999999"],
        ),
        ("push.concurrent", &["0", "-64", "\"64\"", "[]"]),
        (
            "push.bandwidth",
            &["0", "\"fast\"", "\"-1\"", "\"1.5MB\"", "\"99999999TiB\""],
        ),
        ("bulk.urls.a", &["\"https://x\"", "[1]", "true"]),
        ("bulk.upload", &["1", "[]", "false"]),
        ("rollout.waves", &["\"10%\"", "[10]", "true"]),
        ("rollout.settle", &["0", "\"soon\""]),
        ("rollout.refused_max", &["2", "\"2\"", "\"200%\""]),
        ("rollout.unwell_max", &["0.2", "\"all\""]),
        ("rollout.rollback_on_halt", &["\"yes\"", "\"true\"", "1"]),
        ("rollout.deadline", &["\"0s\"", "15", "\"15\""]),
        ("rollout.windows.db", &["\"Mon-Fri 22:00-05:00\"", "[22]"]),
    ];

    /// The minimal file with one key set otherwise, or added.
    fn with(key: &str, value: &str) -> String {
        let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
        let header = match table {
            "" => "\n".to_owned(),
            table => format!("\n[{table}]\n"),
        };
        let mut text = MINIMAL.to_owned();
        let begin = text.find(&header).unwrap_or_else(|| {
            text.push_str(&header[1..]);
            text.len() - header.len()
        });
        let begin = begin + header.len();
        let end = text[begin..]
            .find("\n[")
            .map_or(text.len(), |at| begin + at);
        let line = format!("{name} = {value}\n");
        match text[begin - 1..end].find(&format!("\n{name} = ")) {
            Some(at) => {
                let at = begin + at;
                let end = at + text[at..].find('\n').expect("every line ends") + 1;
                text.replace_range(at..end, &line);
            }
            None => text.insert_str(begin, &line),
        }
        text
    }

    #[test]
    fn every_wrong_value_is_told_with_its_line_its_key_and_what_was_expected() {
        for (key, values) in WRONG {
            let table = key.rsplit_once('.').map_or("", |(table, _)| table);
            let words = Raw::KEYS.iter().find(|Key { name, .. }| {
                name == key || name.strip_suffix(".*").is_some_and(|name| name == table)
            });
            let words = words.expect(key).expected;
            for value in *values {
                let text = with(key, value);
                let name = key.rsplit('.').next().unwrap();
                let line = text
                    .lines()
                    .position(|line| line == format!("{name} = {value}"));
                let error = load(&text).expect_err(&text);
                let (file, said) = error.split_once(".toml:").expect(&error);
                assert!(file.ends_with("/master"), "{error}");
                let item = value
                    .strip_prefix('[')
                    .and_then(|item| item.strip_suffix(']'));
                let found = [Some(*value), item].map(|found| {
                    let line = line.unwrap() + 1;
                    format!(
                        "{line}: `{key}` cannot be `{}`; expected {words}",
                        found.unwrap_or_default()
                    )
                });
                assert!(found.iter().any(|found| found == said), "{value}: {said}");
            }
        }
        let pattern = load(&with("groups.canary", "[\"web1\", \"db-[\"]")).unwrap_err();
        assert!(
            pattern.contains("`groups.canary` cannot be `\"db-[\"`; expected a list"),
            "{pattern}"
        );
        for (key, value, why) in [
            (
                "waves",
                "[\"10%\", \"five\"]",
                "`five` is not a wave: expected \"group:NAME\"",
            ),
            (
                "windows",
                "{ db = [\"Mon 22:00-05:00 Europe/Berln\"] }",
                "`Europe/Berln` is not a time zone that this system knows",
            ),
            (
                "windows",
                "{ db = [\"Mo 22:00-05:00\"] }",
                "`Mo` is not a day or a range of days",
            ),
        ] {
            let part = load(&with(&format!("rollout.{key}"), value)).unwrap_err();
            assert!(
                part.contains(&format!("`rollout.{key}")) && part.contains(why),
                "{part}"
            );
        }
        let long = load(&with("listen.admin", &format!("{:?}", "x".repeat(100)))).unwrap_err();
        assert!(
            long.contains("`listen.admin` cannot be") && long.contains("107 bytes"),
            "{long}"
        );
    }

    #[test]
    fn a_near_miss_is_answered_with_a_suggestion() {
        for (key, value, suggestion) in [
            ("mirror.unsigned", "\"allowed\"", "did you mean `allow`?"),
            ("mirror.load_test", "\"alway\"", "did you mean `always`?"),
            ("mirror.quite", "\"3s\"", "did you mean `quiet`?"),
            ("rollout.wave", "[]", "did you mean `waves`?"),
            (
                "signing.manifestkey",
                "\"a\"",
                "did you mean `manifest_key`?",
            ),
        ] {
            let error = load(&with(key, value)).unwrap_err();
            assert!(error.ends_with(suggestion), "{error}");
        }
    }

    #[test]
    fn every_key_has_words_for_what_is_expected_and_is_tried_with_wrong_values() {
        let mut known = Vec::new();
        for table in [
            "",
            "mirror.",
            "listen.",
            "mirror_http.",
            "audit.",
            "tls.",
            "signing.",
            "store.",
            "push.",
            "bulk.",
            "rollout.",
        ] {
            let text = match table {
                "" => format!("zzz = 1\n{MINIMAL}"),
                table => with(&format!("{table}zzz"), "1"),
            };
            let error = load(&text).unwrap_err();
            let (_, keys) = error.split_once("expected one of: ").expect(&error);
            known.extend(keys.split(", ").map(|key| format!("{table}{key}")));
        }
        for key in &known {
            let below = Raw::KEYS
                .iter()
                .any(|known| known.name.starts_with(&format!("{key}.")));
            let here = Raw::KEYS.iter().any(|known| known.name == key);
            assert!(below || here, "{key} has no words");
        }
        for Key {
            name: key,
            expected: words,
            ..
        } in Raw::KEYS
        {
            let plain = key.strip_suffix(".*").unwrap_or(key);
            assert!(known.iter().any(|name| name == plain), "{key} is no key");
            assert!(
                WRONG.iter().any(|(tried, _)| tried.starts_with(plain)),
                "{key} is not tried"
            );
            for jargon in [
                "string",
                "sequence",
                "struct",
                "usize",
                "integer",
                "socket address",
                "invalid",
            ] {
                assert!(!words.contains(jargon), "{key}: {words}");
            }
        }
    }

    #[test]
    fn each_default_in_the_table_of_keys_is_the_default_of_the_parser() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| {
            let path = dir.path().join("master.toml");
            std::fs::write(&path, text).unwrap();
            path
        };
        let minimal = Config::load(&write(MINIMAL)).unwrap();
        for key in KEYS {
            match key.value {
                Value::Default(value) => {
                    let set = Config::load(&write(&with(key.name, value))).expect(key.name);
                    assert_eq!(format!("{set:?}"), format!("{minimal:?}"), "{}", key.name);
                }
                Value::Named(example) => {
                    let (name, value) = example.split_once(" = ").unwrap();
                    let name = key.name.replace('*', name);
                    Config::load(&write(&with(&name, value))).unwrap();
                }
                Value::Reserved(_) if key.name.ends_with(".*") => {}
                Value::Required(value) | Value::Reserved(value) => {
                    Config::load(&write(&with(key.name, value))).expect(key.name);
                }
            }
        }
    }

    #[test]
    fn every_key_without_a_default_is_missed() {
        for key in [
            "fleet",
            "state",
            "path",
            "ca",
            "cert",
            "key",
            "manifest_key",
            "audit_key",
            "keys",
        ] {
            let text: Vec<&str> = MINIMAL
                .lines()
                .filter(|line| !line.starts_with(&format!("{key} =")))
                .collect();
            let error = load(&text.join("\n")).unwrap_err();
            assert!(
                error.contains(&format!("key `{key}` is missing")),
                "{error}"
            );
        }
        let error = load(MINIMAL.split("[signing]").next().unwrap()).unwrap_err();
        assert!(error.contains("table [signing] is missing"), "{error}");
    }
}
