//! `master.toml`: as written, and checked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::config::{self, ConfigError, Percent, Size, Span};
use clamcast_proto::{FleetName, GroupName};
use globset::{GlobBuilder, GlobMatcher};
use serde::Deserialize;

/// Where `--config` points unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/clamcast/master.toml";

/// Where the admin socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/clamcast/master.sock";

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
    /// An agent that showed no sign of progress for this long is no longer waited for.
    pub deadline: Duration,
    /// Keys that parse although what they are for does not exist in this version.
    pub without_effect: Vec<&'static str>,
}

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
    /// Whether databases that Talos did not sign are published.
    pub unsigned: Unsigned,
    /// Whether a capture is loaded by clamscan first.
    pub load_test: LoadTest,
    /// A database that lost a larger part than this is held for an operator; 0 to 1.
    pub shrink_max: Percent,
}

/// What is done with databases that Talos did not sign.
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
}

/// A value parses as TOML but makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value in it.
    #[error("{path}: {key} = {value}: {expected}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: String,
        /// What stands there.
        value: String,
        /// What was expected.
        expected: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    fleet: FleetName,
    state: PathBuf,
    mirror: RawMirror,
    #[serde(default)]
    listen: RawListen,
    tls: RawTls,
    signing: RawSigning,
    #[serde(default)]
    groups: BTreeMap<GroupName, Vec<String>>,
    #[serde(default)]
    store: RawStore,
    #[serde(default)]
    push: RawPush,
    #[serde(default)]
    rollout: RawRollout,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMirror {
    path: PathBuf,
    quiet: Option<Span>,
    rescan: Option<Span>,
    require: Option<Vec<String>>,
    #[serde(default)]
    unsigned: Unsigned,
    #[serde(default)]
    load_test: LoadTest,
    shrink_max: Option<Percent>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    quic: Option<SocketAddr>,
    admin: Option<PathBuf>,
    admin_group: Option<String>,
    http: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    revoked: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSigning {
    manifest_key: PathBuf,
    audit_key: PathBuf,
    keys: PathBuf,
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

/// Shortest freshness: below it the agents' clocks and a restart of the master would make hosts
/// stale.
const FRESH_MIN: Duration = Duration::from_secs(60);

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let raw: Raw = config::load(path)?;
        let beside = |other: PathBuf| config::beside(path, &other);
        let wrong = |key: &str, value: &dyn std::fmt::Display, expected: &str| LoadError::Value {
            path: path.to_owned(),
            key: key.to_owned(),
            value: format!("{value}"),
            expected: expected.to_owned(),
        };
        let span = |key: &str, span: Option<Span>, default: u64| {
            let span = span.map_or(Duration::from_secs(default), |span| span.0);
            if span.is_zero() && key != "mirror.quiet" {
                return Err(wrong(
                    key,
                    &"0s",
                    "expected a duration above zero, for example \"5m\"",
                ));
            }
            Ok(span)
        };
        let count = |key: &str, count: Option<usize>, default: usize| match count {
            Some(0) => Err(wrong(key, &0, "expected at least 1")),
            Some(count) => Ok(count),
            None => Ok(default),
        };

        let fresh = span("signing.fresh", raw.signing.fresh, 48 * 3600)?;
        if fresh < FRESH_MIN {
            return Err(wrong(
                "signing.fresh",
                &Span(fresh),
                "expected at least \"1m\"",
            ));
        }
        let mut groups = Vec::new();
        for (group, patterns) in raw.groups {
            let globs = patterns.iter().map(|pattern| {
                let glob = GlobBuilder::new(pattern).literal_separator(false).build();
                glob.map(|glob| glob.compile_matcher()).map_err(|error| {
                    wrong(
                        &format!("groups.{group}"),
                        pattern,
                        &format!("not a pattern: {}", error.kind()),
                    )
                })
            });
            groups.push((group.clone(), globs.collect::<Result<_, _>>()?));
        }

        let mut without_effect = Vec::new();
        let mut later = |key, written: bool| {
            if written {
                without_effect.push(key);
            }
        };
        later(
            "listen.http",
            raw.listen.http.is_some_and(|http| !http.is_empty()),
        );
        later(
            "push.bandwidth",
            raw.push.bandwidth.is_some_and(|size| size.0 != 0),
        );
        later("rollout.waves", raw.rollout.waves.is_some());
        later("rollout.settle", raw.rollout.settle.is_some());
        later("rollout.refused_max", raw.rollout.refused_max.is_some());
        later("rollout.unwell_max", raw.rollout.unwell_max.is_some());
        later(
            "rollout.rollback_on_halt",
            raw.rollout.rollback_on_halt.is_some(),
        );
        later("rollout.windows", raw.rollout.windows.is_some());

        Ok(Self {
            fleet: raw.fleet,
            state: beside(raw.state),
            mirror: Mirror {
                path: beside(raw.mirror.path),
                quiet: span("mirror.quiet", raw.mirror.quiet, 3)?,
                rescan: span("mirror.rescan", raw.mirror.rescan, 300)?,
                require: raw
                    .mirror
                    .require
                    .unwrap_or_else(|| vec!["daily".to_owned()]),
                unsigned: raw.mirror.unsigned,
                load_test: raw.mirror.load_test,
                shrink_max: raw
                    .mirror
                    .shrink_max
                    .unwrap_or_else(|| "30%".parse().expect("a percentage")),
            },
            listen: Listen {
                quic: raw.listen.quic.unwrap_or_else(|| {
                    (std::net::Ipv6Addr::UNSPECIFIED, clamcast_proto::wire::PORT).into()
                }),
                admin: raw
                    .listen
                    .admin
                    .map_or_else(|| DEFAULT_SOCKET.into(), beside),
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
            keep: count("store.keep", raw.store.keep, 20)?,
            push_concurrent: count("push.concurrent", raw.push.concurrent, 64)?,
            deadline: span("rollout.deadline", raw.rollout.deadline, 15 * 60)?,
            without_effect,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn every_documented_key_parses_and_the_early_ones_are_named() {
        let config = load(&format!(
            r#"{MINIMAL}fresh = "24h"
[listen]
quic = "127.0.0.1:0"
admin = "master.sock"
admin_group = "wheel"
http = "127.0.0.1:7311"
[groups]
canary = ["web1", "db-*"]
[store]
keep = 3
[push]
concurrent = 2
bandwidth = "10MiB"
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
        assert_eq!(config.without_effect.len(), 8);
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

    #[test]
    fn a_wrong_value_says_what_was_expected() {
        for (from, to, expected) in [
            (
                "keys = \"manifest.pub\"",
                "keys = \"manifest.pub\"\nfresh = \"5s\"",
                "at least \"1m\"",
            ),
            (
                "path = \"/srv/mirror\"",
                "path = \"/srv/mirror\"\nrescan = \"0s\"",
                "above zero",
            ),
            ("[tls]", "[store]\nkeep = 0\n[tls]", "at least 1"),
            (
                "path = \"/srv/mirror\"",
                "path = \"/srv/mirror\"\nquite = \"3s\"",
                "quiet",
            ),
        ] {
            let error = load(&MINIMAL.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
