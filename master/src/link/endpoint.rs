//! The master's QUIC endpoint: TLS 1.3 with the fleet's own CA on both sides, and the socket.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use clamcast_daemon::credential::{self, Secret};
use clamcast_daemon::durable;
use clamcast_daemon::input::{self, InputError};
use clamcast_proto::identity::{Certificate, CertificateError, Identity, Role};
use clamcast_proto::{FleetName, wire};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, ServerConfig, TransportConfig,
    VarInt,
};
use quinn_proto::InvalidCid;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::{FILE_BYTES_MAX, Tls};

/// The UDP receive buffer asked for, in bytes. When a whole fleet reconnects, it is this buffer
/// that overflows, not the CPU: an Initial occupies 2.3 KiB of it, and nobody drains the socket
/// while a handshake's keys are computed.
const RECEIVE_BUFFER: usize = 32 << 20;

/// With this many bytes 2,000 agents that reconnect at once lose nothing.
const RECEIVE_BUFFER_ENOUGH: usize = 4 << 20;

/// Handshakes that wait for their turn, at most; more are dropped and tried again by their agents.
const INCOMING_MAX: usize = 4096;

/// Bytes of early packets that are kept for waiting handshakes.
const INCOMING_BUFFER: u64 = 32 << 20;

/// Bytes in flight to one agent: bounds what a silent agent can make the master hold.
const SEND_WINDOW: u64 = 2 << 20;

/// Bytes that an agent may send ahead: a frame of [`wire::FRAME_BYTES_MAX`] still flows through.
const STREAM_RECEIVE_WINDOW: u32 = 64 << 10;

/// The same, over all streams of a connection.
const RECEIVE_WINDOW: u32 = 128 << 10;

/// The endpoint could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// A certificate or key file cannot be read.
    #[error(transparent)]
    Read(#[from] InputError),
    /// There is something else in it.
    #[error("{key}: {path} is not {expected} in PEM; {origin}")]
    Pem {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// Where such a file comes from.
        origin: &'static str,
        /// Why.
        source: pem::Error,
    },
    /// A certificate is not one of ours.
    #[error("{key}: {path} is not a certificate that this master can use; {origin}")]
    Certificate {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Where such a file comes from.
        origin: &'static str,
        /// Why.
        source: CertificateError,
    },
    /// The certificate is somebody else's.
    #[error(
        "tls.cert: {path} is not the certificate of the master of fleet `{fleet}`; {CERT_ORIGIN}"
    )]
    NotTheMaster {
        /// The file.
        path: PathBuf,
        /// The configured fleet.
        fleet: FleetName,
    },
    /// The certificate is another CA's.
    #[error(
        "tls.cert: {cert} was not signed by the CA in {ca} (tls.ca), so no agent would believe it; \
         take both from one directory of `clamcast-certs`"
    )]
    OtherCa {
        /// The certificate file.
        cert: PathBuf,
        /// The CA's.
        ca: PathBuf,
    },
    /// Certificate and key are not a pair.
    #[error("tls.key: {key} is not the key of {cert} (tls.cert); take both from one directory")]
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
    /// The persistent QUIC keys.
    #[error("cannot keep the QUIC keys in {path}")]
    Keys {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket.
    #[error("listen.quic: cannot listen on UDP {address}{}", bind_hint(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// What to do about an address that cannot be listened on.
fn bind_hint(error: &io::Error) -> &'static str {
    let is = |kind| error.kind() == kind;
    if is(io::ErrorKind::AddrInUse) {
        "; another program has the port: stop it, or choose another"
    } else if is(io::ErrorKind::AddrNotAvailable) {
        "; no interface of this host has the address: choose one that `ip address` shows"
    } else if is(io::ErrorKind::PermissionDenied) {
        "; ports below 1024 are root's: choose another"
    } else {
        ""
    }
}

const CA_ORIGIN: &str = "copy ca.pem from the directory of `clamcast-certs init --dir DIR`";
const CERT_ORIGIN: &str =
    "`clamcast-certs master --dir DIR --host NAME` makes it, as DIR/master/cert.pem";
const KEY_ORIGIN: &str =
    "`clamcast-certs master --dir DIR --host NAME` makes it, as DIR/master/key.pem";

/// Reads the CA certificate, which must be one of ours.
pub fn load_ca(path: &Path) -> Result<(CertificateDer<'static>, Certificate), EndpointError> {
    let (mut chain, facts) = load_chain("tls.ca", path, CA_ORIGIN)?;
    Ok((chain.swap_remove(0), facts))
}

/// Reads certificates, and what the first of them says; there is one at least.
fn load_chain(
    key: &'static str,
    path: &Path,
    origin: &'static str,
) -> Result<(Vec<CertificateDer<'static>>, Certificate), EndpointError> {
    let pem = input::read(key, path, FILE_BYTES_MAX, origin)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let first =
        chain.and_then(
            |chain| match chain.first().map(|first| Certificate::from_der(first)) {
                Some(facts) => Ok((chain, facts)),
                None => Err(pem::Error::NoItemsFound),
            },
        );
    let (chain, facts) = first.map_err(|source| EndpointError::Pem {
        key,
        path: path.to_owned(),
        expected: "a certificate",
        origin,
        source,
    })?;
    let facts = facts.map_err(|source| EndpointError::Certificate {
        key,
        path: path.to_owned(),
        origin,
        source,
    })?;
    Ok((chain, facts))
}

/// TLS for the master: its own certificate, and agents' certificates under the fleet's CA.
///
/// Returns the master's own certificate too, for its dates. No session tickets: on resumption a
/// certificate would not be looked at again, and so a revoked or expired one would live on.
pub fn server_config(
    tls: &Tls,
    fleet: &FleetName,
) -> Result<(ServerConfig, Certificate), EndpointError> {
    let (ca, _) = load_ca(&tls.ca)?;
    let (chain, own) = load_chain("tls.cert", &tls.cert, CERT_ORIGIN)?;
    let Secret { bytes, origin } =
        credential::read("tls.key", &tls.key, FILE_BYTES_MAX, KEY_ORIGIN)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|source| EndpointError::Pem {
        key: "tls.key",
        path: origin.clone(),
        expected: "a private key",
        origin: KEY_ORIGIN,
        source,
    })?;

    let expected = Identity {
        fleet: fleet.clone(),
        role: Role::Master,
    };
    if own.identity.as_ref() != Some(&expected) {
        let (path, fleet) = (tls.cert.clone(), fleet.clone());
        return Err(EndpointError::NotTheMaster { path, fleet });
    }

    let unusable = |source| {
        let (cert, key) = (tls.cert.clone(), origin.clone());
        if matches!(source, rustls::Error::InconsistentKeys(_)) {
            return EndpointError::OtherKey { cert, key };
        }
        EndpointError::Tls { cert, key, source }
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(unusable)?;
    check_signer(&chain, &own, &roots, &provider).map_err(|error| {
        let (cert, ca) = (tls.cert.clone(), tls.ca.clone());
        if matches!(error, rustls::Error::InvalidCertificate(_)) {
            return EndpointError::OtherCa { cert, ca };
        }
        unusable(error)
    })?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
        .build()
        .map_err(|error| unusable(rustls::Error::General(error.to_string())))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| {
            builder
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain, key)
        })
        .map_err(unusable)?;
    config.alpn_protocols = vec![wire::ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    let quic = QuicServerConfig::try_from(config)
        .map_err(|error| unusable(rustls::Error::General(error.to_string())))?;

    let mut server = ServerConfig::with_crypto(Arc::new(quic));
    server.transport_config(Arc::new(transport()));
    server.max_incoming(INCOMING_MAX);
    server.incoming_buffer_size_total(INCOMING_BUFFER);
    Ok((server, own))
}

/// Checks that the CA signed the master's certificate, as every agent does. Its dates are not
/// looked at here: a master whose certificate has run out still answers its operators.
fn check_signer(
    chain: &[CertificateDer<'_>],
    own: &Certificate,
    roots: &RootCertStore,
    provider: &CryptoProvider,
) -> Result<(), rustls::Error> {
    let (first, intermediates) = chain.split_first().expect("one at least was read");
    let begin = u64::try_from(own.not_before.as_second()).unwrap_or_default();
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(first)?,
        roots,
        intermediates,
        UnixTime::since_unix_epoch(Duration::from_secs(begin)),
        provider.signature_verification_algorithms.all,
    )
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle = Duration::from_secs(wire::IDLE_TIMEOUT_SECS);
    let idle = idle.try_into().expect("a minute fits");
    // Agents open no streams: the control stream and all bulk streams are the master's.
    transport
        .max_idle_timeout(Some(idle))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(STREAM_RECEIVE_WINDOW.into())
        .receive_window(RECEIVE_WINDOW.into())
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None);
    transport
}

/// Opens the socket and the endpoint. `state` keeps the two keys without which agents would
/// notice a restarted master only after the idle timeout.
pub fn bind(
    address: SocketAddr,
    server: ServerConfig,
    state: &Path,
) -> Result<Endpoint, EndpointError> {
    let keys = QuicKeys::load(&state.join("quic.key"))?;
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &keys.reset)));
    config.cid_generator(move || Box::new(ConnectionIds::from_key(keys.connection_ids)));
    // A restarted master tells a whole fleet as fast as it asks: with any interval only one of a
    // batch of packets is answered, and an agent whose answer is left out asks again after seconds.
    // Only a packet with a connection id that we made is answered, and by a shorter one.
    config.min_reset_interval(Duration::ZERO);
    let failed = |source| EndpointError::Bind { address, source };
    let socket = match socket(address) {
        Err(error) if let Some(fallback) = without_ipv6(address, &error) => {
            tracing::warn!(%address, %fallback, "this kernel has no IPv6, listening on IPv4 alone");
            self::socket(fallback).map_err(failed)?
        }
        socket => socket.map_err(failed)?,
    };
    Endpoint::new(config, Some(server), socket, Arc::new(quinn::TokioRuntime)).map_err(failed)
}

/// Where every address is listened on if the kernel has no IPv6, which `error` says.
fn without_ipv6(address: SocketAddr, error: &io::Error) -> Option<SocketAddr> {
    let is_every = address.is_ipv6() && address.ip().is_unspecified();
    let errors = [nix::libc::EAFNOSUPPORT, nix::libc::EADDRNOTAVAIL];
    let has_no_ipv6 = error.raw_os_error().is_some_and(|it| errors.contains(&it));
    (is_every && has_no_ipv6).then(|| SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
}

/// Frees the port of an endpoint that was closed, whose connections may drain for three probe
/// timeouts of their own (RFC 9000 section 10.2): minutes where an agent's host was suspended. The
/// next endpoint must not wait for that. What the old one still has to say is said to nobody.
pub fn free_port(endpoint: &Endpoint) -> io::Result<()> {
    let nowhere = match endpoint.local_addr()? {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
    };
    // Twice: after a change of sockets the one before goes on being read.
    endpoint.rebind(UdpSocket::bind(nowhere)?)?;
    endpoint.rebind(UdpSocket::bind(nowhere)?)
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let (socket, _) = sized_socket(Domain::for_address(address))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?; // `[::]` means every address, IPv4 too
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// A UDP socket with the largest receive buffer to be had, and how many bytes that is.
fn sized_socket(domain: Domain) -> io::Result<(Socket, usize)> {
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    // Forcing needs CAP_NET_ADMIN; without it the kernel caps the size at net.core.rmem_max.
    let forced = nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::RcvBufForce,
        &RECEIVE_BUFFER,
    );
    if forced.is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    let bytes = socket.recv_buffer_size()? / 2; // the kernel reports twice what it was asked for
    Ok((socket, bytes))
}

/// What is to be doubted about the receive buffer that this process gets, with the next step.
pub fn receive_buffer_doubt() -> Option<String> {
    // Without a socket there is an error, told elsewhere.
    let (_, bytes) = sized_socket(Domain::IPV4).ok()?;
    small_receive_buffer(bytes)
}

fn small_receive_buffer(bytes: usize) -> Option<String> {
    (bytes < RECEIVE_BUFFER_ENOUGH).then(|| {
        format!(
            "the kernel allows a UDP receive buffer of {} KiB (net.core.rmem_max): agents that \
             reconnect by the hundred at once lose packets and are back seconds later; put \
             `net.core.rmem_max = {RECEIVE_BUFFER_ENOUGH}` into /etc/sysctl.d/clamcast.conf and run \
             `sysctl --system`, then restart the master",
            bytes >> 10
        )
    })
}

/// Names connections, so that a master that has forgotten all of them still knows its own names: only
/// who uses one is told that its connection is gone. A name is random, then a keyed hash of that.
///
/// quinn's own generator has 24 random bits. Of 2,000 agents that lost their master one would find
/// that its name is somebody else's by now; who has it would drop what it cannot decrypt, and the
/// agent would wait for its idle timeout.
struct ConnectionIds(hmac::Key);

/// Bytes of a connection id, of at most 20 (RFC 9000 section 17.2), that are random, and of the hash.
const ID_RANDOM_BYTES: usize = 8;
const ID_HASH_BYTES: usize = 8;

impl ConnectionIds {
    fn from_key(key: u64) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, &key.to_be_bytes()))
    }

    fn hash(&self, random: &[u8]) -> [u8; ID_HASH_BYTES] {
        let hash = hmac::sign(&self.0, random);
        *hash.as_ref().first_chunk().expect("it is longer")
    }
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let random: [u8; ID_RANDOM_BYTES] = rand::random();
        ConnectionId::new(&[random, self.hash(&random)].concat())
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        let (random, hash) = id.split_at_checked(ID_RANDOM_BYTES).ok_or(InvalidCid)?;
        (self.hash(random) == *hash).then_some(()).ok_or(InvalidCid)
    }

    fn cid_len(&self) -> usize {
        ID_RANDOM_BYTES + ID_HASH_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None // a host's address says more than the id of its connection
    }
}

/// Kept in the state directory, 0600.
struct QuicKeys {
    /// Signs stateless resets, so that agents believe them after a restart.
    reset: [u8; 64],
    /// Makes connection ids that a restarted master recognises as its own.
    connection_ids: u64,
}

impl QuicKeys {
    fn load(path: &Path) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Keys {
            path: path.to_owned(),
            source,
        };
        let bytes: [u8; 72] = match input::whole(path, FILE_BYTES_MAX).map(|bytes| bytes.try_into())
        {
            Ok(Ok(bytes)) => bytes,
            // A damaged file costs one slow reconnect, so it is made again like a missing one.
            Ok(Err(_)) => Self::create(path).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::create(path).map_err(failed)?
            }
            Err(error) => return Err(failed(error)),
        };
        let (reset, connection_ids) = bytes.split_at(64);
        Ok(Self {
            reset: reset.try_into().expect("split at 64"),
            connection_ids: u64::from_be_bytes(connection_ids.try_into().expect("the other 8")),
        })
    }

    fn create(path: &Path) -> io::Result<[u8; 72]> {
        let mut bytes = [0; 72];
        rand::fill(&mut bytes[..]);
        durable::write(path, &bytes, 0o600)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_master_knows_its_connection_ids_and_gives_none_of_them_again() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..2 {
            let mut ids = ConnectionIds::from_key(7);
            for _ in 0..50_000 {
                let id = ids.generate_cid();
                assert!(ids.validate(&id).is_ok());
                assert!(ConnectionIds::from_key(8).validate(&id).is_err());
                assert!(ids.validate(&ConnectionId::new(&id[1..])).is_err());
                assert!(seen.insert(id), "{id} twice");
            }
        }
        assert!(
            ConnectionIds::from_key(7)
                .validate(&ConnectionId::new(&[]))
                .is_err()
        );
    }

    #[test]
    fn a_kernel_without_ipv6_is_listened_on_with_ipv4() {
        let every: SocketAddr = "[::]:7310".parse().unwrap();
        let error = |code| io::Error::from_raw_os_error(code);
        let no_ipv6 = error(nix::libc::EAFNOSUPPORT);
        let fallback = without_ipv6(every, &no_ipv6);
        assert_eq!(fallback, Some("0.0.0.0:7310".parse().unwrap()));
        assert_eq!(without_ipv6(every, &error(nix::libc::EADDRINUSE)), None);
        assert_eq!(without_ipv6("[::1]:7310".parse().unwrap(), &no_ipv6), None);
        assert_eq!(without_ipv6("0.0.0.0:1".parse().unwrap(), &no_ipv6), None);
    }

    #[test]
    fn the_receive_buffer_is_as_large_as_the_kernel_allows() {
        let largest = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap();
        let largest: usize = largest.trim().parse().unwrap();
        let (_, bytes) = sized_socket(Domain::IPV4).unwrap();
        assert!(bytes >= largest.min(RECEIVE_BUFFER), "{bytes} of {largest}");
    }

    #[test]
    fn a_receive_buffer_that_the_kernel_caps_is_told_of_with_the_setting_to_change() {
        let doubt = small_receive_buffer(212_992).unwrap();
        assert!(doubt.contains("208 KiB"), "{doubt}");
        assert!(doubt.contains("net.core.rmem_max = 4194304"), "{doubt}");
        assert_eq!(small_receive_buffer(4_194_304), None);
    }
}
