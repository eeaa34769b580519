//! Who this host is: its certificate, and the keys that it believes.

use std::fs;
use std::sync::Arc;

use clamcast_proto::FleetName;
use jiff::{SignedDuration, Timestamp};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::Finding;
use crate::chain;
use crate::config::Config;
use crate::endpoint::{Credentials, CredentialsError};
use crate::run::CERTIFICATE_ENDS_SOON;
use crate::trust;

/// Checks key set and certificate. The credentials, if they can be used, are for the probe.
pub(super) fn look(config: &Config, now: Timestamp) -> (Vec<Finding>, Option<Credentials>) {
    let keys = match trust::look(&config.state, &config.keys) {
        Ok(keys) => keys,
        Err(error) => {
            let advice = "put manifest.pub of this host's bundle there (`clamcast-certs agent`)";
            let why = "the fleet's name is not known without the key set";
            return (
                vec![
                    Finding::bad("keys", chain(&error), advice),
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
    let credentials = Credentials::load(&config.tls, &keys.fleet, now);
    let signed = signed_by_ca(config);
    findings.push(judge(&credentials, signed, now, &keys.fleet));
    (findings, credentials.ok())
}

/// Whether the certificate comes from the CA in the same bundle, as the master will check it.
fn signed_by_ca(config: &Config) -> Result<(), String> {
    let pem = |path| fs::read(path).map_err(|error| error.to_string());
    let ca = CertificateDer::from_pem_slice(&pem(&config.tls.ca)?).map_err(|e| e.to_string())?;
    let cert = pem(&config.tls.cert)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&cert).flatten().collect();
    let (leaf, between) = chain.split_first().ok_or("it has no certificate in it")?;
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(|error| error.to_string())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let verifier = verifier.build().map_err(|error| error.to_string())?;
    match verifier.verify_client_cert(leaf, between, UnixTime::now()) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

fn judge(
    credentials: &Result<Credentials, CredentialsError>,
    signed: Result<(), String>,
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
        Err(error) => return Finding::bad(check, chain(error), renew("NAME")),
    };
    let (agent, ends) = (&credentials.agent, credentials.certificate.not_after);
    if let Err(error) = signed {
        let found = format!("{agent}'s certificate is not from the ca in agent.toml: {error}");
        return Finding::bad(check, found, "take ca, cert and key from one bundle");
    }
    let left = ends.duration_since(now);
    let days = left.as_hours() / 24;
    let found = format!("{agent} of fleet {fleet}, valid until {ends} ({days} days)");
    if left < CERTIFICATE_ENDS_SOON {
        return Finding::note(check, found, renew(agent.as_str()));
    }
    if credentials.certificate.not_before.duration_since(now) > SignedDuration::ZERO {
        return Finding::bad(check, found, "set this host's clock");
    }
    Finding::good(check, found)
}
