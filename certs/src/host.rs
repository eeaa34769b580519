//! Names and addresses under which agents reach the master.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use clamcast_proto::wire::PORT;
use serde::{Deserialize, Serialize};

/// A DNS name or an IP address, without a port. It goes into the master's certificate and into
/// every agent's configuration.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(into = "String", try_from = "String")]
pub enum Host {
    /// A DNS name, in lower case.
    Name(String),
    /// An address.
    Address(IpAddr),
}

/// The text is not a host.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not a host: {rule}")]
pub struct HostError {
    text: String,
    rule: &'static str,
}

/// Longest DNS name and longest label in it (RFC 1035 section 2.3.4).
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

impl Host {
    /// The address as agents dial it: `mirror.example.net:7310`, `[2001:db8::1]:7310`.
    pub fn with_port(&self) -> String {
        match self {
            Self::Address(IpAddr::V6(address)) => format!("[{address}]:{PORT}"),
            Self::Name(_) | Self::Address(IpAddr::V4(_)) => format!("{self}:{PORT}"),
        }
    }
}

impl FromStr for Host {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let fail = |rule| {
            let clean = |c: char| if c.is_control() { '?' } else { c };
            let text = text.chars().take(80).map(clean).collect();
            Err(HostError { text, rule })
        };
        let bare = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            if address.is_unspecified() || address.is_multicast() {
                return fail("agents cannot dial it; name an address of the master");
            }
            return Ok(Self::Address(address));
        }
        if text
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.parse::<u16>().is_ok())
        {
            return fail("give it without a port, agents use 7310");
        }
        let label = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // A last label of digits would be a misspelt IPv4 address: no top-level domain is one.
        let numeric = text
            .rsplit('.')
            .next()
            .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if text.len() > NAME_BYTES_MAX || numeric || !text.split('.').all(label) {
            return fail("expected a DNS name such as `mirror.example.net`, or an IP address");
        }
        Ok(Self::Name(text.to_ascii_lowercase()))
    }
}

impl TryFrom<String> for Host {
    type Error = HostError;

    fn try_from(text: String) -> Result<Self, HostError> {
        text.parse()
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.to_string()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_dialled_at_our_port() {
        let check = |text: &str, dialled: &str| {
            assert_eq!(text.parse::<Host>().unwrap().with_port(), dialled, "{text}");
        };
        check("mirror.example.net", "mirror.example.net:7310");
        check("Mirror", "mirror:7310");
        check("192.0.2.7", "192.0.2.7:7310");
        check("2001:db8::1", "[2001:db8::1]:7310");
        check("[::1]", "[::1]:7310");
    }

    #[test]
    fn what_agents_could_not_dial_is_refused() {
        let check = |text: &str, why: &str| {
            let error = text.parse::<Host>().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        check("mirror:7310", "without a port");
        check("192.0.2.7:7310", "without a port");
        check("0.0.0.0", "cannot dial");
        check("::", "cannot dial");
        for text in [
            "",
            ".",
            "a..b",
            "a.",
            "*.example.net",
            "a b",
            "a/b",
            "-a",
            "a-",
            "192.0.2",
            "1.2.3.256",
            "https://a",
            "a\"b",
            "a\nb",
            "é.net",
        ] {
            check(text, "expected a DNS name");
        }
        check(&"a".repeat(64), "expected a DNS name");
        check(&"a.".repeat(130), "expected a DNS name");
    }
}
