//! Names that are safe to use where they are used: in paths, URIs, logs and tables.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest fleet or group name. A DNS name fits, and so does the URI around it in a certificate.
pub const NAME_BYTES_MAX: usize = 253;

/// Longest agent name: `NAME.json` is a file on the master, and a file name has at most 255 bytes.
pub const AGENT_NAME_BYTES_MAX: usize = 255 - ".json".len();

/// Longest database file name: NAME_MAX of every Linux file system.
pub const DATABASE_NAME_BYTES_MAX: usize = 255;

/// A text is not a name of the kind that was expected.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not {kind}: {rule}")]
pub struct NameError {
    text: String,
    kind: &'static str,
    rule: &'static str,
}

impl NameError {
    fn new(text: &str, kind: &'static str, rule: &'static str) -> Self {
        // A hostile name must not fill or garble a log.
        let text = text
            .chars()
            .take(80)
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        Self { text, kind, rule }
    }
}

const NAME_RULE: &str = "expected letters, digits, `.`, `_` and `-`, first and last a letter or \
                         digit, at most 253 bytes";

const AGENT_NAME_RULE: &str = "expected letters, digits, `.`, `_` and `-`, first and last a letter \
                               or digit, at most 250 bytes";

fn is_agent_name(text: &str) -> bool {
    is_name(text) && text.len() <= AGENT_NAME_BYTES_MAX
}

fn is_name(text: &str) -> bool {
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= NAME_BYTES_MAX
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $rule:expr, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if $check(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError::new(text, $kind, $rule))
                }
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// The name of a fleet: one master and its agents.
    FleetName, "a fleet name", NAME_RULE, is_name
}
name! {
    /// The name of an agent, as its certificate has it; also a file name on the master.
    AgentName, "an agent name", AGENT_NAME_RULE, is_agent_name
}
name! {
    /// The name of a group of agents.
    GroupName, "a group name", NAME_RULE, is_name
}
name! {
    /// The file name of a database. It cannot leave its directory, be hidden, or be one of
    /// clamcast's own proof files. Its extension may be one that a later ClamAV brings: an agent
    /// that knew it better would refuse everything else in the manifest with it, on hosts that
    /// nobody upgrades in a hurry. What a mirror's files are is asked of
    /// [`DatabaseName::has_known_extension`].
    DatabaseName,
    "a database name",
    "expected a file name with an extension, no slash, no leading dot, printable ASCII, at most \
     255 bytes, and not one of clamcast's own",
    is_database
}

/// Prefix of the files that the agent itself keeps beside the databases. A manifest that names one
/// could forge the proof of what clamd has loaded.
pub const OWN_PREFIX: &str = "clamcast-";

/// Every extension that clamd 1.4 loads from its directory (`CLI_DBEXT` in libclamav/readdb.h),
/// lower case, and the detached signatures that ClamAV 1.5 keeps beside a container.
pub const DATABASE_EXTENSIONS: &[&str] = &[
    "cat", "cbc", "cdb", "cfg", "cld", "crb", "crtdb", "cud", "cvd", "cvd.sign", "db", "fp", "ftm",
    "gdb", "hdb", "hdu", "hsb", "hsu", "idb", "ign", "ign2", "imp", "info", "ioc", "ldb", "ldu",
    "mdb", "mdu", "msb", "msu", "ndb", "ndu", "pdb", "pwdb", "rmd", "sdb", "sfp", "wdb", "yar",
    "yara", "zmd",
];

fn is_database(text: &str) -> bool {
    text.len() <= DATABASE_NAME_BYTES_MAX
        && !text.starts_with('.')
        && !text.starts_with(OWN_PREFIX)
        && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
        && text
            .rsplit_once('.')
            .is_some_and(|(stem, extension)| !stem.is_empty() && !extension.is_empty())
}

/// Whether clamd would load a file of this name, or carries it beside one that it loads: it looks
/// at how a name ends, whatever it starts with and in whatever case.
pub fn looks_like_a_database(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    DATABASE_EXTENSIONS
        .iter()
        .any(|extension| ends_with(&name, extension))
}

fn ends_with(name: &str, extension: &str) -> bool {
    name.strip_suffix(extension)
        .is_some_and(|stem| stem.ends_with('.'))
}

/// What a database file is, by its name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DatabaseKind {
    /// `.cvd`: a container as Talos signed it.
    Cvd,
    /// `.cld`: a container that freshclam patched; its members are signed.
    Cld,
    /// `.cud`: an unsigned container.
    Cud,
    /// `NAME-VERSION.cvd.sign`: carried, never loaded.
    Sign,
    /// Anything else: signatures as lines of text or bytecode.
    Loose,
}

impl DatabaseName {
    /// Whether the extension is one that this version knows, as ClamAV writes it.
    pub fn has_known_extension(&self) -> bool {
        DATABASE_EXTENSIONS
            .iter()
            .any(|extension| ends_with(&self.0, extension))
    }

    /// What this file is.
    pub fn kind(&self) -> DatabaseKind {
        if ends_with(&self.0, "cvd.sign") {
            return DatabaseKind::Sign;
        }
        let (_, extension) = self
            .0
            .rsplit_once('.')
            .expect("a database name has an extension");
        match extension {
            "cvd" => DatabaseKind::Cvd,
            "cld" => DatabaseKind::Cld,
            "cud" => DatabaseKind::Cud,
            _ => DatabaseKind::Loose,
        }
    }

    /// The name without its extension: `daily` for `daily.cld`.
    pub fn base(&self) -> &str {
        let stem = self.0.strip_suffix(".cvd.sign");
        stem.unwrap_or_else(|| {
            self.0
                .rsplit_once('.')
                .expect("a database name has an extension")
                .0
        })
    }

    /// The other form of a signed container: `daily.cvd` for `daily.cld` and the reverse.
    pub fn other_form(&self) -> Option<Self> {
        let other = match self.kind() {
            DatabaseKind::Cvd => "cld",
            DatabaseKind::Cld => "cvd",
            DatabaseKind::Cud | DatabaseKind::Sign | DatabaseKind::Loose => return None,
        };
        Some(Self(format!("{}.{other}", self.base())))
    }

    /// Whether the file is a container with a ClamAV header.
    pub fn is_container(&self) -> bool {
        matches!(
            self.kind(),
            DatabaseKind::Cvd | DatabaseKind::Cld | DatabaseKind::Cud
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(text: &str) -> bool {
        text.parse::<DatabaseName>().is_ok()
    }

    #[test]
    fn a_database_name_cannot_leave_its_directory_or_hide() {
        for good in [
            "daily.cld",
            "main.cvd",
            "x.ndb",
            "rfxn.yara",
            "daily-27001.cvd.sign",
            "a b.ndb",
        ] {
            assert_eq!(database(good), !good.contains(' '), "{good}");
        }
        for bad in [
            "../daily.cld",
            "a/b.cld",
            "/x.cld",
            ".daily.cld",
            ".cld",
            "daily",
            "daily.",
            "",
            "x.cld\n",
            "clamcast-canary.hsb",
            "daily.cld/..",
            "..",
            "x\0.cld",
        ] {
            assert!(!database(bad), "{bad}");
        }
        assert!(!database(&format!("{}.cld", "x".repeat(252))));
    }

    #[test]
    fn an_extension_of_a_later_clamav_is_a_name_that_is_not_known() {
        let known = |text: &str| text.parse::<DatabaseName>().unwrap().has_known_extension();
        for name in ["daily.cld", "old.db", "x.ndb", "daily-27001.cvd.sign"] {
            assert!(known(name), "{name}");
        }
        for name in [
            "daily.xdb",
            "daily.tmp",
            "daily.CLD",
            "x.sign",
            "freshclam.dat",
        ] {
            assert!(!known(name), "{name}");
        }
        let later: DatabaseName = "daily.xdb".parse().unwrap();
        assert_eq!((later.base(), later.kind()), ("daily", DatabaseKind::Loose));
        assert_eq!(
            "x.sign".parse::<DatabaseName>().unwrap().kind(),
            DatabaseKind::Loose
        );
        assert!(looks_like_a_database("Daily.CLD") && looks_like_a_database(".x.cvd"));
        assert!(!looks_like_a_database("daily.xdb") && !looks_like_a_database("ndb"));
    }

    #[test]
    fn names_are_safe_in_paths_and_uris() {
        for good in ["web1", "db-01.example.net", "A_b"] {
            assert!(good.parse::<AgentName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "x\n", "é", "*"] {
            assert!(bad.parse::<AgentName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_other_form_of_a_container() {
        let name: DatabaseName = "daily.cvd".parse().unwrap();
        assert_eq!(name.other_form().unwrap().as_str(), "daily.cld");
        assert_eq!(name.other_form().unwrap().other_form().unwrap(), name);
        assert_eq!("x.ndb".parse::<DatabaseName>().unwrap().other_form(), None);
    }
}
