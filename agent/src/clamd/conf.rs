//! clamd.conf, read as clamd reads it.
//!
//! After `optparse` of ClamAV's common/optparser.c, and tried on clamd 1.4: an option and its
//! value a line, separated by blanks; the value goes on to the end of the line, whatever is in it,
//! or stands in double quotes; `#` begins a comment only where a line begins; names are case
//! sensitive; of an option that may stand once the first counts.

use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, InputError};

use super::client::Address;

/// Largest clamd.conf that is read, in bytes. The commented example is 26 kB.
const CONF_BYTES_MAX: u64 = 1 << 20;

/// What stands before and after an option.
const BLANK: [char; 2] = [' ', '\t'];

/// What we want to know of a clamd.conf.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ClamdConf {
    /// `DatabaseDirectory`.
    pub database_directory: Option<PathBuf>,
    /// `LocalSocket`.
    pub local_socket: Option<PathBuf>,
    /// `TCPSocket`.
    pub tcp_port: Option<u16>,
    /// `TCPAddr`, as often as it stands there.
    pub tcp_addresses: Vec<String>,
    /// `LogFile`.
    pub log_file: Option<PathBuf>,
    /// `PidFile`.
    pub pid_file: Option<PathBuf>,
    /// `User`.
    pub user: Option<String>,
    /// `VirusEvent`.
    pub virus_event: Option<String>,
    /// `ConcurrentDatabaseReload`; clamd's default is yes.
    pub concurrent_reload: Option<bool>,
    /// `OfficialDatabaseOnly`; clamd's default is no.
    pub official_only: Option<bool>,
    /// `SelfCheck`, in seconds; clamd's default is 600, Debian's file says 3600.
    pub self_check: Option<u64>,
    /// `EnableReloadCommand`, from ClamAV 1.5 on; clamd's default is yes, Ubuntu's file says no.
    pub reload_command: Option<bool>,
    /// Whether there is a line that begins with `Example`: clamd does not start with it.
    pub is_example: bool,
}

impl ClamdConf {
    /// Where distributions put it: Debian, Red Hat, older Red Hat, built from source.
    pub const PLACES: [&str; 4] = [
        "/etc/clamav/clamd.conf",
        "/etc/clamd.d/scan.conf",
        "/etc/clamd.conf",
        "/usr/local/etc/clamd.conf",
    ];

    /// The first of the places of the distributions where there is one.
    pub fn find() -> Option<PathBuf> {
        let mut places = Self::PLACES.map(PathBuf::from).into_iter();
        places.find(|path| path.exists())
    }

    /// The one in the file `path`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn read(path: &Path) -> Result<Self, InputError> {
        let origin = "correct `[clamd] config`, or set it to \"\" and give `socket`";
        let bytes = input::read("clamd.config", path, CONF_BYTES_MAX, origin)?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    /// What stands in `text`. What clamd would not start with is passed over: it is clamd's to
    /// complain about.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        let mut lines = text.split('\n');
        conf.is_example = lines.any(|line| line.trim_start_matches(BLANK).starts_with("Example"));
        for (option, value) in text.split('\n').filter_map(option) {
            match option {
                "DatabaseDirectory" => first(&mut conf.database_directory, path(value)),
                "LocalSocket" => first(&mut conf.local_socket, path(value)),
                "TCPSocket" => first(&mut conf.tcp_port, value.parse().ok()),
                "TCPAddr" => conf.tcp_addresses.push(value.to_owned()),
                "LogFile" => first(&mut conf.log_file, path(value)),
                "PidFile" => first(&mut conf.pid_file, path(value)),
                "User" => first(&mut conf.user, Some(value.to_owned())),
                "VirusEvent" => first(&mut conf.virus_event, Some(value.to_owned())),
                "ConcurrentDatabaseReload" => first(&mut conf.concurrent_reload, yes(value)),
                "OfficialDatabaseOnly" => first(&mut conf.official_only, yes(value)),
                "SelfCheck" => first(&mut conf.self_check, value.parse().ok()),
                "EnableReloadCommand" => first(&mut conf.reload_command, yes(value)),
                _ => {}
            }
        }
        conf
    }

    /// Where this clamd can be spoken to: its Unix socket if it has one, else over TCP.
    pub fn address(&self) -> Option<Address> {
        let local = self.local_socket.clone().map(Address::Unix);
        local.or_else(|| self.tcp_address())
    }

    /// Every way in which this clamd can be named.
    pub(super) fn is_at(&self, address: &Address) -> bool {
        let local = self.local_socket.clone().map(Address::Unix);
        local.as_ref() == Some(address) || self.tcp_address().as_ref() == Some(address)
    }

    fn tcp_address(&self) -> Option<Address> {
        let port = self.tcp_port?;
        // A clamd without TCPAddr listens everywhere, and so on the loopback.
        let host = match self.tcp_addresses.first().map(String::as_str) {
            None | Some("0.0.0.0") => "127.0.0.1",
            Some("::") => "::1",
            Some(host) => host,
        };
        Some(Address::Tcp(if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        }))
    }
}

/// Option and value of a line that has both.
fn option(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start_matches(BLANK);
    if line.starts_with('#') {
        return None;
    }
    let (option, value) = line.split_once(BLANK)?;
    let value = value.trim_matches(BLANK);
    let value = match value.strip_prefix('"') {
        Some(quoted) => &quoted[..quoted.rfind('"')?],
        None => value,
    };
    (!value.is_empty()).then_some((option, value))
}

fn first<T>(place: &mut Option<T>, value: Option<T>) {
    if place.is_none() {
        *place = value;
    }
}

fn path(value: &str) -> Option<PathBuf> {
    Some(value.into())
}

/// `None` for what clamd refuses to start with.
fn yes(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "yes" | "true" | "1" => Some(true),
        "no" | "false" | "0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_address(text: &str, address: &str) {
        let conf = ClamdConf::parse(text);
        let found = conf.address().map(|a| a.to_string()).unwrap_or_default();
        assert_eq!(found, address, "{text:?}");
    }

    #[test]
    fn lines_are_read_as_clamd_reads_them() {
        let socket = |text: &str| {
            let path = ClamdConf::parse(text).local_socket;
            path.map(|p| p.display().to_string()).unwrap_or_default()
        };
        assert_eq!(socket("LocalSocket /run/a.ctl\n"), "/run/a.ctl");
        assert_eq!(socket("  LocalSocket\t /run/a.ctl \t\n"), "/run/a.ctl");
        assert_eq!(socket("LocalSocket /run/a.ctl"), "/run/a.ctl");
        assert_eq!(socket("LocalSocket /run/a # b\n"), "/run/a # b");
        assert_eq!(socket("LocalSocket \"/run/a b\" c\n"), "/run/a b");
        assert_eq!(socket("LocalSocket /run/a\nLocalSocket /run/b\n"), "/run/a");
        assert_eq!(socket("#LocalSocket /run/a\n # LocalSocket /run/b\n"), "");
        assert_eq!(socket("localsocket /run/a\n"), "");
        assert_eq!(
            socket("LocalSocket\nLocalSocket \nLocalSocket \"/run\n"),
            ""
        );
    }

    #[test]
    fn an_example_is_known_by_how_a_line_begins() {
        let example = |text: &str| ClamdConf::parse(text).is_example;
        assert!(example("SelfCheck 1\nExample\n"));
        assert!(example("  Examples are good\n"));
        assert!(!example("#Example\n # Example\nexample\n"));
    }

    #[test]
    fn yes_and_no_have_three_forms_in_any_case() {
        let concurrent = |value| {
            ClamdConf::parse(&format!("ConcurrentDatabaseReload {value}\n")).concurrent_reload
        };
        for value in ["yes", "YES", "true", "True", "1"] {
            assert_eq!(concurrent(value), Some(true), "{value}");
        }
        for value in ["no", "No", "false", "0"] {
            assert_eq!(concurrent(value), Some(false), "{value}");
        }
        for value in ["on", "off", "2", "y"] {
            assert_eq!(concurrent(value), None, "{value}");
        }
        let twice = "OfficialDatabaseOnly no\nOfficialDatabaseOnly yes\n";
        assert_eq!(ClamdConf::parse(twice).official_only, Some(false));
    }

    #[test]
    fn the_address_is_the_local_socket_or_tcp() {
        check_address("LocalSocket /run/a\nTCPSocket 3310\n", "/run/a");
        check_address("TCPSocket 3310\n", "127.0.0.1:3310");
        check_address("TCPSocket 3310\nTCPAddr 0.0.0.0\n", "127.0.0.1:3310");
        check_address("TCPSocket 3310\nTCPAddr ::\n", "[::1]:3310");
        check_address(
            "TCPSocket 3310\nTCPAddr 10.0.0.7\nTCPAddr ::1\n",
            "10.0.0.7:3310",
        );
        check_address("TCPSocket 3310\nTCPAddr localhost\n", "localhost:3310");
        check_address("TCPAddr 10.0.0.7\n", "");
        check_address("", "");
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error_with_its_name() {
        let error = ClamdConf::read(Path::new("/nowhere/clamd.conf")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "clamd.config: /nowhere/clamd.conf does not exist; correct `[clamd] config`, or set it to \"\" and give `socket`"
        );
    }
}
