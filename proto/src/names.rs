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
            .map(|c| if is_deceptive(c) { '?' } else { c })
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
    /// clamcast's own proof files, and it looks the same in a terminal as in a directory. Spaces and
    /// letters of every script are allowed, because clamd loads such files. The extension may be one
    /// that a later ClamAV brings: an agent that refused it would refuse the whole manifest, on hosts
    /// that nobody upgrades in a hurry. [`DatabaseName::has_known_extension`] decides what a master
    /// publishes.
    DatabaseName,
    "a database name",
    "expected a file name with an extension, no slash, no leading dot, no white space at either \
     end, no control or invisible characters, at most 255 bytes, and not one of clamcast's own",
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
        && !has_own_prefix(text)
        && text.trim() == text
        && !text.chars().any(|c| c == '/' || is_deceptive(c))
        && has_extension(text)
}

fn has_own_prefix(text: &str) -> bool {
    let prefix = text.as_bytes().get(..OWN_PREFIX.len());
    prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(OWN_PREFIX.as_bytes()))
}

fn has_extension(text: &str) -> bool {
    text.rsplit_once('.')
        .is_some_and(|(stem, extension)| !stem.is_empty() && !extension.is_empty())
}

/// Whether a terminal or a log would show a text with this character as a text that it is not: by
/// control characters, invisible characters, line separators, or a change of the direction of writing.
fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// Whether clamd would load a file of this name, or carries it beside one that it loads: it looks
/// at how a name ends, whatever it starts with and in whatever case.
pub fn looks_like_a_database(name: &str) -> bool {
    DATABASE_EXTENSIONS
        .iter()
        .any(|extension| stem(name, extension).is_some())
}

/// What stands before a dot and this extension, in whatever case the extension is written: libclamav
/// compares with `cli_strbcasestr`.
fn stem<'n>(name: &'n str, extension: &str) -> Option<&'n str> {
    let at = name.len().checked_sub(extension.len())?;
    let (stem, end) = (name.get(..at)?, name.get(at..)?);
    stem.strip_suffix('.')
        .filter(|_| end.eq_ignore_ascii_case(extension))
}

/// The extension of ClamAV's detached signatures.
const SIGN: &str = "cvd.sign";

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
    /// Whether the extension is one that this version knows, in whatever case.
    pub fn has_known_extension(&self) -> bool {
        looks_like_a_database(&self.0)
    }

    /// Whether agents that do not announce [`crate::wire::Feature::WideNames`] accept the name and
    /// treat the file by its kind: printable ASCII without a space, and the extension as ClamAV
    /// writes it.
    pub fn is_plain(&self) -> bool {
        let ends = |extension: &&str| {
            let stem = self.0.strip_suffix(*extension);
            stem.is_some_and(|stem| stem.ends_with('.'))
        };
        self.0.bytes().all(|b| b.is_ascii_graphic()) && DATABASE_EXTENSIONS.iter().any(ends)
    }

    /// The name in lower case. Two names of one manifest differ in this form, too: a file system may
    /// fold case, and so do people.
    pub fn folded(&self) -> String {
        self.0.to_lowercase()
    }

    /// What this file is.
    pub fn kind(&self) -> DatabaseKind {
        if stem(&self.0, SIGN).is_some() {
            return DatabaseKind::Sign;
        }
        let (_, extension) = self.parts();
        let is = |known: &str| extension.eq_ignore_ascii_case(known);
        match extension {
            _ if is("cvd") => DatabaseKind::Cvd,
            _ if is("cld") => DatabaseKind::Cld,
            _ if is("cud") => DatabaseKind::Cud,
            _ => DatabaseKind::Loose,
        }
    }

    /// The name without its extension: `daily` for `daily.cld`.
    pub fn base(&self) -> &str {
        stem(&self.0, SIGN).unwrap_or_else(|| self.parts().0)
    }

    /// The base and the version of the `.cvd` that a detached signature is of: `daily` and `27001` for
    /// `daily-27001.cvd.sign`. `None` for every other file.
    pub fn signs(&self) -> Option<(&str, &str)> {
        let (base, version) = stem(&self.0, SIGN)?.rsplit_once('-')?;
        let is_version = version.bytes().all(|b| b.is_ascii_digit());
        is_version.then_some((base, version))
    }

    /// What the files of one database have in common: `daily` for `daily.cld` and for
    /// `daily-27001.cvd.sign`.
    pub fn database_base(&self) -> &str {
        self.signs().map_or(self.base(), |(base, _version)| base)
    }

    fn parts(&self) -> (&str, &str) {
        self.0
            .rsplit_once('.')
            .expect("a database name has an extension")
    }

    /// The other form of a signed container: `daily.cvd` for `daily.cld` and the reverse, with the
    /// extension in the same case.
    pub fn other_form(&self) -> Option<Self> {
        match self.kind() {
            DatabaseKind::Cvd | DatabaseKind::Cld => {}
            DatabaseKind::Cud | DatabaseKind::Sign | DatabaseKind::Loose => return None,
        }
        let (base, extension) = self.parts();
        let other = extension.chars().map(|c| match c {
            'v' => 'l',
            'V' => 'L',
            'l' => 'v',
            'L' => 'V',
            c => c,
        });
        Some(Self(format!("{base}.{}", other.collect::<String>())))
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
            "gr\u{f6}\u{df}e.ndb",
            "LOCAL.NDB",
            "\u{65e5}\u{672c}.yara",
            "it's \"quoted\": yes; no?.ndb",
        ] {
            assert!(database(good), "{good}");
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
            "CLAMCAST-canary.hsb",
            "daily.cld/..",
            "..",
            "x\0.cld",
            " x.cld",
            "x.cld ",
            "x.cld\u{a0}",
            "x\u{85}.cld",
            "x\u{7f}.cld",
        ] {
            assert!(!database(bad), "{bad}");
        }
        assert!(!database(&format!("{}.cld", "x".repeat(252))));
        assert!(!database(&format!("{}.cld", "\u{f6}".repeat(126))));
        assert!(database(&format!("{}.cld", "\u{f6}".repeat(125))));
    }

    #[test]
    fn a_character_that_fakes_a_name_in_a_terminal_is_refused_and_never_repeated() {
        for c in [
            '\u{202e}', '\u{2066}', '\u{200b}', '\u{2028}', '\u{feff}', '\u{1b}',
        ] {
            let text = format!("a{c}bdn.exe.ndb");
            let error = text.parse::<DatabaseName>().unwrap_err().to_string();
            assert!(!error.contains(c), "{error:?}");
        }
    }

    #[test]
    fn an_extension_of_a_later_clamav_is_a_name_that_is_not_known() {
        let known = |text: &str| text.parse::<DatabaseName>().unwrap().has_known_extension();
        for name in [
            "daily.cld",
            "old.db",
            "x.ndb",
            "daily-27001.cvd.sign",
            "daily.CLD",
            "a b.Ndb",
        ] {
            assert!(known(name), "{name}");
        }
        for name in ["daily.xdb", "daily.tmp", "x.sign", "freshclam.dat"] {
            assert!(!known(name), "{name}");
        }
        let later: DatabaseName = "daily.xdb".parse().unwrap();
        assert_eq!((later.base(), later.kind()), ("daily", DatabaseKind::Loose));
        assert_eq!(
            "x.sign".parse::<DatabaseName>().unwrap().kind(),
            DatabaseKind::Loose
        );
        assert!(looks_like_a_database("Daily.CLD") && looks_like_a_database(".x.cvd"));
        assert!(looks_like_a_database(".ndb") && looks_like_a_database("\u{f6}.ndb"));
        assert!(!looks_like_a_database("daily.xdb") && !looks_like_a_database("ndb"));
        assert!(!looks_like_a_database("\u{f6}b") && !looks_like_a_database("x\u{f6}ndb"));
    }

    #[test]
    fn the_case_of_an_extension_does_not_change_what_a_file_is() {
        let kind = |text: &str| text.parse::<DatabaseName>().unwrap().kind();
        assert_eq!(kind("DAILY.CVD"), DatabaseKind::Cvd);
        assert_eq!(kind("daily.Cld"), DatabaseKind::Cld);
        assert_eq!(kind("x.CUD"), DatabaseKind::Cud);
        assert_eq!(kind("daily-7.CVD.Sign"), DatabaseKind::Sign);
        let name: DatabaseName = "daily-7.CVD.Sign".parse().unwrap();
        assert_eq!(name.base(), "daily-7");
    }

    #[test]
    fn plain_names_are_those_that_earlier_agents_accept() {
        let plain = |text: &str| text.parse::<DatabaseName>().unwrap().is_plain();
        for name in ["daily.cld", "Local.ndb", "daily-27001.cvd.sign", "a:b.ign2"] {
            assert!(plain(name), "{name}");
        }
        for name in [
            "a b.ndb",
            "gr\u{f6}\u{df}e.ndb",
            "LOCAL.NDB",
            "daily.CVD",
            "daily.xdb",
        ] {
            assert!(!plain(name), "{name}");
        }
    }

    #[test]
    fn names_that_differ_only_in_case_fold_to_one_text() {
        let folded = |text: &str| text.parse::<DatabaseName>().unwrap().folded();
        assert_eq!(folded("GR\u{d6}SSE.NDB"), folded("gr\u{f6}sse.ndb"));
        assert_ne!(folded("a.ndb"), folded("b.ndb"));
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
    fn a_detached_signature_is_of_one_version() {
        let signs = |text: &str| {
            let name: DatabaseName = text.parse().unwrap();
            name.signs()
                .map(|(base, version)| format!("{base} {version}"))
        };
        assert_eq!(signs("daily-27001.cvd.sign").unwrap(), "daily 27001");
        assert_eq!(signs("alpha-beta-7.CVD.sign").unwrap(), "alpha-beta 7");
        for other in ["daily.cvd.sign", "daily-x.cvd.sign", "daily-27001.cvd"] {
            assert_eq!(signs(other), None, "{other}");
        }
        for name in ["daily-27001.cvd.sign", "daily.cvd.sign", "daily.cld"] {
            let name: DatabaseName = name.parse().unwrap();
            assert_eq!(name.database_base(), "daily", "{name}");
        }
    }

    #[test]
    fn the_other_form_of_a_container() {
        let name: DatabaseName = "daily.cvd".parse().unwrap();
        assert_eq!(name.other_form().unwrap().as_str(), "daily.cld");
        assert_eq!(name.other_form().unwrap().other_form().unwrap(), name);
        assert_eq!("x.ndb".parse::<DatabaseName>().unwrap().other_form(), None);
        let name: DatabaseName = "Daily.Cvd".parse().unwrap();
        assert_eq!(name.other_form().unwrap().as_str(), "Daily.Cld");
    }
}
