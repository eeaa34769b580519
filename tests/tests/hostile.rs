//! Agents that keep no rule, and strangers: the real master goes on beside them, and so does an
//! honest agent.
//!
//! Every test does something to the master, and while it does has a generation published, which the
//! honest agent must get and prove. The master must not panic, still answer its operators, and keep
//! its memory within bounds.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clamcast_proto::dsse::Envelope;
use clamcast_proto::manifest::SignedBy;
use clamcast_proto::receipt::{FileState, InstallNumber, Outcome, Receipt, ReceiptFile};
use clamcast_proto::wire::{self, Have, NeedFile, Offer, OfferId, Part, Phase, ToAgent, ToMaster};
use clamcast_proto::{DatabaseName, Digest, Epoch, Generation};
use clamcast_tests::lab::{
    Agent, Container, Conversation, Fleet, Master, PATIENCE, Rogue, Usage, code, halfway, hello,
    initials, receipt, send_from, signatures, until, with_transport,
};
use jiff::Timestamp;
use quinn::{Connection, ConnectionError, RecvStream, TransportConfig, VarInt};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// What one misbehaving agent may add to the master's memory, with what a publication of some
/// megabytes takes beside it.
const MEMORY: u64 = 64 << 20;

/// A master with an honest agent, `good`, which is live at generation 1.
struct Scene {
    fleet: Fleet,
    master: Master,
    good: Agent,
    runtime: Runtime,
    generation: u64,
    memory: u64,
}

impl Scene {
    fn new() -> Self {
        Self::with("", 50)
    }

    /// With `tables` in the master's configuration, and sets of so many signatures.
    fn with(tables: &str, signatures: u64) -> Self {
        let fleet = Fleet::new();
        let mirror = fleet.mirror();
        set(1, signatures).write(&mirror);
        let mut master = fleet.master(&mirror);
        // A wave for all and a short deadline: how long an agent that is silent with its offer may
        // hold up the next generation is the rollout's business and not of interest here.
        let tables = format!(
            "require = []\nload_test = \"never\"\nshrink_max = \"100%\"\n{tables}\n[rollout]\n\
             waves = [\"100%\"]\ndeadline = \"2s\"\nrefused_max = \"100%\"\nunwell_max = \"100%\""
        );
        master.configure("require = []", &tables);
        let mut good = fleet.agent("good");
        master.start();
        good.start();
        master.wait_live("good", 1);
        let memory = Usage::of(master.pid()).memory;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        Self {
            fleet,
            master,
            good,
            runtime: runtime.unwrap(),
            generation: 1,
            memory,
        }
    }

    fn rogue(&self, name: &str) -> Rogue {
        let _inside = self.runtime.enter();
        Rogue::new(&self.fleet, name)
    }

    fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.fleet.port()).into()
    }

    fn run<T>(&self, doing: impl Future<Output = T>) -> T {
        self.runtime.block_on(doing)
    }

    /// Starts an attack, which counts its blows, and returns when `blows` of them were struck.
    fn attack<F: Future<Output = ()> + Send + 'static>(
        &self,
        blows: usize,
        attack: impl FnOnce(Arc<AtomicUsize>) -> F,
    ) -> tokio::task::JoinHandle<()> {
        let struck = Arc::new(AtomicUsize::new(0));
        let attacking = self.runtime.spawn(attack(struck.clone()));
        until(PATIENCE, "the attack is under way", || {
            let struck = struck.load(Ordering::Relaxed);
            assert!(!attacking.is_finished(), "it ended after {struck} blows");
            if struck >= blows { Ok(()) } else { Err(struck) }
        });
        attacking
    }

    /// The next generation reaches the honest agent, and the master is well.
    #[track_caller]
    fn unhurt(&mut self, signatures: u64) {
        self.generation += 1;
        set(self.generation, signatures).write(&self.mirror());
        self.master.wait_generation(self.generation);
        self.master.wait_live("good", self.generation);
        assert_eq!(self.good.names(), ["daily.cud"]);
        let log = self.master.log();
        for word in ["panicked", "this is a bug"] {
            assert!(!log.contains(word), "{log}");
        }
    }

    /// What the master's memory grew by since the honest agent had its first generation.
    fn grown(&self) -> u64 {
        let memory = Usage::of(self.master.pid()).memory;
        memory.saturating_sub(self.memory)
    }

    #[track_caller]
    fn bounded(&self, most: u64) {
        let grown = self.grown();
        println!("memory grew by {} KiB", grown >> 10);
        assert!(grown <= most, "grew by {grown} bytes");
    }

    fn mirror(&self) -> PathBuf {
        self.fleet.mirror()
    }

    /// The audit log's records of `event` about `subject`.
    fn audit(&self, event: &str, subject: &str) -> Vec<Value> {
        let mut records = self.master.audit(event);
        records.retain(|record| record["subject"] == subject);
        records
    }

    #[track_caller]
    fn wait_rejected(&self, why: &str) {
        until(PATIENCE, &format!("rejected: {why}"), || {
            let rejected = self.master.audit("rejected");
            let is = |record: &Value| record["detail"]["reason"].to_string().contains(why);
            if rejected.iter().any(is) {
                Ok(())
            } else {
                Err(rejected)
            }
        });
    }
}

fn set(version: u64, count: u64) -> Container {
    let numbers = version * 1_000_000..version * 1_000_000 + count;
    Container::new("daily", version).member("hsb", signatures(numbers))
}

fn need(offer: &Offer, have: Have) -> ToMaster {
    ToMaster::Need {
        offer: offer.offer,
        files: vec![file("daily.cud", have)],
    }
}

fn file(name: &str, have: Have) -> NeedFile {
    NeedFile {
        name: name.parse::<DatabaseName>().unwrap(),
        have,
        resume_at: 0,
        resume: None,
    }
}

/// A transport whose streams take so little at a time, and that opens itself to no more than these.
fn narrow(window: u32, streams: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .keep_alive_interval(Some(Duration::from_secs(5)))
        .stream_receive_window(window.into())
        .max_concurrent_uni_streams(streams.into());
    transport
}

/// The next file that comes, as far as its header. What was begun for an earlier request is reset.
async fn part(connection: &Connection) -> (Part, RecvStream) {
    loop {
        let mut stream = connection.accept_uni().await.unwrap();
        let header = async {
            let mut prefix = [0; 4];
            stream.read_exact(&mut prefix).await?;
            let mut json = vec![0; u32::from_be_bytes(prefix) as usize];
            stream.read_exact(&mut json).await.map(|()| json)
        };
        if let Ok(json) = header.await {
            return (serde_json::from_slice(&json).unwrap(), stream);
        }
    }
}

/// The next error that the master answers with.
async fn error(conversation: &mut Conversation) -> String {
    loop {
        match conversation.hear().await {
            Some(ToAgent::Error { message }) => return message,
            Some(_) => {}
            None => panic!("the master hung up"),
        }
    }
}

// ---- without a certificate

#[test]
fn first_packets_by_the_thousand_from_anywhere_keep_nobody_out() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let initials = scene.run(initials(&rogue, 3000));
    let address = scene.address();
    let attack = scene.attack(3000, async move |struck| {
        for (number, initial) in initials.iter().cycle().enumerate() {
            send_from((number % 250) as u8 + 1, initial, address);
            if struck.fetch_add(1, Ordering::Relaxed) % 16 == 0 {
                pace(Duration::from_millis(1)).await;
            }
        }
    });
    scene.unhurt(50);
    // One who comes now gets in, too.
    let mut late = scene.fleet.agent("late");
    late.start();
    scene.master.wait_live("late", scene.generation);
    assert!(!attack.is_finished());
    scene.bounded(MEMORY);
}

#[test]
fn handshakes_that_stop_halfway_by_the_thousand_keep_nobody_out() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let relay = halfway(scene.address());
    let refused = Arc::new(AtomicUsize::new(0));
    let counted = refused.clone();
    let attack = scene.attack(2000, async move |struck| {
        loop {
            for _ in 0..16 {
                let (rogue, refused) = (rogue.clone(), counted.clone());
                tokio::spawn(async move {
                    let config = rogue.config();
                    let ended = timeout(PATIENCE, rogue.connect_to(relay, config)).await;
                    // The master's own word: of a handshake that it began nothing more gets through.
                    if let Ok(Err(ConnectionError::ConnectionClosed(_))) = ended {
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                });
                struck.fetch_add(1, Ordering::Relaxed);
            }
            pace(Duration::from_millis(20)).await;
        }
    });
    scene.unhurt(50);
    let mut late = scene.fleet.agent("late");
    late.start();
    scene.master.wait_live("late", scene.generation);

    // They are 4,096, of which each lasts ten seconds: nobody else is let in, and whoever is in
    // already does not notice.
    until(PATIENCE, "the master lets nobody in", || {
        refused.load(Ordering::Relaxed) > 0
    });
    scene.unhurt(50);
    assert!(!attack.is_finished());
    scene.bounded(4 * MEMORY);
    attack.abort();
    let mut later = scene.fleet.agent("later");
    later.start();
    scene.master.wait_live("later", scene.generation);
}

#[test]
fn garbage_is_thrown_away() {
    let mut scene = Scene::new();
    let address = scene.address();
    let attack = scene.attack(5000, async move |struck| {
        let mut random = rand::rngs::StdRng::seed_from_u64(1);
        loop {
            let mut garbage = vec![0; random.random_range(0..2000)];
            random.fill_bytes(&mut garbage);
            // Every other one has the beginning of a handshake.
            if let (Some(head), true) = (garbage.get_mut(..6), random.random()) {
                head.copy_from_slice(&[0xc0, 0, 0, 0, 1, 8]);
            }
            send_from(random.random_range(1..250), &garbage, address);
            if struck.fetch_add(1, Ordering::Relaxed) % 16 == 0 {
                pace(Duration::from_millis(1)).await;
            }
        }
    });
    scene.unhurt(50);
    assert!(!attack.is_finished());
    scene.bounded(MEMORY);
}

// ---- with a certificate: what is said

#[test]
fn a_frame_that_says_it_is_giant_ends_the_connection_before_it_comes() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    for length in [wire::FRAME_BYTES_MAX as u32 + 1, 1 << 30, u32::MAX] {
        scene.run(async {
            let mut talk = rogue.enter(rogue.config()).await;
            talk.write(&length.to_be_bytes()).await;
            assert_eq!(talk.ended().await, Some(wire::close::PROTOCOL));
        });
    }
    scene.wait_rejected("a frame of");
    scene.unhurt(50);
    scene.bounded(MEMORY);
}

#[test]
fn what_is_no_message_ends_the_connection_and_an_unknown_one_is_answered() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let nested = "[".repeat(100_000);
    for text in ["", "null", "7", "[1]", "{\"type\":3}", "\u{0}", &nested] {
        scene.run(async {
            let mut talk = rogue.enter(rogue.config()).await;
            let mut frame = (text.len() as u32).to_be_bytes().to_vec();
            frame.extend(text.as_bytes());
            talk.write(&frame).await;
            assert_eq!(
                talk.ended().await,
                Some(wire::close::PROTOCOL),
                "{text:.20}"
            );
        });
    }
    scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        for number in 0..300 {
            let message = json!({ "type": format!("Levitate{number}"), "height": 3 });
            talk.write(&wire::frame(&message).unwrap()).await;
            let answer = error(&mut talk).await;
            assert!(answer.contains(&format!("`Levitate{number}`")), "{answer}");
        }
        // Known ones with what cannot be are the same.
        for message in [
            json!({ "type": "Need", "offer": -1, "files": [] }),
            json!({ "type": "Need", "offer": 1, "files": [{ "name": "../../etc/passwd", "have": "nothing" }] }),
            json!({ "type": "Progress", "offer": 1, "phase": "flying" }),
            json!({ "type": "Progress", "offer": 1, "phase": "idle", "until": "tomorrow" }),
            json!({ "type": "Receipt", "receipt": { "payloadType": "x", "payload": "%", "signatures": [] } }),
        ] {
            talk.write(&wire::frame(&message).unwrap()).await;
            let answer = error(&mut talk).await;
            assert!(answer.contains("cannot read"), "{answer}");
        }
        assert_eq!(talk.connection.close_reason(), None);
    });
    scene.unhurt(50);
    scene.bounded(MEMORY);
}

#[test]
fn whoever_says_no_hello_is_sent_away() {
    let mut scene = Scene::new();
    let rogues = ["silent", "dripping", "closed", "early"].map(|name| scene.rogue(name));
    let [silent, dripping, closed, early] = rogues;
    let waiting = scene.runtime.spawn(async move {
        let say_nothing = async {
            let talk = silent.greet(silent.config()).await;
            assert_eq!(talk.ended().await, Some(wire::close::TIMEOUT));
        };
        let one_byte_at_a_time = async {
            let mut talk = dripping.greet(dripping.config()).await;
            for byte in wire::frame(&hello()).unwrap() {
                if !talk.write(&[byte]).await {
                    break;
                }
                pace(Duration::from_millis(200)).await;
            }
            assert_eq!(talk.ended().await, Some(wire::close::TIMEOUT));
        };
        let open_to_no_stream = async {
            let mut transport = narrow(1024, 0);
            transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
            let config = with_transport(closed.config(), transport);
            let connection = closed.connect(config).await.unwrap();
            let end = timeout(PATIENCE, connection.closed()).await.unwrap();
            assert_eq!(code(&end), Some(wire::close::TIMEOUT));
        };
        let something_else_first = async {
            let mut talk = early.greet(early.config()).await;
            talk.say(&ToMaster::Reoffer {}).await;
            assert_eq!(talk.ended().await, Some(wire::close::PROTOCOL));
        };
        tokio::join!(
            say_nothing,
            one_byte_at_a_time,
            open_to_no_stream,
            something_else_first
        );
    });
    scene.unhurt(50);
    scene.run(waiting).unwrap();
    scene.wait_rejected("something else before Hello");
    scene.bounded(MEMORY);
}

#[test]
fn an_agent_opens_no_stream_and_sends_no_datagram() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let talk = scene.run(async {
        let talk = rogue.enter(rogue.config()).await;
        let connection = &talk.connection;
        tokio::select! {
            biased;
            opened = connection.open_uni() => panic!("a stream: {opened:?}"),
            opened = connection.open_bi() => panic!("a stream: {opened:?}"),
            () = pace(Duration::from_millis(500)) => {}
        }
        assert!(connection.send_datagram(vec![0; 100].into()).is_err());
        talk
    });
    scene.unhurt(50);
    assert_eq!(talk.connection.close_reason(), None);
}

#[test]
fn a_flood_of_messages_delays_nobody_else() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let attack = scene.attack(1000, async move |struck| {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await.offer;
        loop {
            for until in [Some(Timestamp::MAX), Some(Timestamp::MIN), None] {
                let phase = Phase::Fetching;
                talk.say(&ToMaster::Progress {
                    offer,
                    phase,
                    until,
                })
                .await;
                struck.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    scene.unhurt(50);
    assert!(!attack.is_finished());
    scene.bounded(MEMORY);
}

#[test]
fn giant_messages_without_end_delay_nobody_else() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let attack = scene.attack(8, async move |struck| {
        let mut talk = rogue.enter(rogue.config()).await;
        let unknown = json!({ "type": "Levitate", "much": vec![1; 500_000] });
        let frame = wire::frame(&unknown).unwrap();
        // The answers are not read.
        while talk.write(&frame).await {
            struck.fetch_add(1, Ordering::Relaxed);
        }
    });
    scene.unhurt(50);
    assert!(!attack.is_finished());
    scene.bounded(2 * MEMORY);
}

// ---- with a certificate: receipts

#[test]
fn a_receipt_that_is_sent_again_is_one_receipt() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await;
        let envelope = rogue.sign(receipt(&offer, "rogue", 1));
        for _ in 0..100 {
            let receipt = envelope.clone();
            talk.say(&ToMaster::Receipt { receipt }).await;
        }
        let mut acknowledged = 0;
        while acknowledged < 100 {
            if let ToAgent::ReceiptAck { seq } = talk.hear().await.unwrap() {
                assert_eq!(seq, 1);
                acknowledged += 1;
            }
        }
        // Also on another connection.
        let mut talk = rogue.enter(rogue.config()).await;
        talk.say(&ToMaster::Receipt { receipt: envelope }).await;
        while !matches!(talk.hear().await, Some(ToAgent::ReceiptAck { .. })) {}
    });
    assert_eq!(scene.audit("receipt", "rogue").len(), 1);
    scene.unhurt(50);
}

#[test]
fn a_receipt_for_somebody_else_is_not_believed() {
    let mut scene = Scene::new();
    let (rogue, other) = (scene.rogue("rogue"), scene.rogue("other"));
    let before = scene.audit("receipt", "good");
    scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await;
        let honest = || receipt(&offer, "rogue", 1);
        let of = |change: &dyn Fn(&mut Receipt)| {
            let mut changed = honest();
            change(&mut changed);
            rogue.sign(changed)
        };
        let mut tampered = rogue.sign(honest());
        tampered.payload[20] ^= 1;
        let somebody = "somebody else's";
        let signature = "is not signed by";
        for (receipt, why) in [
            (of(&|it| it.agent = "good".parse().unwrap()), somebody),
            (of(&|it| it.fleet = "shop".parse().unwrap()), somebody),
            (other.sign(honest()), signature),
            (other.sign(receipt(&offer, "other", 1)), signature),
            (tampered, signature),
            (offer.manifest.clone(), ""),
            (of(&|it| it.error = Some("x".repeat(500_000))), "too long"),
            (
                of(&|it| it.foreign = vec![String::new(); 10_000]),
                "too long",
            ),
            (
                of(&|it| it.adopted = vec!["x.ndb".parse().unwrap(); 10_000]),
                "too long",
            ),
        ] {
            talk.say(&ToMaster::Receipt { receipt }).await;
            let answer = error(&mut talk).await;
            assert!(answer.contains(why), "{why}: {answer}");
        }
        assert_eq!(talk.connection.close_reason(), None);
    });
    assert_eq!(scene.audit("receipt", "good"), before);
    for name in ["rogue", "other"] {
        assert_eq!(scene.audit("receipt", name), [] as [Value; 0]);
    }
    scene.unhurt(50);
    scene.bounded(MEMORY);
}

#[test]
fn what_a_liar_says_of_itself_moves_nobody_else() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await;
        let mut lie = receipt(&offer, "rogue", u64::MAX);
        lie.outcome = Outcome::Live;
        lie.generation = Generation::new(u64::MAX).unwrap();
        lie.epoch = Epoch(u64::MAX);
        lie.install = InstallNumber(u64::MAX);
        lie.took = f64::MAX;
        lie.time = Timestamp::MAX;
        let receipt = rogue.sign(lie);
        talk.say(&ToMaster::Receipt { receipt }).await;
        while !matches!(
            talk.hear().await,
            Some(ToAgent::ReceiptAck { seq: u64::MAX })
        ) {}
    });
    scene.unhurt(50);
    assert!(scene.master.agent("rogue").unwrap()["conformant"] == false);
}

#[test]
fn receipts_without_end_fill_no_disk_also_over_many_connections() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let state = scene.master.directory().join("state");
    let before = bytes_below(&state);
    let codes = scene.run(async {
        let mut codes = Vec::new();
        let (mut seq, mut first) = (0, None);
        while codes.len() < 6 {
            let mut talk = match rogue.try_greet(rogue.config()).await {
                Ok(talk) => talk,
                Err(end) => {
                    codes.push(code(&end));
                    continue;
                }
            };
            talk.say(&hello()).await;
            // Past its budget in the audit log it is offered nothing.
            if first.is_none() {
                first = Some(talk.offer().await);
            }
            // Listing what a manifest could, which is as long as a receipt can be.
            let mut long = receipt(first.as_ref().unwrap(), "rogue", 0);
            let state = FileState {
                name: "daily.cud".parse().unwrap(),
                size: 1,
                sha256: Digest::of(b""),
            };
            let file = ReceiptFile {
                file: state,
                signed_by: Some(SignedBy::Talos),
            };
            long.files = vec![file; 4000];
            while talk.connection.close_reason().is_none() {
                seq += 1;
                long.seq = seq;
                let receipt = rogue.sign(long.clone());
                talk.say(&ToMaster::Receipt { receipt }).await;
            }
            codes.push(talk.ended().await);
        }
        codes
    });
    let busy = |code: &Option<u32>| code.is_none_or(|code| code == wire::close::BUSY);
    assert!(codes.iter().all(busy), "{codes:?}");
    scene.wait_rejected("work budget");
    let written = bytes_below(&state) - before;
    println!("{written} bytes written");
    assert!(written < 4 << 20, "{written} bytes");
    let status = scene.master.json(&["status"]).unwrap();
    let alarms = status["alarms"].as_array().unwrap().iter();
    let budget = alarms.filter(|it| it["name"] == "audit-budget").count();
    assert_eq!(budget, 1, "{status}");
    scene.unhurt(50);
    scene.bounded(2 * MEMORY);
}

fn bytes_below(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0, // gone meanwhile
        })
        .sum()
}

// ---- with a certificate: connections

#[test]
fn connections_of_one_name_by_the_thousand_replace_each_other_until_they_are_too_many() {
    let mut scene = Scene::new();
    let rogue = scene.rogue("rogue");
    let attack = scene.attack(1000, async move |struck| {
        loop {
            if let Ok(mut talk) = rogue.try_greet(rogue.config()).await {
                talk.say(&hello()).await;
                let _ = talk.next().await; // the offer, or the end
            }
            struck.fetch_add(1, Ordering::Relaxed);
        }
    });
    scene.unhurt(50);
    assert!(!attack.is_finished());
    let offers = scene.audit("offer", "rogue").len();
    println!("{offers} offers");
    assert!(offers < 600, "{offers} lines in the audit log");
    scene.bounded(MEMORY);
}

// ---- with a certificate: files

#[test]
fn a_need_for_what_is_not_there_gets_nothing_or_the_file() {
    let mut scene = Scene::with("", 5000);
    let rogue = scene.rogue("rogue");
    scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await;
        // Files and offers that are not: nothing comes for them, and what follows is served.
        let many = (0..5000).map(|number| file(&format!("f{number}.ndb"), Have::Nothing));
        talk.say(&ToMaster::Need {
            offer: offer.offer,
            files: many.collect(),
        })
        .await;
        talk.say(&ToMaster::Need {
            offer: OfferId(u64::MAX),
            files: vec![file("daily.cud", Have::Nothing)],
        })
        .await;
        let absurd = vec![(u64::MAX, u64::MAX), (0, 0), (5, u64::MAX), (7, 1)];
        for have in [
            Have::Nothing,
            Have::Search,
            Have::Ranges(absurd),
            Have::Ranges(vec![(0, 0); 100_000]),
            Have::Sha256(Digest::of(b"never seen")),
        ] {
            talk.say(&need(&offer, have)).await;
            let (part, mut stream) = part(&talk.connection).await;
            assert_eq!((part.name.as_str(), part.offset), ("daily.cud", 0));
            let bytes = stream.read_to_end(8 << 20).await.unwrap();
            assert_eq!(bytes.len() as u64, part.encoding.length);

            // From beyond its end nothing is left.
            let mut beyond = file("daily.cud", Have::Nothing);
            beyond.resume_at = u64::MAX;
            beyond.resume = Some(part.encoding.clone());
            let files = vec![beyond; 50]; // one file is sent once, however often it is named
            let offer = offer.offer;
            talk.say(&ToMaster::Need { offer, files }).await;
            let (end, mut stream) = self::part(&talk.connection).await;
            assert_eq!(end.offset, part.encoding.length);
            assert!(stream.read_to_end(1).await.unwrap().is_empty());
        }
    });
    scene.unhurt(5000);
    scene.bounded(MEMORY);
}

#[test]
fn whoever_asks_for_the_same_files_without_end_is_sent_away() {
    let mut scene = Scene::with("", 5000);
    let rogue = scene.rogue("rogue");
    let code = scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await;
        while talk.connection.close_reason().is_none() {
            talk.say(&need(&offer, Have::Nothing)).await;
        }
        talk.ended().await
    });
    assert!(
        code.is_none_or(|code| code == wire::close::BUSY),
        "{code:?}"
    );
    scene.wait_rejected("work budget");
    scene.unhurt(5000);
    scene.bounded(MEMORY);
}

#[test]
fn some_who_read_slowly_keep_nobody_waiting() {
    let mut scene = Scene::with("[push]\nconcurrent = 1", 60_000);
    let rogues = ["rogue1", "rogue2", "rogue3", "rogue4"].map(|name| scene.rogue(name));
    let attack = scene.attack(rogues.len(), async move |struck| {
        let bite = Duration::from_secs(2); // fast enough not to be given up
        let hogs = rogues.map(|rogue| hog(rogue, narrow(16 << 10, 8), bite, struck.clone()));
        let [one, two, three, four] = hogs;
        tokio::join!(one, two, three, four);
    });
    scene.unhurt(60_000);
    assert!(!attack.is_finished());
    scene.bounded(MEMORY);
}

#[test]
fn many_who_read_nothing_keep_nobody_waiting() {
    let mut scene = Scene::with("[push]\nconcurrent = 2", 60_000);
    let names: Vec<_> = (0..16).map(|number| format!("rogue{number}")).collect();
    let rogues: Vec<_> = names.iter().map(|name| scene.rogue(name)).collect();
    let attack = scene.attack(rogues.len(), async move |struck| {
        let mut hogs = tokio::task::JoinSet::new();
        for (number, rogue) in rogues.into_iter().enumerate() {
            // Some take no stream at all, some a little of one, some as much as there is.
            let transport = match number % 3 {
                0 => narrow(16 << 10, 0),
                1 => narrow(16 << 10, 8),
                _ => narrow(8 << 20, 8),
            };
            hogs.spawn(hog(rogue, transport, PATIENCE, struck.clone()));
        }
        hogs.join_all().await;
    });
    scene.unhurt(60_000);
    assert!(!attack.is_finished());
    scene.bounded(MEMORY);
}

/// Asks for the file of every offer, and takes a bite of it now and then.
async fn hog(rogue: Rogue, transport: TransportConfig, bite: Duration, struck: Arc<AtomicUsize>) {
    let config = with_transport(rogue.config(), transport);
    let mut talk = rogue.enter(config).await;
    let connection = talk.connection.clone();
    let mut offer = talk.offer().await;
    loop {
        talk.say(&need(&offer, Have::Nothing)).await;
        struck.fetch_add(1, Ordering::Relaxed);
        let eat = async {
            while let Ok(mut stream) = connection.accept_uni().await {
                let mut bytes = [0; 8 << 10];
                while stream.read_exact(&mut bytes).await.is_ok() {
                    pace(bite).await;
                }
            }
        };
        tokio::select! {
            next = talk.offer() => offer = next,
            () = eat => return,
        }
    }
}

#[test]
fn an_agent_that_asks_for_deltas_between_many_pairs_occupies_one_computation() {
    let mut scene = Scene::with("", 100_000);
    let rogue = scene.rogue("rogue");
    // Nobody asks for deltas before: the honest agent comes later.
    assert!(scene.good.stop().success());
    let mut olds = Vec::new();
    for version in 2..=6 {
        let state = scene.master.directory().join("state");
        let manifest = fs::read(state.join(format!("generations/1-{}.json", version - 1))).unwrap();
        let envelope: Envelope = serde_json::from_slice(&manifest).unwrap();
        let manifest: Value = serde_json::from_slice(&envelope.payload).unwrap();
        let digest = manifest["files"][0]["sha256"].clone();
        olds.push(serde_json::from_value::<Digest>(digest).unwrap());
        let numbers = version * 1_000_000..version * 1_000_000 + 100_000 + version;
        Container::new("daily", version)
            .member("hsb", signatures(numbers))
            .write(&scene.mirror());
        scene.master.wait_generation(version);
    }
    scene.generation = 6;
    let pid = scene.master.pid();
    let threads = move || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        tasks.expect("it runs").count()
    };
    let before = threads();
    let most = scene.run(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = talk.offer().await;
        let mut most = 0;
        for number in 0..200 {
            let old = olds[number % olds.len()];
            talk.say(&need(&offer, Have::Sha256(old))).await;
            // Long enough for each to be begun, and for all of them not as long as the deltas take.
            pace(Duration::from_millis(1)).await;
            most = most.max(threads());
        }
        let (part, _) = part(&talk.connection).await;
        assert!(olds.contains(&part.encoding.from.expect("a delta")));
        most.max(threads())
    });
    println!("{before} and then {most} threads");
    assert!(most < before + 8, "{before} and then {most} threads");
    scene.good.start();
    scene.unhurt(50);
}

/// The pace of a peer that floods or drips: how it behaves, nothing that a test waits for.
async fn pace(span: Duration) {
    tokio::time::sleep_until(tokio::time::Instant::now() + span).await;
}
