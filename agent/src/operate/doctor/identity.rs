//! Who this host is: its certificate, and the keys that it believes.

use clamcast_daemon::credential::Secret;
use clamcast_daemon::input::InputError;
use clamcast_proto::FleetName;
use jiff::Timestamp;

use super::{Finding, PassedKey, is_denied};
use crate::chain;
use crate::config::Config;
use crate::keeper::trust::{self, OpenError};
use crate::link::endpoint::{CERTIFICATE_ENDS_SOON, Credentials, CredentialsError};

/// Checks key set and certificate. The credentials, if they can be used, are for the probe.
/// `passed` is the private key that the unit passes on.
pub(super) fn look(
    config: &Config,
    passed: Option<&PassedKey>,
    now: Timestamp,
) -> (Vec<Finding>, Option<Credentials>) {
    let keys = match trust::look(&config.state, &config.keys) {
        Ok(keys) => keys,
        Err(error) => {
            let advice = "put manifest.pub of this host's bundle there (`clamcast-certs agent`)";
            let why = "the fleet's name is not known without the key set";
            return (
                vec![
                    Finding::bad("keys", chain(&error), advice).denied(may_not_read(&error)),
                    Finding::unknown("certificate", why, None),
                ],
                None,
            );
        }
    };
    let found = format!(
        "version {} of fleet {}, root {}",
        keys.version,
        keys.fleet,
        keys.root.id()
    );
    let mut findings = vec![Finding::good("keys", found)];
    let credentials = match passed {
        None => Credentials::load(&config.tls, &keys.fleet, now),
        Some(PassedKey {
            path,
            content: None,
        }) => {
            let why = format!(
                "{} belongs to root, and systemd passes it on to the agent; only root can look at it",
                path.display()
            );
            findings.push(Finding::unknown("certificate", why, None));
            return (findings, None);
        }
        Some(PassedKey {
            path,
            content: Some(content),
        }) => {
            let key = Secret {
                bytes: content.clone(),
                origin: path.clone(),
            };
            Credentials::with_key(&config.tls, key, &keys.fleet, now)
        }
    };
    findings.push(judge(&credentials, now, &keys.fleet));
    (findings, credentials.ok())
}

/// Whether it is that this user may not read the keys.
fn may_not_read(error: &OpenError) -> bool {
    matches!(error, OpenError::Read(InputError::Denied { .. })) || is_denied(error)
}

fn judge(
    credentials: &Result<Credentials, CredentialsError>,
    now: Timestamp,
    fleet: &FleetName,
) -> Finding {
    let check = "certificate";
    let renew = |name: &str| {
        format!(
            "where the CA is: clamcast-certs agent --dir PKI {name} --force; then put the new \
             bundle here and systemctl restart clamcast-agent"
        )
    };
    let credentials = match credentials {
        Ok(credentials) => credentials,
        Err(error) => {
            let finding = Finding::bad(check, chain(error), advice(error, renew("NAME")));
            return finding.denied(matches!(
                error,
                CredentialsError::Read(InputError::Denied { .. })
            ));
        }
    };
    let (agent, ends) = (&credentials.agent, credentials.certificate.not_after);
    if let Some(doubt) = &credentials.doubt {
        return Finding::bad(check, chain(doubt), advice(doubt, renew(agent.as_str())));
    }
    let left = ends.duration_since(now);
    let days = left.as_hours() / 24;
    let found = format!("{agent} of fleet {fleet}, valid until {ends} ({days} days)");
    if left < CERTIFICATE_ENDS_SOON {
        return Finding::note(check, found, renew(agent.as_str()));
    }
    Finding::good(check, found)
}

/// What to do about files that cannot be used; `renew` is how to make a new certificate.
fn advice(error: &CredentialsError, renew: String) -> String {
    match error {
        CredentialsError::Read(InputError::Denied { .. } | InputError::Io { .. }) => {
            "let the agent's user read it".into()
        }
        CredentialsError::Read(
            InputError::Missing { .. }
            | InputError::NoCredential { .. }
            | InputError::NotAFile { .. }
            | InputError::TooLong { .. },
        )
        | CredentialsError::Pem { .. }
        | CredentialsError::Certificate { .. }
        | CredentialsError::NotAnAgent { .. }
        | CredentialsError::Key { .. } => {
            "correct [tls] in agent.toml, or put ca.pem, cert.pem and key.pem of this host's bundle \
             there"
                .into()
        }
        CredentialsError::OtherCa { .. }
        | CredentialsError::OtherKey { .. }
        | CredentialsError::Fleet { .. } => {
            "take ca.pem, cert.pem, key.pem and manifest.pub from one bundle".into()
        }
        CredentialsError::NotYetValid { .. } => "set this host's clock: timedatectl".into(),
        CredentialsError::Expired { .. }
        | CredentialsError::Unfit { .. }
        | CredentialsError::Tls { .. } => renew,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;

    #[track_caller]
    fn check(error: CredentialsError, expected: &str) {
        let fleet = "bank".parse().unwrap();
        let finding = judge(&Err(error), Timestamp::UNIX_EPOCH, &fleet);
        testing::assert_lines(&[finding], &[&format!("bad certificate: | {expected}")]);
    }

    #[test]
    fn a_new_certificate_is_advised_only_where_it_helps() {
        let path = || "/etc/clamcast/x.pem".into();
        check(
            CredentialsError::Expired {
                path: path(),
                not_after: Timestamp::UNIX_EPOCH,
            },
            "-> where the CA is: clamcast-certs agent",
        );
        check(
            CredentialsError::NotYetValid {
                path: path(),
                not_before: Timestamp::MAX,
            },
            "-> set this host's clock",
        );
        check(
            CredentialsError::Read(InputError::Missing {
                key: "tls.key",
                path: path(),
                origin: "it comes with the bundle",
            }),
            "-> correct [tls] in agent.toml, or put",
        );
        check(
            CredentialsError::Read(InputError::Io {
                key: "tls.key",
                path: path(),
                source: std::io::ErrorKind::PermissionDenied.into(),
            }),
            "-> let the agent's user read it",
        );
        check(
            CredentialsError::OtherKey {
                cert: path(),
                key: path(),
            },
            "-> take ca.pem, cert.pem, key.pem and manifest.pub from one bundle",
        );
    }
}
