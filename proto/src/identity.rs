//! Who a certificate speaks for: URI names under the fleet's own CA.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::dsse::PublicKey;
use crate::{AgentName, Digest, FleetName, GroupName};

/// Groups in one certificate.
pub const GROUPS_MAX: usize = 64;

/// What a certificate says of its holder.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// The fleet.
    pub fleet: FleetName,
    /// Master or agent.
    pub role: Role,
}

/// The holder's part in the fleet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// The master.
    Master,
    /// An agent.
    Agent {
        /// Its name.
        name: AgentName,
        /// The groups that its certificate gives it.
        groups: Vec<GroupName>,
    },
}

/// The facts of a certificate that clamcast uses. Reading them verifies nothing; the TLS handshake
/// does that.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Certificate {
    /// SHA-256 of its DER encoding.
    pub fingerprint: Digest,
    /// Its serial number.
    pub serial: Serial,
    /// First second of its validity.
    pub not_before: Timestamp,
    /// Last second of its validity.
    pub not_after: Timestamp,
    /// The holder's key.
    pub key: PublicKey,
    /// The holder. `None` for a CA.
    pub identity: Option<Identity>,
}

/// A certificate's serial number: lower-case hexadecimal digits.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Serial(pub String);

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const SCHEME: &str = "clamcast://";

impl Identity {
    /// The names that go into the certificate as URI SANs.
    pub fn uris(&self) -> Vec<String> {
        let fleet = &self.fleet;
        match &self.role {
            Role::Master => vec![format!("{SCHEME}{fleet}/master")],
            Role::Agent { name, groups } => {
                std::iter::once(format!("{SCHEME}{fleet}/agent/{name}"))
                    .chain(
                        groups
                            .iter()
                            .map(|group| format!("{SCHEME}{fleet}/group/{group}")),
                    )
                    .collect()
            }
        }
    }

    /// Reads the URI SANs of a certificate; other URIs are not ours to judge.
    fn from_uris<'u>(
        uris: impl Iterator<Item = &'u str>,
    ) -> Result<Option<Self>, CertificateError> {
        let mut fleet = None;
        let mut role = None;
        let mut groups = Vec::new();
        for uri in uris {
            let Some(rest) = uri.strip_prefix(SCHEME) else {
                continue;
            };
            let unclear = || CertificateError::Name(uri.chars().take(200).collect());
            let (its_fleet, path) = rest.split_once('/').ok_or_else(unclear)?;
            let its_fleet: FleetName = its_fleet.parse().map_err(|_| unclear())?;
            if fleet.get_or_insert_with(|| its_fleet.clone()) != &its_fleet {
                return Err(unclear()); // one certificate, one fleet
            }
            let its_role = match path.split_once('/') {
                None if path == "master" => Role::Master,
                Some(("agent", name)) => Role::Agent {
                    name: name.parse().map_err(|_| unclear())?,
                    groups: Vec::new(),
                },
                Some(("group", group)) if groups.len() < GROUPS_MAX => {
                    groups.push(group.parse().map_err(|_| unclear())?);
                    continue;
                }
                None | Some(_) => return Err(unclear()),
            };
            if role.replace(its_role).is_some() {
                return Err(unclear()); // one certificate, one holder
            }
        }
        Ok(match (fleet, role) {
            (Some(fleet), Some(Role::Agent { name, .. })) => Some(Self {
                fleet,
                role: Role::Agent { name, groups },
            }),
            (Some(fleet), Some(Role::Master)) => Some(Self {
                fleet,
                role: Role::Master,
            }),
            (None, _) | (_, None) => None,
        })
    }
}

/// A certificate is not one of ours.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Not X.509.
    #[error("not an X.509 certificate")]
    Malformed,
    /// Not an Ed25519 key.
    #[error("the certificate's key is not an Ed25519 key")]
    Key,
    /// A name in our scheme that we do not understand.
    #[error("the certificate has the name `{0}`, which says nothing clear about its holder")]
    Name(String),
}

/// Ed25519 in an X.509 SubjectPublicKeyInfo (RFC 8410).
const ED25519_OID: &str = "1.3.101.112";

impl Certificate {
    /// Reads a certificate in DER.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        let (_, cert) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        let spki = cert.public_key();
        if spki.algorithm.algorithm.to_id_string() != ED25519_OID {
            return Err(CertificateError::Key);
        }
        let key = PublicKey::from_bytes(&spki.subject_public_key.data)
            .map_err(|_| CertificateError::Key)?;
        let names = cert
            .subject_alternative_name()
            .map_err(|_| CertificateError::Malformed)?;
        let uris = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| {
                if let GeneralName::URI(uri) = name {
                    Some(*uri)
                } else {
                    None
                }
            });
        let time =
            |seconds| Timestamp::from_second(seconds).map_err(|_| CertificateError::Malformed);
        Ok(Self {
            fingerprint: Digest::of(der),
            serial: Serial(hex::encode(cert.raw_serial())),
            not_before: time(cert.validity().not_before.timestamp())?,
            not_after: time(cert.validity().not_after.timestamp())?,
            key,
            identity: Identity::from_uris(uris)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(uris: &[&str]) -> Result<Option<Vec<String>>, String> {
        Identity::from_uris(uris.iter().copied())
            .map(|identity| identity.map(|identity| identity.uris()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn names_come_back_as_they_went_in() {
        for uris in [
            &["clamcast://bank/master"][..],
            &["clamcast://bank/agent/web1"],
            &[
                "clamcast://bank/agent/web1",
                "clamcast://bank/group/dmz",
                "clamcast://bank/group/eu",
            ],
        ] {
            let expected = uris.iter().map(|uri| (*uri).to_owned()).collect();
            assert_eq!(check(uris), Ok(Some(expected)));
        }
        assert_eq!(check(&["https://example.net/"]), Ok(None));
    }

    #[test]
    fn an_unclear_holder_is_refused() {
        for uris in [
            &["clamcast://bank/agent/web1", "clamcast://bank/agent/web2"][..],
            &["clamcast://bank/agent/web1", "clamcast://bank/master"],
            &["clamcast://bank/agent/web1", "clamcast://shop/group/dmz"],
            &["clamcast://bank/agent/../x"],
            &["clamcast://bank/admin/x"],
            &["clamcast://bank"],
        ] {
            assert!(check(uris).is_err(), "{uris:?}");
        }
    }

    #[test]
    fn groups_beyond_the_limit_are_refused() {
        let named = |count| {
            let groups = (0..count).map(|number| format!("clamcast://bank/group/g{number}"));
            let agent = "clamcast://bank/agent/web1".to_owned();
            let uris: Vec<_> = std::iter::once(agent).chain(groups).collect();
            let uris: Vec<_> = uris.iter().map(String::as_str).collect();
            check(&uris).is_ok()
        };
        assert!(named(GROUPS_MAX) && !named(GROUPS_MAX + 1));
    }
}
