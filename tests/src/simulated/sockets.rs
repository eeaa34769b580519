//! What a peer of the master needs to connect: a certificate of the fleet, and a socket.

use std::fs;
use std::sync::Arc;
use std::time::SystemTime;

use clamcast_agent::config::Tls;
use clamcast_agent::link::endpoint::Credentials;
use clamcast_proto::FleetName;
use clamcast_proto::identity::{Identity, Role};
use jiff::SignedDuration;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::{Endpoint, EndpointConfig, TokioRuntime};
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ED25519, SanType,
};

use super::now;
use crate::lab::{Fleet, Scratch};

/// The certificates' time, which the agent must not take for almost over.
const BACKDATED: SignedDuration = SignedDuration::from_hours(1);
const LASTS: SignedDuration = SignedDuration::from_hours(365 * 24);

/// Agents that share a socket. The master sees as many addresses as if they stood behind routers
/// that translate addresses; one each would only cost this process an endpoint of several megabytes
/// each.
const AGENTS_PER_SOCKET: usize = 64;

/// The receive buffer of a socket in bytes: for each of its agents what a socket of its own has by
/// default in hundredths, since they hardly ever receive at the same time. The kernel caps it at
/// net.core.rmem_max.
const RECEIVE_BUFFER: usize = 4 << 20;

/// UDP sockets on loopback that peers share.
#[derive(Debug)]
pub struct Sockets(Vec<Endpoint>);

impl Sockets {
    /// As many as so many agents need. Call it on the runtime that is to drive them.
    pub fn for_agents(count: usize) -> Self {
        let count = count.div_ceil(AGENTS_PER_SOCKET).max(1);
        Self((0..count).map(|_| bind()).collect())
    }

    /// The socket of the agent with this number.
    pub fn of(&self, number: usize) -> Endpoint {
        self.0[number % self.0.len()].clone()
    }
}

fn bind() -> Endpoint {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("loopback has a free port");
    setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER).expect("the kernel caps it");
    let config = EndpointConfig::default();
    let endpoint = Endpoint::new(config, None, socket, Arc::new(TokioRuntime));
    endpoint.expect("a bound socket makes an endpoint")
}

/// New certificates for the agents `names`, as their hosts load them. They are made as
/// `clamcast-certs agent` makes them, but without its record, which costs a disk's patience for
/// thousands.
pub fn credentials(fleet: &Fleet, names: &[String]) -> Vec<Arc<Credentials>> {
    let fleet_name: FleetName = "bank".parse().expect("the laboratory's fleet");
    let read = |name| fs::read_to_string(fleet.pki().join(name)).expect("the fleet has a PKI");
    let (ca, ca_key) = (read("ca.pem"), read("ca.key"));
    let ca_key = KeyPair::from_pem(&ca_key).expect("it is a key");
    let issuer = Issuer::from_ca_cert_pem(&ca, ca_key).expect("it is a certificate");
    let scratch = Scratch::new();
    let file = |name: &str, text: &str| {
        let path = scratch.join(name);
        fs::write(&path, text).expect("a scratch file can be written");
        path
    };
    let mut tls = Tls {
        ca: file("ca.pem", &ca),
        cert: scratch.join("cert.pem"),
        key: scratch.join("key.pem"),
    };
    let mut each = |name: &String| {
        let name = name.parse().expect("a name of an agent");
        let groups = Vec::new();
        let identity = Identity {
            fleet: fleet_name.clone(),
            role: Role::Agent { name, groups },
        };
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("there is randomness");
        let certificate = certificate(&identity).signed_by(&key, &issuer);
        tls.cert = file("cert.pem", &certificate.expect("the CA can sign").pem());
        tls.key = file("key.pem", &key.serialize_pem());
        Arc::new(Credentials::load(&tls, &fleet_name, now()).expect("it was just issued"))
    };
    names.iter().map(&mut each).collect()
}

fn certificate(identity: &Identity) -> CertificateParams {
    let mut params = CertificateParams::default();
    let uris = identity.uris().into_iter();
    let uris = uris.map(|uri| SanType::URI(uri.try_into().expect("names are ASCII")));
    params.subject_alt_names = uris.collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = SystemTime::from(now() - BACKDATED).into();
    params.not_after = SystemTime::from(now() + LASTS).into();
    params
}
