//! The agent's QUIC endpoint: who the host is, and whom it takes for its master.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clamcast_daemon::credential::{self, Secret};
use clamcast_daemon::input::{self, InputError};
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::identity::{Certificate, CertificateError, Identity, Role};
use clamcast_proto::{AgentName, FleetName, wire};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::{self, DecodePrivateKey as _};
use jiff::{SignedDuration, Timestamp};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::time::timeout;

use crate::config::Tls;

/// Files that the master may send at the same time.
const PARTS_AT_ONCE: u32 = 8;

/// Bytes that the master may send ahead on one stream: over a path of 200 ms it keeps 20 MB/s
/// flowing.
const STREAM_RECEIVE_WINDOW: u32 = 4 << 20;

/// The same, over all streams.
const RECEIVE_WINDOW: u32 = 8 << 20;

/// Who has not shown a certificate by then does not answer: five retransmissions on a slow path.
const KNOCK_TIME: Duration = Duration::from_secs(10);

/// A certificate that ends sooner than this is worth a warning at every start.
pub const CERTIFICATE_ENDS_SOON: SignedDuration = SignedDuration::from_hours(30 * 24);

/// The name in the TLS greeting. The master has one certificate for every name, and the verifier
/// looks at who the certificate speaks for.
pub const SERVER_NAME: &str = "master";

/// Who this host is: its certificate with the key, and the CA that vouches for its master.
#[derive(Debug)]
pub struct Credentials {
    /// The fleet.
    pub fleet: FleetName,
    /// The host's name in it.
    pub agent: AgentName,
    /// The certificate.
    pub certificate: Certificate,
    /// Its file.
    path: PathBuf,
    /// Signs receipts, and nothing that leaves this process unsigned.
    pub key: Key,
    /// Why no master would believe the certificate. It is the master's to refuse it: a host whose
    /// files do not fit together still ends its install and answers its operators.
    pub doubt: Option<CredentialsError>,
    tls: rustls::ClientConfig,
    verifier: MasterVerifier,
}

/// A private key. It has no `Debug` of its own, so that it cannot get into a log.
#[derive(Clone)]
pub struct Key(pub SigningKey);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

/// The host's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] InputError),
    /// A file has no certificate or key in it.
    #[error("{key}: {path} is not {expected} in PEM; {ORIGIN}")]
    Pem {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// Why.
        source: pem::Error,
    },
    /// A certificate is not one of ours.
    #[error("tls.cert: {path} is not a certificate that an agent can use; {ORIGIN}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CertificateError,
    },
    /// The certificate is the master's, a CA's or somebody else's.
    #[error("tls.cert: {path} is not the certificate of an agent; {ORIGIN}")]
    NotAnAgent {
        /// The file.
        path: PathBuf,
    },
    /// The certificate is another CA's.
    #[error(
        "tls.cert: {cert} was not signed by the CA in {ca} (tls.ca), so no master would believe it; \
         take both from one bundle of `clamcast-certs agent`"
    )]
    OtherCa {
        /// The certificate file.
        cert: PathBuf,
        /// The CA's.
        ca: PathBuf,
        /// What the master would say.
        source: rustls::Error,
    },
    /// The CA signed it, and no master would believe it nonetheless.
    #[error(
        "tls.cert: a master would refuse {path}; make a new one with `clamcast-certs agent --force`"
    )]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What the master would say.
        source: rustls::Error,
    },
    /// It belongs to another fleet than the pinned keys.
    #[error(
        "tls.cert: {path} is for fleet `{found}`, the pinned key set is for fleet `{expected}`; take \
         both from one bundle of `clamcast-certs agent`"
    )]
    Fleet {
        /// The file.
        path: PathBuf,
        /// The certificate's fleet.
        found: FleetName,
        /// The key set's.
        expected: FleetName,
    },
    /// Its time is over.
    #[error(
        "tls.cert: {path} expired at {not_after}; make a new one with `clamcast-certs agent \
         --force`, or set this host's clock"
    )]
    Expired {
        /// The file.
        path: PathBuf,
        /// Last second of its validity.
        not_after: Timestamp,
    },
    /// Its time has not come.
    #[error("tls.cert: {path} counts only from {not_before}; set this host's clock")]
    NotYetValid {
        /// The file.
        path: PathBuf,
        /// First second of its validity.
        not_before: Timestamp,
    },
    /// The key file.
    #[error("tls.key: {path} is not an Ed25519 key in PKCS#8 PEM; {ORIGIN}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: pkcs8::Error,
    },
    /// Certificate and key are not a pair.
    #[error("tls.key: {key} is not the key of {cert} (tls.cert); take both from one bundle")]
    OtherKey {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
    },
    /// TLS refuses what it was given.
    #[error("tls.cert: certificate {cert} and key {key} cannot be used for TLS")]
    Tls {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

impl Credentials {
    /// Reads and checks the files for a host of `fleet` at the time `now`.
    pub fn load(tls: &Tls, fleet: &FleetName, now: Timestamp) -> Result<Self, CredentialsError> {
        let key = || credential::read("tls.key", &tls.key, FILE_BYTES_MAX, ORIGIN);
        Self::load_with(tls, key, fleet, now)
    }

    /// [`Credentials::load`] with this private key.
    pub fn with_key(
        tls: &Tls,
        key: Secret,
        fleet: &FleetName,
        now: Timestamp,
    ) -> Result<Self, CredentialsError> {
        Self::load_with(tls, || Ok(key), fleet, now)
    }

    fn load_with(
        tls: &Tls,
        key: impl FnOnce() -> Result<Secret, InputError>,
        fleet: &FleetName,
        now: Timestamp,
    ) -> Result<Self, CredentialsError> {
        let (_, ca) = load_chain("tls.ca", &tls.ca)?;
        let (chain, own) = load_chain("tls.cert", &tls.cert)?;
        let (certificate, agent) = own_certificate(&tls.cert, &own, fleet)?;

        let Secret {
            bytes: key_pem,
            origin: key_path,
        } = key()?;
        let key =
            SigningKey::from_pkcs8_pem(&String::from_utf8_lossy(&key_pem)).map_err(|source| {
                CredentialsError::Key {
                    path: key_path.clone(),
                    source,
                }
            })?;
        if PublicKey::of(&key) != certificate.key {
            let (cert, key) = (tls.cert.clone(), key_path);
            return Err(CredentialsError::OtherKey { cert, key });
        }

        let unusable = |source| CredentialsError::Tls {
            cert: tls.cert.clone(),
            key: key_path.clone(),
            source,
        };
        let key_der = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|source| {
            let (key, path, expected) = ("tls.key", key_path.clone(), "a private key");
            CredentialsError::Pem {
                key,
                path,
                expected,
                source,
            }
        })?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(unusable)?;
        let doubt = validity(&tls.cert, &certificate, now).or_else(|| {
            let checked = check_signer(&chain, &roots, &provider, now);
            checked.err().map(|error| doubt(tls, error))
        });
        let verifier = MasterVerifier {
            roots,
            master: Identity {
                fleet: fleet.clone(),
                role: Role::Master,
            },
            provider: provider.clone(),
        };
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| {
                builder
                    .dangerous() // rustls's word for a verifier of one's own
                    .with_custom_certificate_verifier(Arc::new(verifier.clone()))
                    .with_client_auth_cert(chain, key_der)
            })
            .map_err(unusable)?;
        config.alpn_protocols = vec![wire::ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            fleet: fleet.clone(),
            agent,
            certificate,
            path: tls.cert.clone(),
            key: Key(key),
            doubt,
            tls: config,
            verifier,
        })
    }

    /// Why no master takes the certificate at the time `now`, if its validity is the reason.
    pub fn invalid(&self, now: Timestamp) -> Option<String> {
        let invalid = validity(&self.path, &self.certificate, now)?;
        Some(invalid.to_string())
    }

    /// How to connect, with a keep-alive every `keep_alive`. The agent sends them, since it notices
    /// a restarted master first.
    pub fn client_config(&self, keep_alive: Duration) -> ClientConfig {
        let quic = QuicClientConfig::try_from(self.tls.clone())
            .expect("TLS 1.3 with the provider's own suites has what QUIC needs");
        let mut config = ClientConfig::new(Arc::new(quic));
        config.transport_config(Arc::new(transport(keep_alive)));
        config
    }

    /// Finds out who is at `address`, and ends the handshake there, before this host's certificate
    /// was sent: the master never knows who knocked, and so keeps the connection that this host
    /// may have.
    pub fn knock(
        &self,
        endpoint: &Endpoint,
        address: SocketAddr,
    ) -> impl Future<Output = Knock> + Send + use<> {
        let seen = Arc::new(OnceLock::new());
        let verifier = OnlyLooks {
            verifier: self.verifier.clone(),
            seen: seen.clone(),
        };
        let mut tls = self.tls.clone();
        tls.dangerous().set_certificate_verifier(Arc::new(verifier));
        let quic = QuicClientConfig::try_from(tls)
            .expect("TLS 1.3 with the provider's own suites has what QUIC needs");
        let mut config = ClientConfig::new(Arc::new(quic));
        config.transport_config(Arc::new(transport(KNOCK_TIME)));
        let connecting = endpoint.connect_with(config, address, SERVER_NAME);
        async move {
            let ended = match connecting {
                Ok(connecting) => timeout(KNOCK_TIME, connecting).await,
                Err(error) => return Knock::Other(error.to_string()),
            };
            match (seen.get(), ended) {
                (Some(Ok(())), _) => Knock::Master,
                (Some(Err(error)), _) => Knock::Other(error.to_string()),
                (None, Err(_) | Ok(Err(ConnectionError::TimedOut))) => Knock::Nobody,
                (None, Ok(Err(error))) => Knock::Other(error.to_string()),
                (None, Ok(Ok(_))) => Knock::Other("it showed no certificate".into()),
            }
        }
    }
}

/// Who was found at an address.
#[derive(Debug)]
pub enum Knock {
    /// A master of this fleet.
    Master,
    /// Nobody, or UDP does not get there and back.
    Nobody,
    /// Somebody else.
    Other(String),
}

/// Judges the master's certificate and that it holds the key, keeps the judgement, and then refuses
/// it nonetheless.
#[derive(Debug)]
struct OnlyLooks {
    verifier: MasterVerifier,
    seen: Arc<OnceLock<Result<(), rustls::Error>>>,
}

impl OnlyLooks {
    fn keep(&self, judged: Result<(), rustls::Error>) -> rustls::Error {
        let _ = self.seen.set(judged); // a handshake comes here once
        rustls::Error::General("that was all".into())
    }
}

impl ServerCertVerifier for OnlyLooks {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| self.keep(Err(error)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let judged = self.verifier.verify_tls13_signature(message, cert, dss);
        Err(self.keep(judged.map(|_| ())))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// Longest certificate or key file in bytes that is read: ours have some hundred.
pub(crate) const FILE_BYTES_MAX: u64 = 64 << 10;

const ORIGIN: &str = "it comes with the bundle of `clamcast-certs agent`";

/// Reads the certificates of a file, and a copy of the first; there is one at least.
fn load_chain(
    key: &'static str,
    path: &Path,
) -> Result<(Vec<CertificateDer<'static>>, CertificateDer<'static>), CredentialsError> {
    let pem = input::read(key, path, FILE_BYTES_MAX, ORIGIN)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.and_then(|chain| match chain.first().cloned() {
        Some(first) => Ok((chain, first)),
        None => Err(pem::Error::NoItemsFound),
    });
    chain.map_err(|source| CredentialsError::Pem {
        key,
        path: path.to_owned(),
        expected: "a certificate",
        source,
    })
}

/// Checks that the CA signed the host's certificate, as the master does.
fn check_signer(
    chain: &[CertificateDer<'static>],
    roots: &RootCertStore,
    provider: &Arc<CryptoProvider>,
    now: Timestamp,
) -> Result<(), rustls::Error> {
    let (first, intermediates) = chain.split_first().expect("one at least was read");
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
    let now = u64::try_from(now.as_second()).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    verifier.verify_client_cert(first, intermediates, now)?;
    Ok(())
}

/// What it means that the master would refuse the certificate.
fn doubt(tls: &Tls, source: rustls::Error) -> CredentialsError {
    let (cert, ca) = (tls.cert.clone(), tls.ca.clone());
    // A CA with the same name and another key leaves a signature that does not fit.
    let other_ca = [
        rustls::CertificateError::UnknownIssuer,
        rustls::CertificateError::BadSignature,
    ];
    match other_ca.map(rustls::Error::from).contains(&source) {
        true => CredentialsError::OtherCa { cert, ca, source },
        false => CredentialsError::Unfit { path: cert, source },
    }
}

/// Why a certificate does not count at the time `now`, if it does not.
fn validity(path: &Path, certificate: &Certificate, now: Timestamp) -> Option<CredentialsError> {
    let (not_before, not_after) = (certificate.not_before, certificate.not_after);
    let path = path.to_owned();
    if not_after < now {
        return Some(CredentialsError::Expired { path, not_after });
    }
    (not_before > now).then_some(CredentialsError::NotYetValid { path, not_before })
}

/// Checks that a certificate is an agent's of this fleet.
fn own_certificate(
    path: &Path,
    der: &CertificateDer<'_>,
    expected: &FleetName,
) -> Result<(Certificate, AgentName), CredentialsError> {
    let path = || path.to_owned();
    let certificate =
        Certificate::from_der(der).map_err(|source| CredentialsError::Certificate {
            path: path(),
            source,
        })?;
    let Some(Identity {
        fleet,
        role: Role::Agent { name, .. },
    }) = certificate.identity.clone()
    else {
        return Err(CredentialsError::NotAnAgent { path: path() });
    };
    if fleet != *expected {
        return Err(CredentialsError::Fleet {
            path: path(),
            found: fleet,
            expected: expected.clone(),
        });
    }
    Ok((certificate, name))
}

fn transport(keep_alive: Duration) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle = Duration::from_secs(wire::IDLE_TIMEOUT_SECS);
    let idle = idle.try_into().expect("a minute fits");
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(keep_alive))
        .max_concurrent_bidi_streams(VarInt::from_u32(1)) // the control stream
        .max_concurrent_uni_streams(VarInt::from_u32(PARTS_AT_ONCE))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .datagram_receive_buffer_size(None);
    transport
}

/// Opens the socket that connections are made from: any port, IPv6 and IPv4 if the host has both.
pub fn bind() -> io::Result<Endpoint> {
    let any = |ip: std::net::IpAddr| Endpoint::client(SocketAddr::new(ip, 0));
    any(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| any(Ipv4Addr::UNSPECIFIED.into()))
}

/// Takes a certificate for the master's by who it speaks for: it must come from the fleet's own CA,
/// be a server's, be valid now, and name `clamcast://FLEET/master`. The host name that was dialled
/// is no part of it. An address is only a route: the master may be reached through a NAT, by an IP
/// address, or under a new name after a move, and whoever can redirect the route still has no such
/// certificate. An agent's certificate does not pass, though the same CA signed it.
#[derive(Clone, Debug)]
struct MasterVerifier {
    roots: RootCertStore,
    master: Identity,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for MasterVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        let identity = Certificate::from_der(end_entity).map(|certificate| certificate.identity);
        match identity {
            Ok(Some(identity)) if identity == self.master => Ok(ServerCertVerified::assertion()),
            Ok(_) | Err(_) => Err(rustls::CertificateError::NotValidForName.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::CertificateError as Certificate;

    #[track_caller]
    fn check(error: Certificate, expected: &str) {
        let tls = Tls {
            ca: "ca.pem".into(),
            cert: "cert.pem".into(),
            key: "key.pem".into(),
        };
        let doubt = doubt(&tls, error.clone().into());
        let said = crate::chain(&doubt);
        assert!(said.contains(expected), "{said}");
        let source = rustls::Error::from(error).to_string();
        assert!(said.ends_with(&source), "{said} lacks {source}");
    }

    #[test]
    fn only_a_signature_that_does_not_fit_is_another_ca() {
        check(
            Certificate::UnknownIssuer,
            "cert.pem was not signed by the CA in ca.pem",
        );
        check(
            Certificate::BadSignature,
            "cert.pem was not signed by the CA in ca.pem",
        );
        check(
            Certificate::InvalidPurpose,
            "a master would refuse cert.pem",
        );
    }
}
