//! The messages between master and agent, and their frames.
//!
//! A frame is a `u32` in network byte order, the number of bytes that follow, then that many bytes
//! of JSON. Control messages travel on one bidirectional stream that the master opens, `Welcome`
//! first. Bulk data has a unidirectional stream a file: a `Part` frame, then raw bytes to its end.
//! Unknown fields are ignored and unknown messages are answered with `Error` and survived, because
//! the hosts of a fleet are never all upgraded at once.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::dsse::Envelope;
use crate::manifest::Publisher;
use crate::receipt::{ClamdReport, FileState, Outcome};
use crate::{DatabaseName, Digest, FleetName, Position};

/// The application protocol (TLS ALPN).
pub const ALPN: &[u8] = b"clamcast/1";

/// The port that the master listens on unless told otherwise, UDP.
pub const PORT: u16 = 7310;

/// Seconds between an agent's keep-alives. By them it notices that its master was restarted without
/// a word, so this is most of the time until a whole fleet is back; and they are more frequent than
/// the UDP timeouts of NAT routers (30 s in the strictest). 2,000 agents at this rate cost the master
/// less than a fiftieth of a core.
pub const KEEP_ALIVE_SECS: u64 = 10;

/// A connection without any packet for this many seconds is over: six keep-alives.
pub const IDLE_TIMEOUT_SECS: u64 = 60;

/// Receipts that an agent keeps until they are acknowledged. The master remembers as many to know
/// one that is sent again.
pub const RECEIPTS_PENDING_MAX: usize = 256;

/// Longest frame in bytes, the length itself aside: a manifest of the largest size in base64, with
/// a key set and a freshness statement beside it.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Longest publisher id in a message, in bytes: a master makes 32 hexadecimal digits.
pub const PUBLISHER_BYTES_MAX: usize = 64;

/// Manifests that a master names in Welcome: three times what it keeps unless told otherwise.
pub const KNOWN_MAX: usize = 64;

/// Longest `Part` frame in bytes: names and digests of one file.
pub const PART_BYTES_MAX: usize = 4 << 10;

/// What the master says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "type")]
pub enum ToAgent {
    /// The certificate and the revocation list were checked: only now is the agent connected.
    Welcome(Welcome),
    /// This host is wanted at this generation.
    Offer(Box<Offer>),
    /// A receipt is in the master's audit log; the agent may forget it.
    ReceiptAck {
        /// The receipt's number.
        seq: u64,
    },
    /// The current generation is still current.
    Fresh {
        /// A signed [`crate::fresh::Freshness`].
        fresh: Envelope,
    },
    /// The head of the master's audit log, for agents to remember.
    Checkpoint {
        /// A C2SP checkpoint.
        checkpoint: String,
    },
    /// The last message was not understood, or asked for what cannot be.
    Error {
        /// Why.
        message: String,
    },
}

/// What an agent says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "type")]
pub enum ToMaster {
    /// The answer to Welcome.
    Hello(Box<Hello>),
    /// What is missing for an offer.
    Need {
        /// Which offer.
        offer: OfferId,
        /// The files that must be transferred. None: nothing is missing.
        files: Vec<NeedFile>,
    },
    /// How far an install is; deadlines run from the last one.
    Progress {
        /// Which offer.
        offer: OfferId,
        /// What is going on.
        phase: Phase,
        /// Until when the agent means to be silent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Timestamp>,
    },
    /// Files of the installed generation are damaged, and no copy on the host is good: asks to be
    /// offered anew what this host should run or, where it failed with that, what it has. A master
    /// that does not know it answers with `Error`.
    Reoffer {},
    /// What came of a generation: a signed [`crate::receipt::Receipt`].
    Receipt {
        /// The signed statement.
        receipt: Envelope,
    },
    /// The last message was not understood, or the offer is not taken.
    Error {
        /// The offer it is about, if any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offer: Option<OfferId>,
        /// Why.
        message: String,
        /// The other master, if the offer is declined because of one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        other_master: Option<Box<OtherMaster>>,
    },
}

/// The master that an agent follows, in the answer that declines the offer of a second master in the
/// same epoch. Both masters have one publisher if a state directory was copied or a manifest key was
/// stolen: then only the manifests differ.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct OtherMaster {
    /// The publisher that the agent follows.
    pub publisher: Publisher,
    /// The newest generation that the agent accepted from it.
    pub position: Position,
    /// SHA-256 of the payload of that generation's manifest.
    pub manifest_sha256: Digest,
}

impl OtherMaster {
    /// Whether the text keeps its limit: what an honest agent sends does.
    pub fn is_bounded(&self) -> bool {
        self.publisher.0.len() <= PUBLISHER_BYTES_MAX
    }
}

/// Names an offer on one connection.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct OfferId(pub u64);

/// What a peer accepts that version 0.1.0 did not know. A peer that does not announce a feature is not
/// sent what needs it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// An agent installs databases with names that are not [`DatabaseName::is_plain`].
    WideNames,
    /// An agent reads compressed manifests.
    LargeManifests,
    /// A master takes receipts that list only deviations from the manifest.
    ShortReceipts,
}

/// The features that a peer announces: a list of names in JSON. Names that this version does not know are
/// ignored.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "Vec<Announced>")]
pub struct Features(BTreeSet<Feature>);

impl Features {
    /// Whether the peer announces a feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.0.contains(&feature)
    }

    /// Whether the peer announces none that this version knows.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Feature> for Features {
    fn from_iter<I: IntoIterator<Item = Feature>>(features: I) -> Self {
        Self(features.into_iter().collect())
    }
}

/// An entry of a list of features.
#[derive(Deserialize)]
#[serde(untagged)]
enum Announced {
    Known(Feature),
    Unknown(IgnoredAny),
}

/// The set has at most as many entries as this version knows features, whatever was announced.
impl From<Vec<Announced>> for Features {
    fn from(announced: Vec<Announced>) -> Self {
        let known = announced.into_iter().filter_map(|entry| match entry {
            Announced::Known(feature) => Some(feature),
            Announced::Unknown(IgnoredAny) => None,
        });
        known.collect()
    }
}

/// First words of the master.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Welcome {
    /// The fleet.
    pub fleet: FleetName,
    /// The master's program version.
    pub master_version: String,
    /// The master's clock.
    pub time: Timestamp,
    /// Seconds between the agent's keep-alives.
    pub keep_alive: u64,
    /// The newest signed key set, [`crate::keys::KeySet`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<Envelope>,
    /// What the master accepts beyond version 0.1.0.
    #[serde(default, skip_serializing_if = "Features::is_empty")]
    pub accepts: Features,
    /// Payload digests of manifests that the master has, at most [`KNOWN_MAX`]. An agent does not send
    /// one of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known: Vec<Digest>,
}

/// First words of an agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Hello {
    /// The agent's program version.
    pub agent_version: String,
    /// What the agent accepts beyond version 0.1.0.
    #[serde(default, skip_serializing_if = "Features::is_empty")]
    pub accepts: Features,
    /// Its clamd.
    pub clamd: ClamdReport,
    /// The signed manifest of what is installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installed: Option<Envelope>,
    /// In its place, where [`Welcome::known`] has it: SHA-256 of its payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installed_sha256: Option<Digest>,
    /// What came of the last generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Content digest of what is on disk under the installed generation's names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
    /// With `content`: the files that are not the installed manifest's, at most
    /// [`crate::receipt::DEVIATIONS_MAX`]. Without it, from an earlier agent: all files. No master reads
    /// it: what counts of a host is its receipts.
    #[serde(default)]
    pub files: Vec<FileState>,
    /// With `content`: names of the manifest under which there is nothing, as many at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<DatabaseName>,
    /// Databases of others in the directory.
    #[serde(default)]
    pub foreign: Vec<String>,
    /// Anything the host wants to be known by, for people to read.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Hello {
    /// The Hello of an agent that has nothing installed and accepts what version 0.1.0 did.
    pub fn new(agent_version: &str, clamd: ClamdReport) -> Self {
        Self {
            agent_version: agent_version.to_owned(),
            accepts: Features::default(),
            clamd,
            installed: None,
            installed_sha256: None,
            outcome: None,
            content: None,
            files: Vec::new(),
            missing: Vec::new(),
            foreign: Vec::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// An offered generation.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Offer {
    /// Names this offer in what follows.
    pub offer: OfferId,
    /// The signed manifest.
    pub manifest: Envelope,
    /// The signed freshness statement for it.
    pub fresh: Envelope,
    /// The newest signed key set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<Envelope>,
    /// Hash what is really on disk before anything is taken as there (`force-sync`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rehash: bool,
    /// Use no delta (`force-sync --full`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
}

/// A file that must be transferred.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NeedFile {
    /// Its name in the manifest.
    pub name: DatabaseName,
    /// What the agent has to build it from.
    pub have: Have,
    /// Offset in the encoded part to go on from.
    #[serde(default)]
    pub resume_at: u64,
    /// The part that `resume_at` is an offset in. Another part starts at 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<PartEncoding>,
}

/// What an agent can build a file from.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Have {
    /// An older file with this digest.
    Sha256(Digest),
    /// A file of unknown content; it wants the new file's signature to search it.
    Search,
    /// Everything but these ranges (offset, length) of the new file.
    Ranges(Vec<(u64, u64)>),
    /// Nothing.
    Nothing,
}

/// Header of a bulk stream.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Part {
    /// The offer it is for.
    pub offer: OfferId,
    /// The file's name in the manifest.
    pub name: DatabaseName,
    /// The encoded part.
    #[serde(flatten)]
    pub encoding: PartEncoding,
    /// Offset in the encoded part at which the bytes start.
    pub offset: u64,
}

/// Names an encoded part: the same encoding has the same bytes whenever it is sent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PartEncoding {
    /// How the file is encoded.
    pub kind: PartKind,
    /// Whether a full file travels as one zstd frame.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub zstd: bool,
    /// Digest of the file that the delta is from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// Digest of the file that comes out.
    pub to: Digest,
    /// Length of the whole encoded part in bytes.
    pub length: u64,
}

/// How a file travels.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PartKind {
    /// A delta of [`crate::delta`].
    Delta,
    /// The file as it is.
    Full,
    /// The signature of the new file.
    Signature,
    /// Ranges of the new file.
    Ranges,
}

/// What an install is doing, in the order in which it gets there.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing.
    #[default]
    Idle,
    /// Receiving what is missing.
    Fetching,
    /// Everything is on disk, hidden.
    Staged,
    /// Renaming.
    Swapping,
    /// clamd was told.
    Reloading,
    /// Asking clamd what it scans with.
    Proving,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Idle => "idle",
            Self::Fetching => "fetching",
            Self::Staged => "staged",
            Self::Swapping => "swapping",
            Self::Reloading => "reloading",
            Self::Proving => "proving",
        })
    }
}

/// A message in its frame.
pub fn frame(message: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).expect("our own messages serialise");
    let length = bytes.len() - 4;
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong {
            length,
            limit: FRAME_BYTES_MAX,
        });
    }
    let length = u32::try_from(length).expect("FRAME_BYTES_MAX fits in 32 bits");
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

/// The number of bytes that follow a frame's first four, before anything is allocated for them.
pub fn frame_length(prefix: [u8; 4], limit: usize) -> Result<usize, FrameError> {
    let length = u32::from_be_bytes(prefix) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    Ok(length)
}

/// Longest part of a message that an error repeats, in characters. The master answers with it and
/// logs it.
const SHOWN_CHARS_MAX: usize = 200;

/// Reads the JSON of a frame.
pub fn parse<T: for<'de> Deserialize<'de>>(json: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(json).map_err(|error| {
        #[derive(Deserialize)]
        struct Kind {
            #[serde(rename = "type")]
            kind: String,
        }
        // The parser repeats a text of any length that it did not expect.
        let source = serde_json::Error::custom(shown(&error.to_string(), SHOWN_CHARS_MAX));
        match serde_json::from_slice::<Kind>(json) {
            Ok(Kind { kind }) => FrameError::Message {
                kind: shown(&kind, 40),
                source,
            },
            Err(_) => FrameError::Json { source },
        }
    })
}

fn shown(text: &str, chars_max: usize) -> String {
    let clean = |c: char| if c.is_control() { '?' } else { c };
    text.chars().take(chars_max).map(clean).collect()
}

/// A frame is not a message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than any honest frame.
    #[error("a frame of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// What it says.
        length: usize,
        /// The bound.
        limit: usize,
    },
    /// A message that this version does not know, or whose fields it does not understand: to be
    /// answered and survived.
    #[error("cannot read the message `{kind}`")]
    Message {
        /// Its type.
        kind: String,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// Not JSON, or without a type: the stream cannot be trusted any more.
    #[error("a frame is not a JSON object with a type")]
    Json {
        /// The parser's reason.
        source: serde_json::Error,
    },
}

/// Codes with which connections are closed (QUIC application errors).
pub mod close {
    /// A normal end: the daemon stops.
    pub const STOPPING: u32 = 0;
    /// The certificate is revoked.
    pub const REVOKED: u32 = 1;
    /// The certificate is not an agent's of this fleet.
    pub const NOT_AN_AGENT: u32 = 2;
    /// A newer connection of the same name took over.
    pub const REPLACED: u32 = 3;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 4;
    /// The peer did not do in time what it should.
    pub const TIMEOUT: u32 = 5;
    /// The master has as many connections as it can serve, or as much work by this agent.
    pub const BUSY: u32 = 6;
    /// The agent's certificate has expired.
    pub const EXPIRED: u32 = 7;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_its_frame() {
        let bytes = frame(&ToAgent::ReceiptAck { seq: 7 }).unwrap();
        let length = frame_length(bytes[..4].try_into().unwrap(), FRAME_BYTES_MAX).unwrap();
        assert_eq!(length, bytes.len() - 4);
        let message: ToAgent = parse(&bytes[4..]).unwrap();
        assert!(matches!(message, ToAgent::ReceiptAck { seq: 7 }));
    }

    #[test]
    fn a_length_is_refused_before_anything_is_allocated() {
        assert!(frame_length([0xff; 4], FRAME_BYTES_MAX).is_err());
        assert!(
            frame(&ToAgent::Checkpoint {
                checkpoint: "x".repeat(FRAME_BYTES_MAX)
            })
            .is_err()
        );
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_messages_have_a_name() {
        assert!(parse::<ToAgent>(br#"{"type":"ReceiptAck","seq":1,"new":true}"#).is_ok());
        let unknown = parse::<ToAgent>(br#"{"type":"Levitate","height":3}"#).unwrap_err();
        assert!(matches!(unknown, FrameError::Message { kind, .. } if kind == "Levitate"));
        assert!(matches!(
            parse::<ToAgent>(b"[1]"),
            Err(FrameError::Json { .. })
        ));
    }

    #[test]
    fn features_that_this_version_does_not_know_are_ignored() {
        let read = |json: &str| serde_json::from_str::<Features>(json).unwrap();
        let both = read(r#"["wide-names","levitation",7,{"a":[1]},null,"large-manifests"]"#);
        assert!(both.has(Feature::WideNames) && both.has(Feature::LargeManifests));
        assert!(read("[]").is_empty() && read(r#"["levitation"]"#).is_empty());
        let features: Features = [Feature::WideNames].into_iter().collect();
        let json = serde_json::to_string(&features).unwrap();
        assert_eq!(json, r#"["wide-names"]"#);
        assert_eq!(read(&json), features);
    }

    #[test]
    fn an_error_repeats_only_the_beginning_of_a_hostile_message() {
        let long = "\u{1}x".repeat(1000);
        let quoted = serde_json::to_string(&long).unwrap();
        for json in [format!(r#"{{"type":{quoted}}}"#), quoted] {
            let error = parse::<ToMaster>(json.as_bytes()).unwrap_err();
            let source = std::error::Error::source(&error).unwrap();
            let text = format!("{error}: {source}");
            assert!(text.len() < 300, "{text}");
            assert!(!text.contains(char::is_control), "{text}");
        }
    }

    #[test]
    fn a_declined_offer_of_an_older_agent_names_no_other_master() {
        let old = br#"{"type":"Error","offer":3,"message":"no"}"#;
        let error = parse::<ToMaster>(old).unwrap();
        assert!(matches!(
            error,
            ToMaster::Error {
                other_master: None,
                ..
            }
        ));
        assert_eq!(serde_json::to_vec(&error).unwrap(), old);
    }

    #[test]
    fn need_reads_as_documented() {
        let need = ToMaster::Need {
            offer: OfferId(3),
            files: vec![NeedFile {
                name: "daily.cld".parse().unwrap(),
                have: Have::Nothing,
                resume_at: 0,
                resume: None,
            }],
        };
        assert_eq!(
            serde_json::to_string(&need).unwrap(),
            r#"{"type":"Need","offer":3,"files":[{"name":"daily.cld","have":"nothing","resume_at":0}]}"#
        );
        let json = r#"{"name":"a.cld","have":{"ranges":[[0,5],[9,1]]}}"#;
        let file: NeedFile = serde_json::from_str(json).unwrap();
        assert_eq!(file.have, Have::Ranges(vec![(0, 5), (9, 1)]));
    }
}
