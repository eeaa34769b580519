//! Decides which `agent.toml` is valid, and the value of every key that is left out.
//! Parses the file, and names the line and the key of a mistake.
//! Must not know what the other modules do with a value.

mod settings;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::admin::{Daemon, PATH_BYTES_MAX};
use clamcast_daemon::config::{ConfigError, File, FilePath, Key, Settings, Span, beside, overlap};
use serde::{Deserialize, Serialize};

use crate::clamd::{Address, ProofBy, RawClamd, ReloadBy};

pub use settings::KEYS;

/// Where `--config` points unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/clamcast/agent.toml";

/// Where the admin socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/clamcast/agent.sock";

/// The daemon, as its commands find it.
pub const DAEMON: Daemon = Daemon {
    program: "clamcast-agent",
    socket: DEFAULT_SOCKET,
};

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
    /// What is done about a changed database.
    pub drift: DriftPolicy,
    /// Time between two looks at every byte.
    pub rescan: Duration,
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

/// What is done about a changed file.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DriftPolicy {
    /// It is reported, and the published one is put back.
    #[default]
    Repair,
    /// It is reported.
    Report,
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    master: OneOrMore,
    #[serde(default)]
    proxy: String,
    state: FilePath,
    tls: RawTls,
    trust: RawTrust,
    #[serde(default)]
    listen: RawListen,
    database: RawDatabase,
    #[serde(default)]
    clamd: RawClamdTable,
}

#[derive(Deserialize)]
#[serde(untagged)]
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
    ca: FilePath,
    cert: FilePath,
    key: FilePath,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTrust {
    keys: FilePath,
    #[serde(default)]
    stale: Stale,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    admin: Option<FilePath>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDatabase {
    path: FilePath,
    #[serde(default)]
    drift: DriftPolicy,
    rescan: Option<Span>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawClamdTable {
    config: Option<PathBuf>,
    socket: Option<OneOrMore>,
    #[serde(default)]
    reload: ReloadBy,
    pid_file: Option<FilePath>,
    #[serde(default)]
    proof: ProofBy,
    deadline: Option<Span>,
    splay: Option<Span>,
}

impl Settings for Raw {
    const KEYS: &'static [Key] = settings::KEYS;
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = File::read(path)?;
        let raw: Raw = file.parse()?;
        let beside = |other: FilePath| other.beside(path);
        let wrong = |key: [&str; 2]| file.wrong::<Raw>(&key, None);

        let mut without_effect = Vec::new();
        let mut master = raw.master.into_vec();
        if master.is_empty() || master.len() > MASTERS_MAX {
            return Err(file.wrong::<Raw>(&["master"], None));
        }
        let bare = |address: &str| is_host_and_port(address.strip_prefix(TCP).unwrap_or(address));
        if let Some(address) = master.iter().find(|address| !bare(address)) {
            return Err(file.wrong::<Raw>(&["master"], Some(address)));
        }
        let over_tcp: Vec<_> = master
            .extract_if(.., |address| address.starts_with(TCP))
            .collect();
        if let Some(address) = over_tcp.first() {
            if master.is_empty() {
                return Err(file.wrong::<Raw>(&["master"], Some(address)));
            }
            without_effect.push("a tcp:// address of `master`");
        }
        if !raw.proxy.is_empty() {
            let address = raw.proxy.strip_prefix("http://").unwrap_or(&raw.proxy);
            if !is_host_and_port(address) {
                return Err(file.wrong::<Raw>(&["proxy"], None));
            }
            without_effect.push("proxy");
        }
        let sockets = match raw.clamd.socket.map(OneOrMore::into_vec) {
            None => None,
            Some(sockets) if sockets == ["none"] => Some(Vec::new()),
            Some(sockets) if sockets.is_empty() || sockets.len() > CLAMDS_MAX => {
                return Err(wrong(["clamd", "socket"]));
            }
            Some(sockets) => {
                let parse = |text: &String| {
                    let address = text.parse::<Address>();
                    address.map_err(|_| file.wrong::<Raw>(&["clamd", "socket"], Some(text)))
                };
                Some(sockets.iter().map(parse).collect::<Result<_, _>>()?)
            }
        };
        let deadline = raw.clamd.deadline.map_or(DEADLINE, |span| span.0);
        if deadline.is_zero() {
            return Err(wrong(["clamd", "deadline"]));
        }
        if raw.database.rescan.is_some_and(|span| span.0 < RESCAN_MIN) {
            return Err(wrong(["database", "rescan"]));
        }
        let admin = raw
            .listen
            .admin
            .map_or_else(|| DEFAULT_SOCKET.into(), beside);
        if admin.as_os_str().len() > PATH_BYTES_MAX {
            return Err(wrong(["listen", "admin"]));
        }

        let rescan = raw.database.rescan.map_or(RESCAN, |span| span.0);
        let (state, database_directory) = (beside(raw.state), beside(raw.database.path));
        // Keys do not belong where clamd looks for databases, nor databases among them.
        if overlap(&state, &database_directory) {
            return Err(file.wrong::<Raw>(&["state"], None));
        }

        Ok(Self {
            master,
            state,
            tls: Tls {
                ca: beside(raw.tls.ca),
                cert: beside(raw.tls.cert),
                key: beside(raw.tls.key),
            },
            keys: beside(raw.trust.keys),
            stale: raw.trust.stale,
            admin,
            clamd_conf: match raw.clamd.config {
                None => ClamdConfFile::Auto,
                Some(file) if file == Path::new("auto") => ClamdConfFile::Auto,
                Some(file) if file == Path::new("") => ClamdConfFile::None,
                Some(file) => ClamdConfFile::At(self::beside(path, &file)),
            },
            clamd: RawClamd {
                sockets,
                reload: raw.clamd.reload,
                pid_file: raw.clamd.pid_file.map(beside),
                proof: raw.clamd.proof,
                deadline,
                splay: raw.clamd.splay.map_or(Duration::ZERO, |span| span.0),
                database_directory,
            },
            drift: raw.database.drift,
            rescan,
            without_effect,
        })
    }
}

/// `[clamd] deadline` unless told otherwise: the largest sets load in a minute.
const DEADLINE: Duration = Duration::from_secs(300);

/// `[database] rescan` unless told otherwise: a damaged file is found within the hour, and a guest
/// reads its databases for ten seconds of it.
const RESCAN: Duration = Duration::from_secs(3600);

/// Shortest `[database] rescan`: every byte is read, and that often is no rest in between.
const RESCAN_MIN: Duration = Duration::from_secs(1);

/// What an address begins with that is reached over TCP.
const TCP: &str = "tcp://";

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
    use clamcast_daemon::config::Value;

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
        assert_eq!((config.drift, config.rescan), (DriftPolicy::Repair, RESCAN));
        assert_eq!(config.without_effect, Vec::<&str>::new());
    }

    #[test]
    fn every_documented_key_parses() {
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
drift = "report"
rescan = "30m"
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
        assert_eq!(config.drift, DriftPolicy::Report);
        assert_eq!(config.rescan, Duration::from_secs(1800));
        assert_eq!(config.without_effect, Vec::<&str>::new());
    }

    /// Every key of the documented file, those with a default behind `# `.
    const DOCUMENTED: &str = r#"
master = ["mirror.example.net:7310"]
# proxy = ""
state = "/var/lib/clamcast/agent"

[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"

[trust]
keys = "manifest.pub"
# stale = "warn"

[listen]
# admin = "/run/clamcast/agent.sock"

[database]
path = "/var/lib/clamav"
# drift = "repair"
# rescan = "1h"

[clamd]
# config = "auto"
# socket = ["/run/clamav/clamd.ctl"]
# reload = "socket"
# pid_file = "/run/clamav/clamd.pid"
# proof = "canary"
# deadline = "5m"
# splay = "0s"
"#;

    #[test]
    fn the_documented_file_parses_as_it_is_with_every_key_and_with_each_alone() {
        load(DOCUMENTED).unwrap();
        for (number, line) in DOCUMENTED.lines().enumerate() {
            let Some(key) = line.strip_prefix("# ") else {
                continue;
            };
            let lines = DOCUMENTED.lines().enumerate();
            let one = lines.map(|(n, line)| if n == number { key } else { line });
            load(&one.collect::<Vec<_>>().join("\n")).expect(key);
        }
        let config = load(&DOCUMENTED.replace("\n# ", "\n")).unwrap();
        assert_eq!(config.without_effect, [""; 0]);
    }

    #[test]
    fn keys_and_addresses_of_later_features_parse_and_are_named() {
        let written = r#"["tcp://mirror.example.net:443", "mirror.example.net:7310"]"#;
        let config = load(&with("master", written)).unwrap();
        assert_eq!(config.master, ["mirror.example.net:7310"]);
        assert_eq!(config.without_effect, ["a tcp:// address of `master`"]);
        let config = load(&with("proxy", "\"http://proxy.example.net:3128\"")).unwrap();
        assert_eq!(config.without_effect, ["proxy"]);
        let error = load(&with("master", r#""tcp://mirror.example.net:443""#)).unwrap_err();
        assert!(error.contains("`master` cannot be"), "{error}");
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
        assert!(sockets("\"clamd.ctl\"").unwrap_err().contains("from / on"));
    }

    /// Every key with values that it cannot have.
    const WRONG: &[(&str, &[&str])] = &[
        (
            "master",
            &[
                "7310",
                "[]",
                "\"\"",
                "\"mirror\"",
                "\"2001:db8::1\"",
                "[\"mirror\"]",
                "[\":7310\"]",
                "[\"m:0\"]",
                "[7310]",
                "true",
            ],
        ),
        (
            "proxy",
            &[
                "3128",
                "\"proxy\"",
                "[\"proxy:3128\"]",
                "\"https://proxy:3128\"",
            ],
        ),
        (
            "state",
            &[
                "\"\"",
                "7",
                "[\"/srv\"]",
                "true",
                "\"/var/lib/clamav\"",
                "\"/var/lib/clamav/state\"",
                "\"/var/lib\"",
            ],
        ),
        ("tls.ca", &["\"\"", "1"]),
        ("tls.cert", &["\"\"", "[]"]),
        ("tls.key", &["\"\"", "false"]),
        ("trust.keys", &["\"\"", "[\"manifest.pub\"]"]),
        ("trust.stale", &["\"no\"", "true", "48"]),
        ("listen.admin", &["\"\"", "7", "[]"]),
        ("database.path", &["\"\"", "7", "[\"/srv\"]"]),
        ("database.drift", &["\"x\"", "false", "1"]),
        (
            "database.rescan",
            &["\"0s\"", "\"1ms\"", "\"366d\"", "1", "\"hourly\""],
        ),
        ("clamd.config", &["false", "1", "[]"]),
        (
            "clamd.socket",
            &["[]", "\"clamd.ctl\"", "\"\"", "3310", "[3310]"],
        ),
        ("clamd.reload", &["\"x\"", "true", "1"]),
        ("clamd.pid_file", &["\"\"", "12"]),
        ("clamd.proof", &["\"x\"", "false"]),
        ("clamd.deadline", &["\"0s\"", "300", "\"5\""]),
        ("clamd.splay", &["30", "\"-1s\"", "\"\""]),
    ];

    /// The minimal file with one key set otherwise, or added.
    fn with(key: &str, value: &str) -> String {
        let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
        let mut text = MINIMAL.to_owned();
        if let Some(at) = text.find(&format!("\n{name} = ")) {
            let end = at + 1 + text[at + 1..].find('\n').expect("every line ends");
            text.replace_range(at + 1..end, &format!("{name} = {value}"));
        } else {
            let header = match table {
                "" => "\n".to_owned(),
                table => format!("[{table}]\n"),
            };
            let at = text.find(&header).map(|at| at + header.len());
            let at = at.unwrap_or_else(|| {
                text.push_str(&header);
                text.len()
            });
            text.insert_str(at, &format!("{name} = {value}\n"));
        }
        text
    }

    #[test]
    fn every_wrong_value_is_told_with_its_line_its_key_and_what_was_expected() {
        for (key, values) in WRONG {
            let words = Raw::KEYS.iter().find(|known| known.name == *key);
            let words = words.expect(key).expected;
            for value in *values {
                let text = with(key, value);
                let name = key.rsplit('.').next().unwrap();
                let line = text
                    .lines()
                    .position(|line| line == format!("{name} = {value}"));
                let error = load(&text).expect_err(&text);
                let (file, said) = error.split_once(".toml:").expect(&error);
                assert!(file.ends_with("/agent"), "{error}");
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
        let long = load(&with("listen.admin", &format!("{:?}", "x".repeat(100)))).unwrap_err();
        assert!(
            long.contains("`listen.admin` cannot be") && long.contains("107 bytes"),
            "{long}"
        );
    }

    #[test]
    fn a_near_miss_is_answered_with_a_suggestion() {
        for (key, value, suggestion) in [
            ("trust.stale", "\"refused\"", "did you mean `refuse`?"),
            ("database.drift", "\"reapir\"", "did you mean `repair`?"),
            ("clamd.sockets", "\"none\"", "did you mean `socket`?"),
        ] {
            let error = load(&with(key, value)).unwrap_err();
            assert!(error.ends_with(suggestion), "{error}");
        }
    }

    #[test]
    fn every_key_has_words_for_what_is_expected_and_is_tried_with_wrong_values() {
        let mut known = Vec::new();
        for table in ["", "tls.", "trust.", "listen.", "database.", "clamd."] {
            let text = match table {
                "" => format!("zzz = 1\n{MINIMAL}"),
                table => with(&format!("{table}zzz"), "1"),
            };
            let error = load(&text).unwrap_err();
            let (_, keys) = error.split_once("expected one of: ").expect(&error);
            known.extend(keys.split(", ").map(|key| format!("{table}{key}")));
        }
        for key in &known {
            let below = (Raw::KEYS.iter()).any(|known| known.name.starts_with(&format!("{key}.")));
            let here = Raw::KEYS.iter().any(|known| known.name == key);
            assert!(below || here, "{key} has no words");
        }
        for Key {
            name: key,
            expected: words,
            ..
        } in Raw::KEYS
        {
            assert!(known.iter().any(|name| name == key), "{key} is no key");
            assert!(
                WRONG.iter().any(|(tried, _)| tried == key),
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
            let path = dir.path().join("agent.toml");
            std::fs::write(&path, text).unwrap();
            path
        };
        let minimal = Config::load(&write(MINIMAL)).unwrap();
        for key in KEYS {
            // clamd.conf comes before these two.
            if ["clamd.socket", "clamd.pid_file"].contains(&key.name) {
                continue;
            }
            match key.value {
                Value::Default(value) => {
                    let set = Config::load(&write(&with(key.name, value))).expect(key.name);
                    assert_eq!(format!("{set:?}"), format!("{minimal:?}"), "{}", key.name);
                }
                Value::Named(_) => unreachable!("no table has names that the operator chooses"),
                Value::Required(value) | Value::Reserved(value) => {
                    Config::load(&write(&with(key.name, value))).expect(key.name);
                }
            }
        }
    }

    #[test]
    fn every_key_without_a_default_is_missed() {
        for key in ["master", "state", "ca", "cert", "key", "keys", "path"] {
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
        let error = load(MINIMAL.split("[database]").next().unwrap()).unwrap_err();
        assert!(error.contains("table [database] is missing"), "{error}");
    }
}
