//! `agent.toml`: as written, and checked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::config::{self, ConfigError, Span};
use serde::Deserialize;

use crate::clamd::{Address, ProofBy, RawClamd, ReloadBy};

/// Where `--config` points unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/clamcast/agent.toml";

/// Where the admin socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/clamcast/agent.sock";

/// Addresses of the one master, at most: they are tried one after the other, so each one that is
/// dead delays the next.
pub const MASTERS_MAX: usize = 16;

/// Clamds on one database directory, at most: each must prove every install.
pub const CLAMDS_MAX: usize = 16;

/// The configuration, checked: once one exists, nothing downstream validates it again. All paths
/// are absolute or relative to the working directory, no longer to the file.
#[derive(Clone, Debug)]
pub struct Config {
    /// `host:port` of the one master, tried in order; names are resolved at every try.
    pub master: Vec<String>,
    /// The state directory.
    pub state: PathBuf,
    /// The host's TLS identity.
    pub tls: Tls,
    /// The key set that is pinned at the first start.
    pub keys: PathBuf,
    /// What is done with an offer whose freshness has run out.
    pub stale: Stale,
    /// The operators' socket.
    pub admin: PathBuf,
    /// Where clamd.conf is.
    pub clamd_conf: ClamdConfFile,
    /// The host's clamd, and the database directory.
    pub clamd: RawClamd,
    /// Keys that parse although what they are for does not exist in this version.
    pub without_effect: Vec<&'static str>,
}

/// `[tls]`.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The fleet's CA.
    pub ca: PathBuf,
    /// The host's certificate chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// What is done with an offer when the master's word that it is current has run out.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Stale {
    /// It is installed, with a warning.
    #[default]
    Warn,
    /// It is refused.
    Refuse,
}

/// Where clamd.conf is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ClamdConfFile {
    /// Where packages put it.
    Auto,
    /// Here.
    At(PathBuf),
    /// Only what stands in agent.toml counts.
    None,
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value in it.
    #[error("{path}: `{key}` cannot be `{value}`; {expected}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: &'static str,
        /// What stands there.
        value: String,
        /// What was expected.
        expected: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    master: OneOrMore,
    state: PathBuf,
    tls: RawTls,
    trust: RawTrust,
    #[serde(default)]
    listen: RawListen,
    database: RawDatabase,
    #[serde(default)]
    clamd: RawClamdTable,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::More(more) => more,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTrust {
    keys: PathBuf,
    #[serde(default)]
    stale: Stale,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    admin: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDatabase {
    path: PathBuf,
    drift: Option<Drift>,
    rescan: Option<Span>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Drift {
    Repair,
    Report,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawClamdTable {
    config: Option<PathBuf>,
    socket: Option<OneOrMore>,
    #[serde(default)]
    reload: ReloadBy,
    pid_file: Option<PathBuf>,
    #[serde(default)]
    proof: ProofBy,
    deadline: Option<Span>,
    splay: Option<Span>,
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let raw: Raw = config::load(path)?;
        let beside = |other: PathBuf| config::beside(path, &other);
        let wrong = |key, value: &str, expected: &str| LoadError::Value {
            path: path.to_owned(),
            key,
            value: value.to_owned(),
            expected: expected.to_owned(),
        };

        let master = raw.master.into_vec();
        if master.is_empty() || master.len() > MASTERS_MAX {
            let expected = format!("expected 1 to {MASTERS_MAX} addresses");
            return Err(wrong("master", &format!("{master:?}"), &expected));
        }
        if let Some(address) = master.iter().find(|address| !is_host_and_port(address)) {
            let expected = "expected \"host:port\", for example \"mirror.example.net:7310\"";
            return Err(wrong("master", address, expected));
        }
        let sockets = match raw.clamd.socket.map(OneOrMore::into_vec) {
            None => None,
            Some(sockets) if sockets == ["none"] => Some(Vec::new()),
            Some(sockets) if sockets.is_empty() || sockets.len() > CLAMDS_MAX => {
                let expected =
                    format!("expected 1 to {CLAMDS_MAX} sockets, or \"none\" for no clamd");
                return Err(wrong("clamd.socket", &format!("{sockets:?}"), &expected));
            }
            Some(sockets) => {
                let parse = |text: &String| {
                    let address = text.parse::<Address>();
                    address.map_err(|error| wrong("clamd.socket", text, &error.to_string()))
                };
                Some(sockets.iter().map(parse).collect::<Result<_, _>>()?)
            }
        };
        let deadline = raw.clamd.deadline.map_or(DEADLINE, |span| span.0);
        if deadline.is_zero() {
            let expected = "expected a duration above zero, for example \"5m\"";
            return Err(wrong("clamd.deadline", "0s", expected));
        }

        let mut without_effect = Vec::new();
        if raw.database.drift.is_some() {
            without_effect.push("database.drift");
        }
        if raw.database.rescan.is_some() {
            without_effect.push("database.rescan");
        }

        Ok(Self {
            master,
            state: beside(raw.state),
            tls: Tls {
                ca: beside(raw.tls.ca),
                cert: beside(raw.tls.cert),
                key: beside(raw.tls.key),
            },
            keys: beside(raw.trust.keys),
            stale: raw.trust.stale,
            admin: raw
                .listen
                .admin
                .map_or_else(|| DEFAULT_SOCKET.into(), beside),
            clamd_conf: match raw.clamd.config {
                None => ClamdConfFile::Auto,
                Some(file) if file == Path::new("auto") => ClamdConfFile::Auto,
                Some(file) if file == Path::new("") => ClamdConfFile::None,
                Some(file) => ClamdConfFile::At(beside(file)),
            },
            clamd: RawClamd {
                sockets,
                reload: raw.clamd.reload,
                pid_file: raw.clamd.pid_file.map(beside),
                proof: raw.clamd.proof,
                deadline,
                splay: raw.clamd.splay.map_or(Duration::ZERO, |span| span.0),
                database_directory: beside(raw.database.path),
            },
            without_effect,
        })
    }
}

/// `[clamd] deadline` unless told otherwise: the largest sets load in a minute.
const DEADLINE: Duration = Duration::from_secs(300);

/// `host:port`, where an IPv6 address stands in brackets.
fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let port: Result<u16, _> = port.parse();
    !host.is_empty() && (bracketed || !host.contains(':')) && port.is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"
master = ["mirror.example.net:7310"]
state = "state"
[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"
[trust]
keys = "manifest.pub"
[database]
path = "/var/lib/clamav"
"#;

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_minimal_file_has_the_documented_defaults() {
        let config = load(MINIMAL).unwrap();
        assert_eq!(config.stale, Stale::Warn);
        assert_eq!(config.admin, Path::new("/run/clamcast/agent.sock"));
        assert_eq!(config.clamd_conf, ClamdConfFile::Auto);
        assert_eq!(config.clamd.sockets, None);
        assert_eq!(config.clamd.deadline, Duration::from_secs(300));
        assert_eq!(config.clamd.splay, Duration::ZERO);
        assert!(
            config.state.is_absolute(),
            "relative paths are relative to the file"
        );
        assert_eq!(config.without_effect, Vec::<&str>::new());
    }

    #[test]
    fn every_documented_key_parses_and_the_early_ones_are_named() {
        let config = load(
            r#"
master = ["a.example.net:7310", "[2001:db8::1]:7310", "192.0.2.1:7310"]
state = "/var/lib/clamcast/agent"
[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"
[trust]
keys = "manifest.pub"
stale = "refuse"
[listen]
admin = "/run/clamcast/agent.sock"
[database]
path = "/var/lib/clamav"
drift = "repair"
rescan = "1h"
[clamd]
config = ""
socket = ["/run/clamav/clamd.ctl", "localhost:3310"]
reload = "signal"
pid_file = "/run/clamav/clamd.pid"
proof = "version"
deadline = "1m"
splay = "30s"
"#,
        )
        .unwrap();
        assert_eq!(config.master.len(), 3);
        assert_eq!(config.stale, Stale::Refuse);
        assert_eq!(config.clamd_conf, ClamdConfFile::None);
        assert_eq!(config.clamd.sockets.unwrap().len(), 2);
        assert_eq!(config.without_effect, ["database.drift", "database.rescan"]);
    }

    #[test]
    fn a_socket_is_a_text_or_a_list_or_none() {
        let sockets = |value: &str| {
            let config = load(&format!("{MINIMAL}[clamd]\nsocket = {value}\n"));
            config.map(|config| config.clamd.sockets.unwrap().len())
        };
        assert_eq!(sockets(r#""/run/clamd.ctl""#), Ok(1));
        assert_eq!(sockets(r#"["/run/a", "/run/b"]"#), Ok(2));
        assert_eq!(sockets(r#""none""#), Ok(0));
        assert!(sockets("[]").unwrap_err().contains("\"none\""));
        assert!(sockets("\"clamd.ctl\"").unwrap_err().contains("absolute"));
    }

    #[test]
    fn a_wrong_value_says_what_was_expected() {
        for (from, to, expected) in [
            ("mirror.example.net:7310", "mirror.example.net", "host:port"),
            ("mirror.example.net:7310", "2001:db8::1", "host:port"),
            ("[\"mirror.example.net:7310\"]", "[]", "1 to 16"),
            (
                "[database]",
                "[clamd]\ndeadline = \"0s\"\n[database]",
                "above zero",
            ),
            ("keys = ", "stale = \"ignore\"\nkeys = ", "refuse"),
            ("path = ", "drift = \"fight\"\npath = ", "report"),
            ("state = ", "stat = ", "state"),
        ] {
            let error = load(&MINIMAL.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
