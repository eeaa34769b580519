//! Makes the fleet's certificates (RFC 5280).
//!
//! Pure: keys, serial numbers and the time are arguments.

use std::time::SystemTime;

use clamcast_proto::FleetName;
use clamcast_proto::identity::{Certificate, Identity, Role};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::host::Host;
use crate::key;

const CA_DAYS: i64 = 3653; // ten years
const LEAF_DAYS: i64 = 365; // one year

/// Certificates count from a little before they were made, for hosts whose clock is behind.
const BACKDATED_HOURS: i64 = 1;

/// A certificate as it is written.
pub(crate) struct Made {
    pub(crate) pem: String,
    pub(crate) certificate: Certificate,
}

/// 126 random bits between two fixed ones: a positive number of always 16 bytes, so that its
/// hexadecimal form always has 32 digits.
pub(crate) fn serial(mut random: [u8; 16]) -> [u8; 16] {
    random[0] = random[0] & 0x3f | 0x40;
    random
}

/// Makes the CA's own certificate.
pub(crate) fn authority(
    fleet: &FleetName,
    key: &SigningKey,
    serial: [u8; 16],
    now: Timestamp,
) -> Result<Made, rcgen::Error> {
    let mut params = params(&format!("clamcast {fleet} CA"), serial);
    let (not_before, not_after) = validity(now, CA_DAYS);
    params.not_before = SystemTime::from(not_before).into();
    params.not_after = SystemTime::from(not_after).into();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    made(&params.self_signed(&key_pair(key)?)?)
}

/// The CA, able to sign.
pub(crate) struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
    key: SigningKey,
}

impl Authority {
    /// Puts the CA's certificate and its key together; the caller has checked that they belong
    /// together.
    pub(crate) fn new(
        pem: &str,
        certificate: Certificate,
        key: SigningKey,
    ) -> Result<Self, rcgen::Error> {
        let issuer = Issuer::from_ca_cert_pem(pem, key_pair(&key)?)?;
        Ok(Self {
            certificate,
            issuer,
            key,
        })
    }

    pub(crate) fn key(&self) -> &SigningKey {
        &self.key
    }

    /// Makes the certificate of a master, with `hosts`, or of an agent, with none. It never
    /// outlives the CA.
    pub(crate) fn issue(
        &self,
        identity: &Identity,
        hosts: &[Host],
        key: &SigningKey,
        serial: [u8; 16],
        now: Timestamp,
    ) -> Result<Made, rcgen::Error> {
        let fleet = &identity.fleet;
        let (name, usage) = match &identity.role {
            Role::Master => (
                format!("clamcast {fleet} master"),
                ExtendedKeyUsagePurpose::ServerAuth,
            ),
            Role::Agent { name, .. } => (
                format!("clamcast {fleet} agent {name}"),
                ExtendedKeyUsagePurpose::ClientAuth,
            ),
        };
        let mut params = params(&name, serial);
        let (not_before, not_after) = validity(now, LEAF_DAYS);
        params.not_before = SystemTime::from(not_before).into();
        params.not_after = SystemTime::from(not_after.min(self.certificate.not_after)).into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        for uri in identity.uris() {
            params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        }
        for host in hosts {
            params.subject_alt_names.push(match host {
                Host::Name(name) => SanType::DnsName(name.as_str().try_into()?),
                Host::Address(address) => SanType::IpAddress(*address),
            });
        }
        made(&params.signed_by(&key_pair(key)?, &self.issuer)?)
    }
}

/// The facts of a certificate in PEM; `None` if it is not one.
pub(crate) fn read(pem: &str) -> Option<Certificate> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    Certificate::from_der(&der).ok()
}

/// Longest common name (ub-common-name of RFC 5280). It is for people; software goes by the URIs,
/// which hold the whole name.
const COMMON_NAME_CHARS_MAX: usize = 64;

fn params(name: &str, serial: [u8; 16]) -> CertificateParams {
    let mut subject = DistinguishedName::new();
    let name: String = name.chars().take(COMMON_NAME_CHARS_MAX).collect();
    subject.push(DnType::CommonName, name);
    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

fn validity(now: Timestamp, days: i64) -> (Timestamp, Timestamp) {
    let before = now.saturating_sub(SignedDuration::from_hours(BACKDATED_HOURS));
    let after = now.saturating_add(SignedDuration::from_hours(24 * days));
    let never = "only calendar units can fail";
    (before.expect(never), after.expect(never))
}

fn key_pair(key: &SigningKey) -> Result<KeyPair, rcgen::Error> {
    KeyPair::from_pem(&key::to_pem(key))
}

fn made(certificate: &rcgen::Certificate) -> Result<Made, rcgen::Error> {
    let facts = Certificate::from_der(certificate.der())
        .map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
    Ok(Made {
        pem: certificate.pem(),
        certificate: facts,
    })
}
