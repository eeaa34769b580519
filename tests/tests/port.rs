//! The master's port, from one configuration to the next.

use std::net::UdpSocket;
use std::time::Duration;

use clamcast_agent::link::endpoint::Credentials;
use clamcast_master::link::endpoint;
use clamcast_tests::lab::Fleet;
use jiff::Timestamp;
use quinn::VarInt;

/// The first datagram of an agent that never answers.
async fn first_words(credentials: &Credentials) -> Vec<u8> {
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap();
    nobody
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let client = clamcast_agent::link::endpoint::bind().unwrap();
    let config = credentials.client_config(Duration::from_secs(20));
    let address = nobody.local_addr().unwrap();
    let _connecting = client
        .connect_with(config, address, clamcast_agent::link::endpoint::SERVER_NAME)
        .unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut datagram = vec![0; 2000];
        let length = nobody.recv(&mut datagram).unwrap();
        datagram.truncate(length);
        datagram
    });
    reading.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_is_free_at_once_although_a_connection_drains() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let master = fleet.master(&mirror);
    let agent = fleet.agent("web1");
    let config = clamcast_master::config::Config::load(master.config()).unwrap();
    let state = fleet.join("quic");
    std::fs::create_dir_all(&state).unwrap();
    let name = &config.fleet;
    let credentials = clamcast_agent::config::Config::load(agent.config())
        .unwrap()
        .tls;
    let credentials = Credentials::load(&credentials, name, Timestamp::now()).unwrap();
    let open = |address| {
        let (server, _) = endpoint::server_config(&config.tls, name).unwrap();
        endpoint::bind(address, server, &state)
    };
    let first = open("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = first.local_addr().unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger
        .send_to(&first_words(&credentials).await, address)
        .unwrap();
    let incoming = first.accept().await.unwrap();
    let _connecting = incoming.accept().unwrap();
    first.close(VarInt::from_u32(0), b"a reload");
    assert!(open(address).is_err(), "its connection drains");

    endpoint::free_port(&first).unwrap();
    let second = loop {
        match open(address) {
            Ok(second) => break second,
            Err(error) => assert_ne!(first.open_connections(), 0, "drained before: {error}"),
        }
        tokio::task::yield_now().await;
    };
    drop(second);
}
