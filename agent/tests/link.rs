//! The agent against a scripted master: real QUIC on loopback, a real directory, no clamd.
//!
//! The master here is not clamcast's; it says what a test wants it to say, so that an agent can be
//! seen with a master that breaks the protocol, cheats or dies. Both real ends meet in the
//! workspace's own tests.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clamcast_agent::config::{Config, DAEMON};
use clamcast_agent::core::FRESH_UNHEARD;
use clamcast_agent::core::status::Status;
use clamcast_agent::operate::admin::Request;
use clamcast_agent::operate::status::Verification;
use clamcast_agent::run::Agent;
use clamcast_daemon::admin;
use clamcast_daemon::service::Occasion;
use clamcast_proto::dsse::{Envelope, PublicKey, Verified, sign};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::identity::{Identity, Role};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Manifest, ManifestFile, Publisher, content_digest};
use clamcast_proto::receipt::{Drift, Found, Outcome, Receipt};
use clamcast_proto::wire::{
    self, Feature, Features, Have, Hello, NeedFile, Offer, OfferId, OtherMaster, Part,
    PartEncoding, PartKind, ToAgent, ToMaster, Welcome, close,
};
use clamcast_proto::{Digest, Epoch, FleetName, Generation, Position};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey as _;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use jiff::{SignedDuration, Timestamp};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream, ServerConfig, VarInt};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Whoever has not done by then what a test waits for is not going to.
const PATIENCE: Duration = Duration::from_secs(30);

const HOUR: SignedDuration = SignedDuration::from_hours(1);

#[tokio::test]
async fn a_master_of_version_0_1_0_gets_the_whole_list_and_a_later_one_what_deviates() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let files: [(&str, &[u8]); 2] = [("a.ndb", b"first"), ("gr\u{f6}\u{df}e b.ndb", b"second")];

    let mut talk = master.greet().await;
    assert!(talk.hello.accepts.has(Feature::WideNames));
    let receipt = talk.install(&lab, 1, &files).await;
    assert_eq!((receipt.content, receipt.files.len()), (None, 2));
    talk.say(&ToAgent::ReceiptAck { seq: 1 }).await;
    talk.answered().await;
    talk.hang_up(close::STOPPING);

    // It does not know what is installed here.
    let mut talk = master.greet_knowing(&[]).await;
    assert!(talk.hello.installed.is_some() && talk.hello.installed_sha256.is_none());
    let receipt = talk.install(&lab, 2, &files).await;
    assert!(receipt.content.is_some() && receipt.files.is_empty() && receipt.missing.is_empty());
    let installed = lab.offer(2, &files).manifest;
    let manifest: Manifest = installed.peek().unwrap();
    assert!(receipt.is_intact(&manifest));
    talk.say(&ToAgent::ReceiptAck { seq: 2 }).await;
    talk.answered().await;
    talk.hang_up(close::STOPPING);

    let talk = master.greet_knowing(&[&installed]).await;
    let hello = &talk.hello;
    assert!(hello.installed.is_none() && hello.files.is_empty());
    assert_eq!(hello.installed_sha256, Some(Digest::of(&installed.payload)));
    assert_eq!(hello.content, Some(manifest.content));
    // What the master accepts is known before it is there again.
    agent.stop(Occasion::Exit).await;
    talk.hang_up(close::STOPPING);
}

#[tokio::test]
async fn more_missing_files_than_one_message_has_room_for_are_asked_for_in_turns() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let names: Vec<_> = (0..1_500).map(|it| format!("{it:0200}.ndb")).collect();
    let files: Vec<(&str, &[u8])> = names
        .iter()
        .map(|name| (name.as_str(), name.as_bytes()))
        .collect();

    let mut talk = master.greet_knowing(&[]).await;
    talk.say(&ToAgent::Offer(lab.offer(1, &files))).await;
    let (mut asked, mut turns) = (0, 0);
    while asked < files.len() {
        let needs = talk.need().await;
        turns += 1;
        for need in &needs {
            talk.push(1, need.name.as_str(), need.name.as_str().as_bytes())
                .await;
        }
        asked += needs.len();
    }
    assert_eq!((asked, turns), (files.len(), 2));
    let receipt = talk.receipt(&lab).await;
    assert_eq!(receipt.outcome, Outcome::Live, "{:?}", receipt.error);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn an_offer_is_fetched_and_installed_and_its_receipt_waits_to_be_acknowledged() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;

    let mut talk = master.greet().await;
    assert!(talk.hello.installed.is_none());
    let offer = lab.offer(1, &[("a.ndb", b"first")]);
    talk.say(&ToAgent::Offer(offer)).await;
    let files = talk.need().await;
    assert_eq!(names(&files), ["a.ndb"]);
    assert_eq!(files[0].have, Have::Nothing);
    talk.push(1, "a.ndb", b"first").await;
    let receipt = talk.receipt(&lab).await;
    assert_eq!((receipt.seq, receipt.outcome), (1, Outcome::Live));
    assert_eq!(fs::read(lab.database().join("a.ndb")).unwrap(), b"first");
    // No acknowledgement: the master dies.
    talk.hang_up(close::STOPPING);

    let mut talk = master.greet().await;
    assert!(talk.hello.installed.is_some());
    assert!(talk.hello.content.is_some() && talk.hello.files.is_empty());
    assert_eq!(talk.receipt(&lab).await, receipt, "the same, again");
    talk.say(&ToAgent::ReceiptAck { seq: 1 }).await;
    lab.until("it is forgotten", |status| status.receipts_pending == 0)
        .await;
    talk.hang_up(close::STOPPING);

    let mut talk = master.greet().await;
    talk.answered().await; // nothing is said but this

    let status: Status = lab.ask(&Request::Status).await.1;
    assert!(status.live && status.master.connected);
    assert_eq!((status.receipts_pending, status.stale), (0, false));
    let (exit, verification): (_, Verification) = lab.ask(&Request::Verify).await;
    assert!(verification.ok && exit == 0);
    fs::write(lab.database().join("a.ndb"), b"drift").unwrap();
    let (exit, verification): (_, Verification) = lab.ask(&Request::Verify).await;
    assert!(!verification.ok && exit == 1);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_database_of_a_kind_that_this_version_does_not_know_is_installed_and_withdrawn() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let files: [(&str, &[u8]); 2] = [("a.ndb", b"one"), ("b.laterclamav", b"two")];
    let receipt = talk.install(&lab, 1, &files).await;
    assert_eq!(receipt.outcome, Outcome::Live);
    assert_eq!(
        fs::read(lab.database().join("b.laterclamav")).unwrap(),
        b"two"
    );
    let receipt = talk.install(&lab, 2, &[("a.ndb", b"three")]).await;
    assert_eq!(receipt.outcome, Outcome::Live);
    assert!(!lab.database().join("b.laterclamav").exists());
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_restarted_agent_knows_what_it_accepted_and_goes_on_numbering() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.install(&lab, 7, &[("a.ndb", b"seven")]).await;
    talk.say(&ToAgent::ReceiptAck { seq: 1 }).await;
    lab.until("it is forgotten", |status| status.receipts_pending == 0)
        .await;
    agent.stop(Occasion::Exit).await;

    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(6, &[("a.ndb", b"six")])))
        .await;
    let why = talk.refusal().await;
    assert!(why.contains("older than"), "{why}");
    let receipt = talk.install(&lab, 8, &[("a.ndb", b"eight")]).await;
    assert_eq!((receipt.seq, receipt.outcome), (2, Outcome::Live));
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_missing_file_is_put_back_from_the_hosts_own_copy_without_a_master() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let files: [(&str, &[u8]); 2] = [("a.ndb", b"one"), ("b.ndb", b"two")];
    let mut talk = master.greet().await;
    let installed = talk.install(&lab, 1, &files).await;
    agent.stop(Occasion::Exit).await;

    fs::remove_file(lab.database().join("b.ndb")).unwrap();
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let mut receipts = Vec::new();
    while receipts.len() < 3 {
        receipts.push(talk.receipt(&lab).await);
    }
    assert_eq!(receipts[0], installed, "nobody has acknowledged it");
    let drift = |mended| {
        let (name, found) = ("b.ndb".parse().unwrap(), Found::Missing);
        vec![Drift {
            name,
            found,
            mended,
        }]
    };
    let (found, mended) = (&receipts[1], &receipts[2]);
    assert_eq!(
        (found.outcome, &found.drift),
        (Outcome::Live, &drift(false))
    );
    assert_eq!(found.files.len(), 1, "the files as they are");
    assert_eq!(
        (mended.outcome, &mended.drift),
        (Outcome::Live, &drift(true))
    );
    assert_eq!(mended.files.len(), 2);
    assert!(mended.install > installed.install);
    assert_eq!(fs::read(lab.database().join("b.ndb")).unwrap(), b"two");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn what_has_no_good_copy_on_the_host_is_asked_of_the_master() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let files: [(&str, &[u8]); 2] = [("a.ndb", b"one"), ("b.ndb", b"two")];
    let mut talk = master.greet().await;
    talk.install(&lab, 1, &files).await;
    // In place: the agent's own link to it is damaged, too.
    fs::write(lab.database().join("b.ndb"), b"tWo").unwrap();
    let found = talk.receipt(&lab).await;
    assert!(!found.drift[0].mended && found.drift[0].found == Found::Changed);
    assert!(matches!(talk.hear().await, ToMaster::Reoffer {}));
    drop(talk);

    let mut talk = master.greet().await;
    let hello = &talk.hello;
    assert!(hello.installed.is_none() && hello.files.is_empty());
    assert_eq!(hello.outcome, None);
    let status: Status = lab.ask(&Request::Status).await.1;
    assert!(!status.live && status.drift.files.len() == 1);
    talk.say(&ToAgent::ReceiptAck { seq: 1 }).await;
    talk.say(&ToAgent::ReceiptAck { seq: 2 }).await;
    talk.say(&ToAgent::Offer(lab.offer(1, &files))).await;
    let needs = loop {
        match talk.hear().await {
            ToMaster::Need { files, .. } => break files,
            // Sent again until they are acknowledged; and it asks until it is answered.
            ToMaster::Receipt { .. } | ToMaster::Reoffer {} => {}
            other @ (ToMaster::Hello(_) | ToMaster::Progress { .. } | ToMaster::Error { .. }) => {
                panic!("{other:?}")
            }
        }
    };
    assert_eq!(names(&needs), ["b.ndb"]);
    talk.push(1, "b.ndb", b"two").await;
    let mended = talk.receipt(&lab).await;
    assert!(mended.outcome == Outcome::Live && mended.drift[0].mended);
    assert_eq!(fs::read(lab.database().join("b.ndb")).unwrap(), b"two");
    let status: Status = lab.ask(&Request::Status).await.1;
    assert!(status.live && status.drift.files.is_empty());
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn where_drift_is_only_reported_an_offer_of_the_same_is_declined() {
    let lab = Lab::new();
    let master = lab.master("bank");
    lab.edit("[database]", "[database]\ndrift = \"report\"");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.install(&lab, 1, &[("a.ndb", b"one")]).await;
    fs::write(lab.database().join("a.ndb"), b"onE").unwrap();
    assert!(!talk.receipt(&lab).await.drift[0].mended);
    let offer = lab.offer(1, &[("a.ndb", b"one")]);
    talk.say(&ToAgent::Offer(offer.clone())).await;
    let why = talk.refusal().await;
    assert!(why.contains("\"report\""), "{why}");
    let forced = Box::new(Offer {
        rehash: true,
        ..*offer
    });
    talk.say(&ToAgent::Offer(forced)).await;
    assert_eq!(names(&talk.need().await), ["a.ndb"]);
    talk.push(1, "a.ndb", b"one").await;
    assert!(talk.receipt(&lab).await.drift[0].mended);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn what_is_not_signed_for_this_fleet_is_refused_with_the_reason() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.install(&lab, 5, &[("a.ndb", b"five")]).await;

    let mut forged = lab.offer(6, &[("a.ndb", b"evil")]);
    forged.manifest = resign(&forged.manifest, 9);
    let mut foreign = lab.offer(6, &[("a.ndb", b"evil")]);
    foreign.keys = Some(lab.keys(9, 2).envelope().clone());
    let mut unvouched = lab.offer(6, &[("a.ndb", b"six")]);
    unvouched.fresh = lab.offer(7, &[("a.ndb", b"seven")]).fresh;
    let twin = lab.offer(5, &[("a.ndb", b"evil twin")]);
    for (offer, why) in [
        (forged, "not signed by a key that is trusted"),
        (foreign, "the key set is not to be trusted"),
        (unvouched, "vouches for another manifest"),
        (twin, "two manifests claim to be"),
    ] {
        talk.say(&ToAgent::Offer(offer)).await;
        let said = talk.refusal().await;
        assert!(said.contains(why), "{said}");
    }
    let status: Status = lab.ask(&Request::Status).await.1;
    assert!(
        status
            .error
            .is_some_and(|error| error.contains("two manifests"))
    );
    assert_eq!(fs::read(lab.database().join("a.ndb")).unwrap(), b"five");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_stale_offer_is_refused_where_the_configuration_says_so() {
    let lab = Lab::new();
    let master = lab.master("bank");
    lab.edit(
        "keys = \"manifest.pub\"",
        "keys = \"manifest.pub\"\nstale = \"refuse\"",
    );
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let mut offer = lab.offer(1, &[("a.ndb", b"first")]);
    let digest = Digest::of(&offer.manifest.payload);
    let expired = Timestamp::now() - HOUR;
    offer.fresh = lab.fresh(1, digest, expired - HOUR, expired);
    talk.say(&ToAgent::Offer(offer)).await;
    let why = talk.refusal().await;
    assert!(why.contains("expired"), "{why}");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_host_with_a_slow_clock_takes_offers_and_holds_them_no_longer_than_was_meant() {
    let lab = Lab::new();
    let master = lab.master("bank");
    lab.edit(
        "keys = \"manifest.pub\"",
        "keys = \"manifest.pub\"\nstale = \"refuse\"",
    );
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let files: [(&str, &[u8]); 1] = [("a.ndb", b"first")];
    let mut offer = lab.offer(1, &files);
    let digest = Digest::of(&offer.manifest.payload);
    // Issued in a day by this host's clock, for three hours.
    let expires = Timestamp::now() + HOUR * 25;
    offer.fresh = lab.fresh(1, digest, expires - HOUR * 3, expires);
    talk.say(&ToAgent::Offer(offer)).await;
    assert_eq!(names(&talk.need().await), ["a.ndb"]);
    talk.push(1, "a.ndb", b"first").await;
    assert_eq!(talk.receipt(&lab).await.outcome, Outcome::Live);
    let status: Status = lab.ask(&Request::Status).await.1;
    let until = status.fresh_until.unwrap();
    assert!(!status.stale && until <= Timestamp::now() + HOUR * 3);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_newer_key_set_is_taken_over_the_wire_and_kept() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master
        .greet_with(Some(lab.keys(1, 2).envelope().clone()))
        .await;
    talk.answered().await;
    agent.stop(Occasion::Exit).await;

    let agent = lab.start(&master).await;
    let status: Status = lab.ask(&Request::Status).await.1;
    assert_eq!(status.keys_version, 2);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_master_with_another_root_is_not_spoken_to() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let connection = master.accept().await;
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    let keys = Some(lab.keys(9, 2).envelope().clone());
    say(&mut send, &welcome(keys)).await;
    let closed = timeout(PATIENCE, connection.closed()).await.unwrap();
    assert!(closed.to_string().contains("key set refused"), "{closed}");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn only_the_certificate_of_the_fleets_master_is_believed() {
    let lab = Lab::new();
    for (identity, usage) in [
        // The same CA signed these, and a stolen bundle must not make anybody a master.
        (
            "clamcast://bank/agent/web2",
            ExtendedKeyUsagePurpose::ClientAuth,
        ),
        (
            "clamcast://bank/agent/web2",
            ExtendedKeyUsagePurpose::ServerAuth,
        ),
        (
            "clamcast://shop/master",
            ExtendedKeyUsagePurpose::ServerAuth,
        ),
    ] {
        let master = lab.server(lab.leaf(identity, usage, HOUR), "bank");
        let agent = lab.start(&master).await;
        let incoming = timeout(PATIENCE, master.endpoint.accept()).await.unwrap();
        let refused = incoming.unwrap().await;
        assert!(refused.is_err(), "{identity}");
        lab.until("it says so", |status| {
            let error = status.master.error.as_ref();
            error.is_some_and(|error| error.contains("not this fleet's master"))
        })
        .await;
        agent.stop(Occasion::Exit).await;
    }
}

#[tokio::test]
async fn a_message_of_a_newer_master_is_answered_and_survived() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.answered().await;
    talk.install(&lab, 1, &[("a.ndb", b"first")]).await;
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn what_a_peer_says_begins_no_line_of_the_log() {
    let lab = Lab::new();
    let log = lab.path("log");
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Arc::new(fs::File::create(&log).unwrap()))
        .init();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let message = "no\nERROR forged once".to_owned();
    talk.say(&ToAgent::Error { message }).await;
    talk.answered().await;
    talk.connection
        .close(VarInt::from_u32(99), b"bye\nERROR forged twice");
    master.greet().await;
    agent.stop(Occasion::Exit).await;

    let log = fs::read_to_string(log).unwrap();
    for said in ["forged once", "forged twice"] {
        let mut lines = log.lines().filter(|line| line.contains(said));
        assert!(lines.all(|line| !line.starts_with("ERROR")), "{log}");
        assert!(log.contains(said), "{log}");
    }
}

#[tokio::test]
async fn a_broken_frame_ends_the_connection_and_the_agent_comes_back() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let too_long = (wire::FRAME_BYTES_MAX as u32 + 1).to_be_bytes();
    for broken in [&b"\0\0\0\x04[1,2"[..], &too_long] {
        let mut talk = master.greet().await;
        talk.send.write_all(broken).await.unwrap();
        let closed = timeout(PATIENCE, talk.connection.closed()).await.unwrap();
        assert!(closed.to_string().contains("broken frame"), "{closed}");
    }
    master.greet().await;
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_stream_that_is_reset_is_no_file_and_is_asked_for_again_from_where_it_ended() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let content = vec![b'x'; 3 << 20];
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", &content)])))
        .await;
    assert_eq!(talk.need().await[0].resume_at, 0);
    let mut stream = talk.part(1, "a.ndb", &content, 0).await;
    stream.write_all(&content[..2 << 20]).await.unwrap();
    lab.until_spooled(1 << 20).await;
    stream.reset(VarInt::from_u32(0)).unwrap();

    let again = talk.need().await;
    assert_eq!(names(&again), ["a.ndb"]);
    let offset = again[0].resume_at;
    assert!(offset > 0, "what came is kept");
    let mut stream = talk.part(1, "a.ndb", &content, offset).await;
    let rest = usize::try_from(offset).unwrap();
    stream.write_all(&content[rest..]).await.unwrap();
    stream.finish().unwrap();
    assert_eq!(talk.receipt(&lab).await.outcome, Outcome::Live);
    assert!(fs::read(lab.database().join("a.ndb")).unwrap() == content);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn files_that_never_come_after_one_that_was_cut_off_are_asked_for_again() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let large = vec![b'x'; 3 << 20];
    let files: [(&str, &[u8]); 3] = [("a.ndb", &large), ("b.ndb", b"two"), ("c.ndb", b"three")];
    talk.say(&ToAgent::Offer(lab.offer(1, &files))).await;
    assert_eq!(talk.need().await.len(), 3);
    // As a master does whose disk fails: it breaks the first off and opens no other stream.
    let mut stream = talk.part(1, "a.ndb", &large, 0).await;
    stream.write_all(&large[..2 << 20]).await.unwrap();
    lab.until_spooled(1 << 20).await;
    stream.reset(VarInt::from_u32(0)).unwrap();

    assert_eq!(names(&talk.need().await), ["a.ndb", "b.ndb", "c.ndb"]);
    for (name, content) in files {
        talk.push(1, name, content).await;
    }
    assert_eq!(talk.receipt(&lab).await.outcome, Outcome::Live);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn streams_without_a_part_and_a_file_without_an_end_keep_no_good_file_out() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", b"good")])))
        .await;
    talk.need().await;
    let mut silent = Vec::new();
    let heads: [&[u8]; 4] = [b"\0", &[0xff; 4], b"\0\0\0\x04[1,2", b"\0\0\0\x09{}"];
    for head in heads {
        let mut stream = talk.connection.open_uni().await.unwrap();
        let _ = stream.write_all(head).await; // it may be stopped by then
        silent.push(stream);
    }
    talk.push(7, "a.ndb", b"good").await; // for an offer that nobody made
    let mut endless = talk.part(1, "a.ndb", b"good", 0).await;
    let sending = async { while endless.write_all(&[b'x'; 64 << 10]).await.is_ok() {} };
    timeout(PATIENCE, sending).await.unwrap();

    let again = talk.need().await;
    assert_eq!((names(&again), again[0].resume_at), (vec!["a.ndb"], 0));
    talk.push(1, "a.ndb", b"good").await;
    assert_eq!(talk.receipt(&lab).await.outcome, Outcome::Live);
    assert_eq!(fs::read(lab.database().join("a.ndb")).unwrap(), b"good");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn what_comes_out_wrong_is_never_installed_and_is_a_fault_after_the_last_round() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", b"right")])))
        .await;
    for _ in 0..clamcast_agent::core::slot::ROUNDS_MAX {
        let files = talk.need().await;
        assert_eq!(files[0].have, Have::Nothing);
        let mut stream = talk.part(1, "a.ndb", b"right", 0).await;
        stream.write_all(b"wrong").await.unwrap();
        stream.finish().unwrap();
    }
    let receipt = talk.receipt(&lab).await;
    assert_eq!(receipt.outcome, Outcome::HostFault);
    assert!(receipt.error.is_some_and(|error| error.contains("a.ndb")));
    assert!(!lab.database().join("a.ndb").exists());
    // A newer offer does not wait for the next try.
    let receipt = talk.install(&lab, 2, &[("a.ndb", b"other")]).await;
    assert_eq!(receipt.outcome, Outcome::Live);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn the_newest_offer_wins_while_files_are_on_their_way() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", b"first")])))
        .await;
    talk.need().await;
    let mut first = talk.part(1, "a.ndb", b"first", 0).await;
    first.write_all(b"fir").await.unwrap();
    let receipt = talk.install(&lab, 2, &[("a.ndb", b"second")]).await;
    assert_eq!(receipt.generation, Generation::new(2).unwrap());
    assert_eq!(fs::read(lab.database().join("a.ndb")).unwrap(), b"second");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn below_what_it_took_a_host_takes_what_it_has_and_nothing_else() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let files: [(&str, &[u8]); 2] = [("a.ndb", b"one"), ("b.ndb", b"two")];
    let mut talk = master.greet().await;
    talk.install(&lab, 1, &files).await;
    // It takes 3 in hand, and cannot have it.
    talk.say(&ToAgent::Offer(lab.offer(3, &[("a.ndb", b"three")])))
        .await;
    talk.need().await;
    fs::write(lab.database().join("b.ndb"), b"tWo").unwrap();
    let same_number = lab.offer(1, &[("a.ndb", b"another one")]);
    for lower in [lab.offer(2, &files), same_number] {
        let word = lower.fresh.clone();
        talk.say(&ToAgent::Offer(lower)).await;
        let why = talk.refusal().await;
        assert!(why.contains("older than 1.3"), "{why}");
        talk.say(&ToAgent::Fresh { fresh: word }).await;
        let why = talk.hear().await;
        assert!(
            matches!(why, ToMaster::Error { offer: None, .. }),
            "{why:?}"
        );
    }
    let offer = lab.offer(1, &files);
    let word = offer.fresh.clone();
    talk.say(&ToAgent::Offer(offer)).await;
    assert_eq!(names(&talk.need().await), ["b.ndb"]);
    talk.push(1, "b.ndb", b"two").await;
    let receipt = talk.receipt(&lab).await;
    assert_eq!(
        (receipt.generation, receipt.outcome),
        (Generation::FIRST, Outcome::Live)
    );
    assert_eq!(fs::read(lab.database().join("b.ndb")).unwrap(), b"two");
    talk.say(&ToAgent::Fresh { fresh: word }).await;
    for seq in [1, receipt.seq] {
        talk.say(&ToAgent::ReceiptAck { seq }).await;
    }
    lab.until("all of that is heard", |status| {
        status.receipts_pending == 0
    })
    .await;
    talk.answered().await; // nothing is said against the word
    // The mark is where it was, also after a restart.
    agent.stop(Occasion::Exit).await;
    drop(talk);
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(2, &files))).await;
    let why = talk.refusal().await;
    assert!(why.contains("older than 1.3"), "{why}");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn an_offer_of_another_publisher_is_declined_with_the_publisher_that_the_host_follows() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let followed = lab.offer(7, &[("a.ndb", b"first")]);
    talk.install(&lab, 7, &[("a.ndb", b"first")]).await;
    // Newer, older, or the same number with other content: two masters publish.
    for (publisher, generation) in [("p2", 8), ("p2", 6), ("p1", 7)] {
        let offer = lab.offer_of(publisher, generation, &[("a.ndb", b"other")]);
        talk.say(&ToAgent::Offer(offer)).await;
        let ToMaster::Error {
            offer: Some(_),
            other_master: Some(other),
            ..
        } = talk.hear().await
        else {
            panic!("expected a refusal that names the other master");
        };
        let expected = OtherMaster {
            publisher: Publisher("p1".into()),
            position: Position {
                epoch: Epoch(1),
                generation: Generation::new(7).unwrap(),
            },
            manifest_sha256: Digest::of(&followed.manifest.payload),
        };
        assert_eq!(*other, expected);
    }
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn what_is_being_replaced_is_not_taken_again() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let clamd = lab.path("clamd.ctl");
    lab.edit("\"none\"", &format!("{clamd:?}"));
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.install(&lab, 1, &[("a.ndb", b"first")]).await;
    let (reloads, mut reloaded) = mpsc::unbounded_channel();
    let clamd = UnixListener::bind(clamd).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = clamd.accept().await.unwrap();
            tokio::spawn(answer(stream, reloads.clone()));
        }
    });
    talk.say(&ToAgent::Offer(lab.offer(2, &[("a.ndb", b"second")])))
        .await;
    talk.need().await;
    talk.push(2, "a.ndb", b"second").await;
    let second = || fs::read(lab.database().join("a.ndb")).unwrap() == b"second";
    while !second() {
        timeout(PATIENCE, reloaded.recv()).await.expect("a reload");
    }
    // clamd has yet to be seen with it; 1 is what is recorded until then.
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", b"first")])))
        .await;
    let why = talk.refusal().await;
    assert!(why.contains("older than 1.2"), "{why}");
    assert!(second());
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn an_offer_does_not_wait_for_a_clamd_that_is_still_to_show_the_set_before() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let clamd = lab.path("clamd.ctl");
    lab.edit("\"none\"", &format!("{clamd:?}"));
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    let receipt = talk.install(&lab, 1, &[("a.ndb", b"first")]).await;
    assert_eq!(receipt.outcome, Outcome::Installed, "no clamd is there");

    // Now one is; it reloads and reloads, and never shows the set.
    let clamd = UnixListener::bind(clamd).unwrap();
    let (reloads, mut reloaded) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = clamd.accept().await.unwrap();
            tokio::spawn(answer(stream, reloads.clone()));
        }
    });
    timeout(PATIENCE, reloaded.recv()).await.expect("a reload");
    talk.say(&ToAgent::Offer(lab.offer(2, &[("a.ndb", b"second")])))
        .await;
    assert_eq!(names(&talk.need().await), ["a.ndb"]);
    agent.stop(Occasion::Exit).await;
}

/// Answers as a clamd does that has none of the host's databases.
async fn answer(mut stream: UnixStream, reloads: mpsc::UnboundedSender<()>) {
    let mut request = Vec::new();
    while !request.contains(&0) {
        if stream.read_buf(&mut request).await.unwrap() == 0 {
            return;
        }
    }
    let answer: &[u8] = match &request[..] {
        b"zPING\0" => b"PONG\0",
        b"zVERSION\0" => b"ClamAV 1.4.3\0",
        b"zRELOAD\0" => {
            reloads.send(()).unwrap();
            b"RELOADING\0"
        }
        _ => b"stream: OK\0",
    };
    // The asking connection may be closed by now.
    let _ = stream.write_all(answer).await;
}

#[tokio::test]
async fn a_transfer_that_dies_with_the_agent_leaves_nothing_and_is_resumed() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let content = vec![b'y'; 3 << 20];
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", &content)])))
        .await;
    talk.need().await;
    let mut stream = talk.part(1, "a.ndb", &content, 0).await;
    stream.write_all(&content[..2 << 20]).await.unwrap();
    lab.until_spooled(1 << 20).await;
    agent.stop(Occasion::Exit).await;
    assert_eq!(lab.visible(), Vec::<String>::new());

    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.say(&ToAgent::Offer(lab.offer(1, &[("a.ndb", &content)])))
        .await;
    assert!(talk.need().await[0].resume_at > 0);
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn an_agent_with_an_expired_certificate_repairs_drift_and_its_status_says_that_it_expired() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let mut talk = master.greet().await;
    talk.install(&lab, 1, &[("a.ndb", b"one")]).await;
    agent.stop(Occasion::Exit).await;

    let web1 = "clamcast://bank/agent/web1";
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    lab.give(&lab.leaf(web1, client, SignedDuration::from_mins(-1)));
    fs::remove_file(lab.database().join("a.ndb")).unwrap();
    let agent = lab.start(&master).await;
    lab.until("the file is back and proven", |status| {
        status.drift.files.is_empty() && status.live && lab.database().join("a.ndb").exists()
    })
    .await;
    let status: Status = lab.ask(&Request::Status).await.1;
    assert!(status.certificate_expired && !status.master.connected);
    let ends = status.certificate_expires;
    let alarm = status.alarm.as_deref().unwrap();
    assert!(alarm.contains(&format!("expired at {ends}")), "{alarm}");
    let text = status.text(Timestamp::now());
    let line = format!("certificate:  expired at {ends}");
    assert!(text.contains(&line), "{text}");
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn a_host_that_never_received_a_freshness_statement_becomes_stale_from_its_first_start() {
    let lab = Lab::new();
    let silent = lab.master("bank");
    let status = async || lab.ask::<Status>(&Request::Status).await.1;
    let agent = lab.start(&silent).await;
    assert!(!status().await.stale);
    let path = lab.path("state").join("first-start.json");
    let first: Timestamp = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    agent.stop(Occasion::Exit).await;
    // It survives a restart.
    let agent = lab.start(&silent).await;
    let kept: Timestamp = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(kept, first);
    agent.stop(Occasion::Exit).await;

    let since = first - SignedDuration::from_mins(1);
    let long_ago = since - SignedDuration::try_from(FRESH_UNHEARD).unwrap();
    fs::write(&path, serde_json::to_vec(&long_ago).unwrap()).unwrap();
    // A start before the certificate is that of a wrong clock or of a cloned image.
    let agent = lab.start(&silent).await;
    assert!(!status().await.stale);
    agent.stop(Occasion::Exit).await;
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let (web1, ends) = ("clamcast://bank/agent/web1", Timestamp::now() + HOUR);
    lab.give(&lab.leaf_between(web1, client, long_ago - HOUR, ends));
    let master = lab.master("bank");
    let agent = lab.start(&master).await;
    let now = status().await;
    assert_eq!((now.stale, now.stale_since), (true, Some(since)));
    assert!(now.text(first).contains("no freshness statement came"));
    let mut talk = master.greet().await;
    talk.install(&lab, 1, &[("a.ndb", b"one")]).await;
    let now = status().await;
    assert_eq!((now.stale, now.stale_since), (false, None));
    agent.stop(Occasion::Exit).await;
}

#[tokio::test]
async fn an_agent_without_a_usable_identity_does_not_start_and_says_what_to_do() {
    let lab = Lab::new();
    let master = lab.master("bank");
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let web1 = "clamcast://bank/agent/web1";
    let leaf = |uri, left| lab.leaf(uri, client.clone(), left);
    for (leaf, why) in [
        (
            leaf("clamcast://bank/master", HOUR),
            "not the certificate of an agent",
        ),
        (
            leaf("clamcast://shop/agent/web1", HOUR),
            "is for fleet `shop`",
        ),
    ] {
        lab.give(&leaf);
        let error = lab.fails_to_start(&master).await;
        assert!(error.contains(why), "{error}");
    }
    lab.give(&leaf(web1, HOUR));
    let other = leaf(web1, HOUR);
    fs::write(lab.path("cert.pem"), &other.cert).unwrap();
    let error = lab.fails_to_start(&master).await;
    assert!(error.contains("is not the key of"), "{error}");
    fs::remove_file(lab.path("key.pem")).unwrap();
    let error = lab.fails_to_start(&master).await;
    assert!(error.contains("clamcast-certs agent"), "{error}");
}

// The laboratory.

/// A certificate with its key, in PEM.
struct Leaf {
    cert: String,
    key: String,
}

/// A host's bundle and directories, and the keys of its fleet.
struct Lab {
    dir: TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn fleet() -> FleetName {
    "bank".parse().unwrap()
}

impl Lab {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let ca = CertifiedIssuer::self_signed(params, ca_key).unwrap();
        let lab = Self {
            dir: tempfile::tempdir().unwrap(),
            ca,
        };
        fs::create_dir(lab.database()).unwrap();
        fs::write(lab.path("ca.pem"), lab.ca.pem()).unwrap();
        let keys = serde_json::to_vec(lab.keys(1, 1).envelope()).unwrap();
        fs::write(lab.path("manifest.pub"), keys).unwrap();
        let client = ExtendedKeyUsagePurpose::ClientAuth;
        lab.give(&lab.leaf("clamcast://bank/agent/web1", client, HOUR));
        let toml = r#"
master = "MASTER"
state = "state"
[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"
[trust]
keys = "manifest.pub"
[listen]
admin = "agent.sock"
[database]
path = "db"
[clamd]
config = ""
socket = "none"
"#;
        fs::write(lab.path("agent.toml"), toml).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn database(&self) -> PathBuf {
        self.path("db")
    }

    fn edit(&self, from: &str, to: &str) {
        let path = self.path("agent.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        fs::write(path, text.replace(from, to)).unwrap();
    }

    fn leaf(&self, uri: &str, usage: ExtendedKeyUsagePurpose, left: SignedDuration) -> Leaf {
        let ends = Timestamp::now() + left;
        self.leaf_between(uri, usage, ends - HOUR - HOUR, ends)
    }

    fn leaf_between(
        &self,
        uri: &str,
        usage: ExtendedKeyUsagePurpose,
        begins: Timestamp,
        ends: Timestamp,
    ) -> Leaf {
        let signing = SigningKey::from_bytes(&rand::random());
        let key = signing.to_pkcs8_pem(LineEnding::LF).unwrap().to_string();
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![usage];
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.not_before = SystemTime::from(begins).into();
        params.not_after = SystemTime::from(ends).into();
        let pair = KeyPair::from_pem(&key).unwrap();
        let cert = params.signed_by(&pair, &self.ca).unwrap().pem();
        Leaf { cert, key }
    }

    /// Puts a certificate with its key into the bundle.
    fn give(&self, leaf: &Leaf) {
        fs::write(self.path("cert.pem"), &leaf.cert).unwrap();
        fs::write(self.path("key.pem"), &leaf.key).unwrap();
    }

    fn keys(&self, root: u8, version: u64) -> Verified<KeySet> {
        let set = KeySet {
            fleet: fleet(),
            version,
            epoch: Epoch(1),
            issued: Timestamp::UNIX_EPOCH,
            root: PublicKey::of(&key(root)),
            manifest: vec![PublicKey::of(&key(2))],
            audit: vec![PublicKey::of(&key(3))],
        };
        sign(set, &key(root))
    }

    /// An offer whose number is its generation's.
    fn offer(&self, generation: u64, files: &[(&str, &[u8])]) -> Box<Offer> {
        self.offer_of("p1", generation, files)
    }

    fn offer_of(&self, publisher: &str, generation: u64, files: &[(&str, &[u8])]) -> Box<Offer> {
        let file = |(name, content): &(&str, &[u8])| ManifestFile {
            captured: None,
            name: name.parse().unwrap(),
            size: content.len() as u64,
            sha256: Digest::of(content),
            container: None,
        };
        let files: Vec<_> = files.iter().map(file).collect();
        let manifest = Manifest {
            fleet: fleet(),
            epoch: Epoch(1),
            generation: Generation::new(generation).unwrap(),
            publisher: Publisher(publisher.into()),
            created: Timestamp::UNIX_EPOCH, // so that an offer can be repeated
            previous: None,
            rollback_of: None,
            content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
            files,
        };
        let manifest = sign(manifest, &key(2));
        let (issued, expires) = (Timestamp::now() - HOUR, Timestamp::now() + HOUR);
        Box::new(Offer {
            offer: OfferId(generation),
            fresh: self.fresh(generation, manifest.payload_sha256(), issued, expires),
            manifest: manifest.envelope().clone(),
            keys: None,
            rehash: false,
            full: false,
        })
    }

    fn fresh(
        &self,
        generation: u64,
        manifest_sha256: Digest,
        issued: Timestamp,
        expires: Timestamp,
    ) -> Envelope {
        let fresh = Freshness {
            fleet: fleet(),
            epoch: Epoch(1),
            generation: Generation::new(generation).unwrap(),
            manifest_sha256,
            issued,
            expires,
        };
        sign(fresh, &key(2)).envelope().clone()
    }

    fn master(&self, fleet: &str) -> Master {
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        self.server(self.leaf("clamcast://bank/master", usage, HOUR), fleet)
    }

    fn server(&self, leaf: Leaf, fleet: &str) -> Master {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let cert = CertificateDer::from_pem_slice(leaf.cert.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![cert], key)
            .unwrap();
        tls.alpn_protocols = vec![wire::ALPN.to_vec()];
        let quic = QuicServerConfig::try_from(tls).unwrap();
        let config = ServerConfig::with_crypto(Arc::new(quic));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Master {
            endpoint: Endpoint::server(config, address).unwrap(),
            fleet: fleet.to_owned(),
        }
    }

    fn config(&self, master: &Master) -> Config {
        let address = master.endpoint.local_addr().unwrap().to_string();
        let text = fs::read_to_string(self.path("agent.toml")).unwrap();
        let path = self.path("running.toml");
        fs::write(&path, text.replace("MASTER", &address)).unwrap();
        Config::load(&path).unwrap()
    }

    async fn start(&self, master: &Master) -> Agent {
        Agent::start(self.config(master), &mut None).await.unwrap()
    }

    async fn fails_to_start(&self, master: &Master) -> String {
        let error = Agent::start(self.config(master), &mut None)
            .await
            .unwrap_err();
        format!("{:#}", anyhow::Error::from(error))
    }

    /// Asks the agent through its socket: exit code and result.
    async fn ask<T: serde::de::DeserializeOwned>(&self, request: &Request) -> (u8, T) {
        let (socket, request) = (self.path("agent.sock"), request.clone());
        let call = move || admin::call(DAEMON, &socket, &request, |_| {}).unwrap();
        let finish = tokio::task::spawn_blocking(call).await.unwrap();
        (finish.exit, serde_json::from_value(finish.result).unwrap())
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) {
        let wait = async {
            loop {
                let status: Status = self.ask(&Request::Status).await.1;
                if is_so(&status) {
                    return;
                }
            }
        };
        timeout(PATIENCE, wait).await.expect(what);
    }

    /// Waits until so many bytes of a transfer are on the host's disk.
    async fn until_spooled(&self, bytes: u64) {
        let wait = async {
            while bytes_below(&self.database().join(".clamcast")) < bytes {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, wait).await.expect("bytes arrive");
    }

    /// What anybody but the agent sees in the database directory.
    fn visible(&self) -> Vec<String> {
        let entries = fs::read_dir(self.database()).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != ".clamcast").collect()
    }
}

fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(facts) if facts.is_dir() => bytes_below(&entry.path()),
            Ok(facts) => facts.len(),
            Err(_) => 0,
        })
        .sum()
}

fn resign(envelope: &Envelope, seed: u8) -> Envelope {
    let manifest: Manifest = serde_json::from_slice(&envelope.payload).unwrap();
    sign(manifest, &key(seed)).envelope().clone()
}

fn names(files: &[NeedFile]) -> Vec<&str> {
    files.iter().map(|file| file.name.as_str()).collect()
}

fn welcome(keys: Option<Envelope>) -> ToAgent {
    ToAgent::Welcome(Welcome {
        fleet: fleet(),
        master_version: "test".into(),
        time: Timestamp::now(),
        keep_alive: 15,
        keys,
        accepts: Features::default(),
        known: Vec::new(),
    })
}

/// Says what a test wants said.
struct Master {
    endpoint: Endpoint,
    fleet: String,
}

impl Master {
    async fn accept(&self) -> Connection {
        let incoming = timeout(PATIENCE, self.endpoint.accept()).await;
        incoming.expect("an agent dials").unwrap().await.unwrap()
    }

    async fn greet(&self) -> Talk {
        self.greet_with(None).await
    }

    async fn greet_with(&self, keys: Option<Envelope>) -> Talk {
        self.greet_by(welcome(keys)).await
    }

    /// Greets as a master that takes short receipts and has these manifests.
    async fn greet_knowing(&self, manifests: &[&Envelope]) -> Talk {
        let ToAgent::Welcome(mut welcome) = welcome(None) else {
            unreachable!("it is a Welcome");
        };
        welcome.accepts = [Feature::ShortReceipts].into_iter().collect();
        let payloads = manifests.iter().map(|it| Digest::of(&it.payload));
        welcome.known = payloads.collect();
        self.greet_by(ToAgent::Welcome(welcome)).await
    }

    async fn greet_by(&self, welcome: ToAgent) -> Talk {
        assert_eq!(self.fleet, "bank");
        let connection = self.accept().await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        say(&mut send, &welcome).await;
        let ToMaster::Hello(hello) = hear(&mut recv).await else {
            panic!("an agent begins with Hello");
        };
        Talk {
            connection,
            send,
            recv,
            hello: *hello,
        }
    }
}

/// A conversation with an agent.
struct Talk {
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
    hello: Hello,
}

async fn say(send: &mut SendStream, message: &ToAgent) {
    send.write_all(&wire::frame(message).unwrap())
        .await
        .unwrap();
}

async fn hear(recv: &mut RecvStream) -> ToMaster {
    let read = async {
        let mut prefix = [0; 4];
        recv.read_exact(&mut prefix).await.unwrap();
        let mut json = vec![0; wire::frame_length(prefix, wire::FRAME_BYTES_MAX).unwrap()];
        recv.read_exact(&mut json).await.unwrap();
        wire::parse(&json).unwrap()
    };
    timeout(PATIENCE, read)
        .await
        .expect("the agent says something")
}

impl Talk {
    async fn say(&mut self, message: &ToAgent) {
        say(&mut self.send, message).await;
    }

    /// The next message that is not about progress.
    async fn hear(&mut self) -> ToMaster {
        loop {
            match hear(&mut self.recv).await {
                ToMaster::Progress { .. } => {}
                message @ (ToMaster::Hello(_)
                | ToMaster::Need { .. }
                | ToMaster::Reoffer {}
                | ToMaster::Receipt { .. }
                | ToMaster::Error { .. }) => return message,
            }
        }
    }

    async fn need(&mut self) -> Vec<NeedFile> {
        let heard = self.hear().await;
        let ToMaster::Need { files, .. } = heard else {
            panic!("expected a need, got {heard:?}");
        };
        files
    }

    async fn receipt(&mut self, lab: &Lab) -> Receipt {
        let ToMaster::Receipt { receipt } = self.hear().await else {
            panic!("expected a receipt");
        };
        let cert = CertificateDer::from_pem_file(lab.path("cert.pem")).unwrap();
        let cert = clamcast_proto::identity::Certificate::from_der(&cert).unwrap();
        let Some(Identity {
            role: Role::Agent { name, .. },
            ..
        }) = cert.identity
        else {
            panic!("an agent's certificate");
        };
        let receipt: Verified<Receipt> = receipt.verify([&cert.key]).unwrap();
        assert_eq!(receipt.agent, name);
        (*receipt).clone()
    }

    async fn refusal(&mut self) -> String {
        let heard = self.hear().await;
        let ToMaster::Error {
            offer: Some(_),
            message,
            ..
        } = heard
        else {
            panic!("expected a refusal, got {heard:?}");
        };
        message
    }

    /// Says something that no version knows, and waits for the answer: whatever was to be said
    /// before it has been said then.
    async fn answered(&mut self) {
        let json = br#"{"type":"Levitate","height":3}"#;
        let length = u32::try_from(json.len()).unwrap().to_be_bytes();
        self.send
            .write_all(&[&length[..], json].concat())
            .await
            .unwrap();
        let heard = self.hear().await;
        let ToMaster::Error {
            offer: None,
            message,
            ..
        } = heard
        else {
            panic!("expected an objection, got {heard:?}");
        };
        assert!(message.contains("Levitate"), "{message}");
    }

    /// Opens the stream of a full file, its bytes from `offset` on still to be written.
    async fn part(&self, offer: u64, name: &str, content: &[u8], offset: u64) -> SendStream {
        let part = Part {
            offer: OfferId(offer),
            name: name.parse().unwrap(),
            encoding: PartEncoding {
                kind: PartKind::Full,
                zstd: false,
                from: None,
                to: Digest::of(content),
                length: content.len() as u64,
            },
            offset,
        };
        let mut stream = self.connection.open_uni().await.unwrap();
        stream
            .write_all(&wire::frame(&part).unwrap())
            .await
            .unwrap();
        stream
    }

    async fn push(&self, offer: u64, name: &str, content: &[u8]) {
        let mut stream = self.part(offer, name, content, 0).await;
        stream.write_all(content).await.unwrap();
        stream.finish().unwrap();
    }

    /// Offers a generation and sends what is missing.
    async fn install(&mut self, lab: &Lab, generation: u64, files: &[(&str, &[u8])]) -> Receipt {
        self.say(&ToAgent::Offer(lab.offer(generation, files)))
            .await;
        for need in self.need().await {
            let file = files.iter().find(|(name, _)| *name == need.name.as_str());
            let (name, content) = file.expect("it needs what was offered");
            self.push(generation, name, content).await;
        }
        self.receipt(lab).await
    }

    fn hang_up(self, code: u32) {
        self.connection.close(VarInt::from_u32(code), b"");
    }
}
