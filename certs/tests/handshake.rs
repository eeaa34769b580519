//! A master and an agent with issued certificates shake hands over TLS 1.3, as they will over QUIC,
//! and nobody else does.

use std::path::Path;
use std::sync::Arc;

use clamcast_certs::{Host, init, issue_agent, issue_master};
use jiff::{SignedDuration, Timestamp};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A fleet with master `localhost` and agent `web1`, issued `age` ago.
fn fleet(age: SignedDuration) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let now = Timestamp::now() - age;
    let host: Host = "localhost".parse().unwrap();
    init(dir.path(), &"bank".parse().unwrap(), false, now).unwrap();
    issue_master(dir.path(), &[host], false, now).unwrap();
    issue_agent(dir.path(), &"web1".parse().unwrap(), &[], false, now).unwrap();
    dir
}

fn roots(dir: &Path) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(dir.join("ca.pem")).unwrap())
        .unwrap();
    Arc::new(roots)
}

fn pair(dir: &Path) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    (
        vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()],
        PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap(),
    )
}

fn server(ca: &Path, bundle: &Path) -> ServerConnection {
    let provider = Arc::new(default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(ca), Arc::clone(&provider)).build();
    let (chain, key) = pair(bundle);
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    ServerConnection::new(Arc::new(config)).unwrap()
}

fn client(ca: &Path, bundle: &Path) -> ClientConnection {
    let (chain, key) = pair(bundle);
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots(ca))
        .with_client_auth_cert(chain, key)
        .unwrap();
    ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap()
}

/// Carries bytes to and fro until both are done, or one has had enough.
fn shake(mut client: ClientConnection, mut server: ServerConnection) -> Result<(), String> {
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        let judged = server.process_new_packets();
        judged.map_err(|error| format!("master: {error}"))?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        let judged = client.process_new_packets();
        judged.map_err(|error| format!("agent: {error}"))?;
    }
    Ok(())
}

fn refused(result: Result<(), String>, who_and_why: &[&str]) {
    let error = result.unwrap_err();
    for part in who_and_why {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn master_and_agent_of_one_fleet_trust_each_other() {
    let dir = fleet(SignedDuration::ZERO);
    let (ca, master, agent) = (
        dir.path(),
        dir.path().join("master"),
        dir.path().join("agents/web1"),
    );
    shake(client(ca, &agent), server(ca, &master)).unwrap();
}

#[test]
fn a_certificate_of_another_ca_is_refused_by_both() {
    let [ours, other] = [fleet(SignedDuration::ZERO), fleet(SignedDuration::ZERO)];
    let (ours, other) = (ours.path(), other.path());
    let (master, agent) = (ours.join("master"), ours.join("agents/web1"));
    let stranger = client(ours, &other.join("agents/web1"));
    refused(
        shake(stranger, server(ours, &master)),
        &["master", "invalid peer certificate"],
    );
    let impostor = server(ours, &other.join("master"));
    refused(
        shake(client(ours, &agent), impostor),
        &["agent", "invalid peer certificate"],
    );
}

#[test]
fn an_agent_cannot_pass_for_the_master_nor_the_master_for_an_agent() {
    let dir = fleet(SignedDuration::ZERO);
    let (ca, master, agent) = (
        dir.path(),
        dir.path().join("master"),
        dir.path().join("agents/web1"),
    );
    refused(shake(client(ca, &agent), server(ca, &agent)), &["agent"]);
    refused(shake(client(ca, &master), server(ca, &master)), &["master"]);
}

#[test]
fn a_certificate_that_ran_out_is_refused() {
    let dir = fleet(SignedDuration::from_hours(24 * 366));
    let (ca, master, agent) = (
        dir.path(),
        dir.path().join("master"),
        dir.path().join("agents/web1"),
    );
    refused(
        shake(client(ca, &agent), server(ca, &master)),
        &["agent", "expired"],
    );
}
