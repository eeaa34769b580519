//! Names that are safe to use where they are used: in paths, URIs, logs and tables.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest fleet, agent or group name. A DNS name fits, and so does the URI around it in a
/// certificate.
pub const NAME_BYTES_MAX: usize = 253;

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
    AgentName, "an agent name", NAME_RULE, is_name
}
name! {
    /// The name of a group of agents.
    GroupName, "a group name", NAME_RULE, is_name
}
name! {
    /// The file name of a database: something that clamd loads by its extension, or carries beside
    /// one (`.cvd.sign`). It cannot leave its directory, be hidden, or be one of clamcast's own
    /// proof files.
    DatabaseName,
    "a database name",
    "expected a file name with a ClamAV database extension, no slash, no leading dot, printable \
     ASCII, at most 255 bytes, and not one of clamcast's own",
    is_database
}

/// Prefix of the files that the agent itself keeps beside the databases. A manifest that names one
/// could forge the proof of what clamd has loaded.
pub const OWN_PREFIX: &str = "clamcast-";

/// Every extension that clamd 1.4 loads from its directory (`CLI_DBEXT` in libclamav/readdb.h),
/// lower case, and the detached signatures that ClamAV 1.5 keeps beside a container.
pub const DATABASE_EXTENSIONS: &[&str] = &[
    "cat", "cbc", "cdb", "cfg", "cld", "crb", "crtdb", "cud", "cvd", "cvd.sign", "fp", "ftm",
    "gdb", "hdb", "hdu", "hsb", "hsu", "idb", "ign", "ign2", "imp", "info", "ioc", "ldb", "ldu",
    "mdb", "mdu", "msb", "msu", "ndb", "ndu", "pdb", "pwdb", "rmd", "sdb", "sfp", "wdb", "yar",
    "yara", "zmd",
];

fn is_database(text: &str) -> bool {
    text.len() <= DATABASE_NAME_BYTES_MAX
        && !text.starts_with('.')
        && !text.starts_with(OWN_PREFIX)
        && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
        && DATABASE_EXTENSIONS.iter().any(|ext| {
            text.strip_suffix(ext)
                .is_some_and(|stem| stem.len() > 1 && stem.ends_with('.'))
        })
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
    /// What this file is.
    pub fn kind(&self) -> DatabaseKind {
        match self
            .0
            .rsplit_once('.')
            .expect("a database name has an extension")
            .1
        {
            "cvd" => DatabaseKind::Cvd,
            "cld" => DatabaseKind::Cld,
            "cud" => DatabaseKind::Cud,
            "sign" => DatabaseKind::Sign,
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
            "daily.tmp",
            "",
            "x.cld\n",
            "clamcast-canary.hsb",
            "daily.cld/..",
            "..",
            "x\0.cld",
            "daily.CLD",
        ] {
            assert!(!database(bad), "{bad}");
        }
        assert!(!database(&format!("{}.cld", "x".repeat(252))));
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
