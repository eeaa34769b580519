//! ClamAV's database containers: `.cvd`, `.cld` and `.cud`.
//!
//! A container is a 512-byte header, then a tar, plain or as one gzip stream. The member
//! `NAME.info` repeats the header and lists every other member but `COPYING` with its size and
//! SHA-256; Talos signs that list. clamd's own check proves little: it loads a file that was cut
//! between two members, and verifies neither tar checksums nor the gzip trailer. [`check`] reads a
//! container to its last byte, and accepts a `.cvd` or `.cld` only with valid signatures of Talos. They
//! cover everything that clamd loads. In a `.cld` they do not cover `COPYING`, the order of the members
//! and the unused fields of the tar and gzip headers.
//!
//! The format is that of libclamav/cvd.c (`cl_cvdparse`, `cli_cvdload`, `cli_tgzload`),
//! libclamav/readdb.c (`cli_loadinfo`) and common/tar.c (`tar_addfile`). The tar is read by hand,
//! because a tar library reads past a short member, and shows neither the padding nor what follows
//! the end.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;
use jiff::Timestamp;
use md5::Md5;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::manifest::SignedBy;
use crate::names::{DatabaseKind, looks_like_a_database};
use crate::talos::{self, SignatureError};

/// Length of the header in front of the tar.
pub const HEADER_BYTES: usize = 512;

/// Longest body, inflated: nine times that of the daily database in its largest year. A small gzip
/// stream could otherwise keep the reader busy for as long as it likes.
pub const BODY_BYTES_MAX: u64 = 2 << 30;

/// Largest member: half of that. clamd reads a size into 32 bits.
pub const MEMBER_BYTES_MAX: u64 = 1 << 30;

/// Most members. Most real databases have about twenty; bytecode has one for every signature.
pub const MEMBERS_MAX: usize = 4096;

/// Longest `.info`, which is held in memory: [`MEMBERS_MAX`] lines of the longest name, a size and
/// a digest. Also the longest `COPYING`, which no signature covers in a `.cld`.
pub const INFO_BYTES_MAX: u64 = 1 << 20;

/// Reads a container to its end and checks that it is whole and genuine.
///
/// - The header agrees with the first line of `.info`.
/// - The tar and the gzip stream end where the file does.
/// - Every member that `.info` lists is there once with its size and SHA-256, and nothing else is
///   there but `.info` and `COPYING`.
/// - The MD5 in the header, which a `.cvd` must have, is that of the body.
/// - Talos signed the `.info` of a `.cvd` or `.cld`, and the MD5 of a `.cvd`. A `.cud` is unsigned by
///   definition.
///
/// Talos's two signatures together cover every byte of a `.cvd`. If both verify, a defect of the layout
/// (a limit of ours, padding, a tar header, the end, an additional member that is no database) is no error but [`Summary::oddity`], because the
/// refusal of a database that Talos released in an unusual form would keep it from every host. Members
/// behind such a defect are not read, so they are not compared with `.info`.
///
/// Memory is bounded whatever the file says: buffers of 64 KiB, `.info`, and the members'
/// names and digests.
pub fn check(kind: DatabaseKind, source: impl Read) -> Result<Summary, ContainerError> {
    Contents::read(kind, source, BODY_BYTES_MAX)?.verify()
}

/// What a genuine container says of itself.
#[derive(Debug)]
pub struct Summary {
    /// Version, number of signatures, build time.
    pub header: Header,
    /// The list of members.
    pub info: Info,
    /// Whose signature was verified.
    pub signed_by: SignedBy,
    /// The defect of the layout that was tolerated.
    pub oddity: Option<ContainerError>,
}

/// The 512 bytes in front of a container's body: text in fields between colons, filled up with
/// spaces (`cl_cvdparse` in libclamav/cvd.c).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Header {
    /// Database version, for example 27821.
    pub version: u64,
    /// Number of signatures.
    pub signatures: u64,
    /// The ClamAV functionality level that the database needs.
    pub functionality_level: u64,
    /// When it was built: the ninth field in seconds, and to the minute where an old header has
    /// only the text.
    pub built: Timestamp,
    /// MD5 of everything after the header; `None` where it says `X`, as in a `.cld`.
    pub md5: Option<[u8; 16]>,
    /// Talos's RSA signature of that MD5, in ClamAV's encoding; `None` where it says `X`.
    pub signature: Option<String>,
    /// Who built it.
    pub builder: String,
}

impl Header {
    /// Parses a header. Fields after the ninth are ignored, as ClamAV does.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let text = header_text(bytes)?;
        let fields: Vec<&str> = text.split(':').collect();
        let [
            _magic,
            date,
            version,
            signatures,
            level,
            md5,
            signature,
            builder,
            rest @ ..,
        ] = fields.as_slice()
        else {
            return Err(HeaderError::Fields {
                found: fields.len(),
            });
        };
        Ok(Self {
            version: number("version", version)?,
            signatures: number("number of signatures", signatures)?,
            functionality_level: number("functionality level", level)?,
            built: build_time(date, rest.first().copied())?,
            md5: header_md5(md5)?,
            signature: header_signature(signature)?,
            builder: (*builder).to_owned(),
        })
    }

    /// Reads and parses only the header, where the version is all that is wanted.
    pub fn read(mut source: impl Read) -> Result<Self, ContainerError> {
        Ok(Self::parse(&header_bytes(&mut source)?)?)
    }
}

/// The bytes are not a ClamAV header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It is some other kind of file.
    #[error("they do not begin with `ClamAV-VDB:`")]
    Magic,
    /// A header is text, filled up with spaces.
    #[error("byte {at} is not printable ASCII")]
    NotText {
        /// Offset of the first such byte.
        at: usize,
    },
    /// Too few fields.
    #[error("they have {found} fields between colons, expected 9, or 8 in an old file")]
    Fields {
        /// How many there are.
        found: usize,
    },
    /// A field has something else than it may.
    #[error("the {field} is `{text}`, expected {expected}")]
    Field {
        /// Which one.
        field: &'static str,
        /// What it has.
        text: String,
        /// What it may have.
        expected: &'static str,
    },
}

/// `NAME.info`: which members there are, and what Talos signs (`cli_loadinfo` in
/// libclamav/readdb.c).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Info {
    /// The members in the order of the list, each name once.
    pub members: Vec<Member>,
    /// Its own name as a member.
    name: String,
    text: String,
    /// Where the `DSIG:` line begins, if there is one.
    signature_at: Option<usize>,
}

impl Info {
    /// The base name of the database that it describes: `daily` for `daily.info`. No signature covers it.
    pub fn base(&self) -> &str {
        self.name.strip_suffix(INFO_SUFFIX).unwrap_or(&self.name)
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the signature is over: the text up to and with the newline before `DSIG:`, all of it if
    /// there is no such line.
    pub fn signed(&self) -> &str {
        &self.text[..self.signature_at.unwrap_or(self.text.len())]
    }

    /// The signature of the `DSIG:` line in ClamAV's encoding; `None` if there is no such line, as
    /// in a `.cud`.
    pub fn signature(&self) -> Option<&str> {
        let line = &self.text[self.signature_at?..];
        Some(line.strip_prefix(SIGNATURE_PREFIX)?.trim_end_matches('\n'))
    }
}

/// One member of a container.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Member {
    /// Its name: printable ASCII without a slash.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of its content.
    pub sha256: Digest,
}

/// A container is not whole, or not genuine. A `String` is the name of the member in question.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The name is not that of a container.
    #[error("its name is not that of a container")]
    Kind,
    /// The name has the extension of another kind of container.
    #[error("it is a .{0} under another name; rename it")]
    Renamed(&'static str),
    /// The file could not be read: ours, not the file's fault.
    #[error("cannot read the container")]
    Read(#[source] io::Error),
    /// The file ends too early, in the part that is named.
    #[error("the container ends in {0}: it was cut off, or is still being written")]
    Cut(String),
    /// The first 512 bytes are no header.
    #[error("the first 512 bytes are not a ClamAV header")]
    Header(#[from] HeaderError),
    /// The gzip stream cannot be inflated, or its CRC or length is wrong.
    #[error("the gzip stream is damaged")]
    Gzip(#[source] io::Error),
    /// Something follows the end of the gzip stream or of the tar, whichever is named.
    #[error("something follows the end of the {0}, expected the end of the file")]
    Trailing(&'static str),
    /// A member's tar header cannot be used.
    #[error("{place} is damaged: {reason}")]
    TarHeader {
        /// Which one.
        place: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The bytes that fill a member's last block are not zero.
    #[error("the padding after member {0} is not zero")]
    Padding(String),
    /// A member's name occurs twice.
    #[error("member {0} is there twice")]
    Duplicate(String),
    /// There are too many members to be real.
    #[error("there are more than {MEMBERS_MAX} members")]
    MembersMax,
    /// A member is too large to be real.
    #[error("member {member} says it has {size} bytes, the limit is {max}")]
    MemberBytesMax {
        /// Its name.
        member: String,
        /// What its tar header says.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// The body is too large to be real.
    #[error("the body has more than {max} bytes")]
    BodyBytesMax {
        /// The limit.
        max: u64,
    },
    /// There is no `.info`.
    #[error("there is no `.info` member: it was cut off, or is not a ClamAV database")]
    NoInfo,
    /// A line of `.info` cannot be used.
    #[error("line {line} of {member} is wrong: {reason}")]
    Info {
        /// The name of the `.info` member.
        member: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Header and `.info` disagree, as after a change of the header.
    #[error("the {field} is `{header}` in the header, and `{info}` in the first line of `.info`")]
    HeaderDiffers {
        /// Which field.
        field: &'static str,
        /// What the header has.
        header: String,
        /// What `.info` has.
        info: String,
    },
    /// `.info` lists a member that is not there, as in a file cut between two members.
    #[error("`.info` lists {0}, which is not there: the file was cut off, or is not complete")]
    Missing(String),
    /// A member is there that `.info` does not list.
    #[error("member {0} is not listed in `.info`")]
    Unlisted(String),
    /// A member has another size or content than `.info` says.
    #[error(
        "member {} has {} bytes with SHA-256 {}, `.info` says {} bytes with SHA-256 {}",
        listed.name, found.size, found.sha256, listed.size, listed.sha256
    )]
    MemberDiffers {
        /// The member as it is.
        found: Box<Member>,
        /// The member as `.info` has it.
        listed: Box<Member>,
    },
    /// A `.cvd` names no MD5 of its body.
    #[error("the header of a .cvd must have the MD5 of the body, this one has X")]
    NoMd5,
    /// The body is not the one that the header names.
    #[error(
        "the body has MD5 {}, the header says {}",
        hex::encode(found),
        hex::encode(listed)
    )]
    Md5 {
        /// What it has.
        found: [u8; 16],
        /// What the header says.
        listed: [u8; 16],
    },
    /// A signature is missing or does not verify.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

/// How much is read at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// First byte of a gzip stream, which no member's name begins with.
const GZIP_MAGIC: u8 = 0x1f;

impl ContainerError {
    /// Whether the defect concerns only how the container is laid out: a limit of ours, padding, a tar
    /// header, the end, or an additional member that is no database.
    fn is_layout(&self) -> bool {
        match self {
            Self::Cut(_)
            | Self::Gzip(_)
            | Self::Trailing(_)
            | Self::TarHeader { .. }
            | Self::Padding(_)
            | Self::MembersMax
            | Self::MemberBytesMax { .. }
            | Self::BodyBytesMax { .. } => true,
            Self::Unlisted(member) => !looks_like_a_database(member),
            Self::Kind
            | Self::Renamed(_)
            | Self::Read(_)
            | Self::Header(_)
            | Self::Duplicate(_)
            | Self::NoInfo
            | Self::Info { .. }
            | Self::HeaderDiffers { .. }
            | Self::Missing(_)
            | Self::MemberDiffers { .. }
            | Self::NoMd5
            | Self::Md5 { .. }
            | Self::Signature(_) => false,
        }
    }
}

/// What one pass over a container found.
#[derive(Debug)]
struct Contents {
    kind: DatabaseKind,
    header: Header,
    info: Info,
    /// Why it is not whole.
    defect: Option<ContainerError>,
}

impl Contents {
    /// Reads a container to its end.
    ///
    /// # Errors
    ///
    /// If the source cannot be read, header or `.info` is missing or unusable, or they contradict each
    /// other or the body. Any other defect is in the result.
    fn read(
        kind: DatabaseKind,
        mut source: impl Read,
        body_bytes_max: u64,
    ) -> Result<Self, ContainerError> {
        if !matches!(
            kind,
            DatabaseKind::Cvd | DatabaseKind::Cld | DatabaseKind::Cud
        ) {
            return Err(ContainerError::Kind);
        }
        let bytes = header_bytes(&mut source)?;
        let header = Header::parse(&bytes)?;
        match (kind, header.md5, &header.signature) {
            (DatabaseKind::Cvd, None, None) => return Err(ContainerError::Renamed("cld or .cud")),
            (DatabaseKind::Cvd, None, Some(_)) => return Err(ContainerError::NoMd5),
            (DatabaseKind::Cld | DatabaseKind::Cud, Some(_), Some(_)) => {
                return Err(ContainerError::Renamed("cvd"));
            }
            (DatabaseKind::Cld, Some(_), None) => return Err(ContainerError::Renamed("cud")),
            (_, _, _) => {}
        }
        let hashed = Hashed {
            source,
            md5: header.md5.map(|_| Md5::new()),
        };
        let mut body = BufReader::with_capacity(BUFFER_BYTES, hashed);
        let mut members = Members::default();
        let whole = match read_body(&mut body, body_bytes_max, &mut members) {
            Err(ContainerError::Read(error)) => return Err(ContainerError::Read(error)),
            whole => whole,
        };
        let info = match members.info.take() {
            Some(info) => Info::parse(&info.name, info.text),
            None => Err(ContainerError::NoInfo),
        };
        let (info, whole) = match (info, whole) {
            // The first defect: a missing `.info` is its consequence.
            (Err(_), Err(defect)) => return Err(defect),
            (info, whole) => (info?, whole),
        };
        if kind == DatabaseKind::Cud && info.signature().is_some() {
            return Err(ContainerError::Renamed("cld")); // clamd refuses it under this name
        }
        compare_header(kind, header_text(&bytes)?, &info)?;
        members.match_list(&info)?;
        let defect = whole.and_then(|()| members.are_complete(&info)).err();
        if let Some(listed) = header.md5 {
            // The MD5 covers also what was not read because of a defect.
            io::copy(&mut body, &mut io::sink()).map_err(ContainerError::Read)?;
            let found = body.into_inner().md5.expect("there is one to compare");
            let found = found.finalize().into();
            if found != listed {
                return Err(defect.unwrap_or(ContainerError::Md5 { found, listed }));
            }
        }
        Ok(Self {
            kind,
            header,
            info,
            defect,
        })
    }

    fn verify(self) -> Result<Summary, ContainerError> {
        let info = || talos::verify_info(self.info.signed(), self.info.signature());
        let (signed_by, verified) = match (self.kind, self.header.md5) {
            (DatabaseKind::Cvd, Some(md5)) => {
                let body = talos::verify_body(&md5, self.header.signature.as_deref());
                (SignedBy::Talos, body.and_then(|()| info()))
            }
            (DatabaseKind::Cld, _) => (SignedBy::Talos, info()),
            (_, _) => (SignedBy::None, Ok(())),
        };
        let is_covered = self.kind == DatabaseKind::Cvd && verified.is_ok();
        let oddity = match self.defect {
            Some(defect) if !(is_covered && defect.is_layout()) => return Err(defect),
            defect => defect,
        };
        verified?;
        Ok(Summary {
            header: self.header,
            info: self.info,
            signed_by,
            oddity,
        })
    }
}

/// Reads the tar, plain or as one gzip stream, up to its first defect.
fn read_body(
    body: &mut impl BufRead,
    body_bytes_max: u64,
    members: &mut Members,
) -> Result<(), ContainerError> {
    let gzip = body.fill_buf().map_err(ContainerError::Read)?.first() == Some(&GZIP_MAGIC);
    if !gzip {
        return Tar::new(body, body_bytes_max).read(members);
    }
    Tar::new(GzDecoder::new(&mut *body), body_bytes_max).read(members)?;
    if !body.fill_buf().map_err(ContainerError::Read)?.is_empty() {
        return Err(ContainerError::Trailing("gzip stream"));
    }
    Ok(())
}

fn header_bytes(source: &mut impl Read) -> Result<[u8; HEADER_BYTES], ContainerError> {
    let mut bytes = [0; HEADER_BYTES];
    source.read_exact(&mut bytes).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            ContainerError::Cut("its header".to_owned())
        } else {
            ContainerError::Read(error)
        }
    })?;
    Ok(bytes)
}

const MAGIC: &str = "ClamAV-VDB:";

/// The header's text without the spaces that fill it up.
fn header_text(bytes: &[u8; HEADER_BYTES]) -> Result<&str, HeaderError> {
    if !bytes.starts_with(MAGIC.as_bytes()) {
        return Err(HeaderError::Magic);
    }
    if let Some(at) = bytes.iter().position(|&b| !is_printable(b)) {
        return Err(HeaderError::NotText { at });
    }
    let text = std::str::from_utf8(bytes).expect("printable ASCII is UTF-8");
    Ok(text.trim_end_matches(' '))
}

fn is_printable(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}

/// ClamAV reads the header's numbers with `atoi` into an `int`: larger ones would mean something
/// else to clamd than to us.
const NUMBER_MAX: u64 = i32::MAX as u64;

fn number(field: &'static str, text: &str) -> Result<u64, HeaderError> {
    let number = digits(text).filter(|number| *number <= NUMBER_MAX);
    number.ok_or_else(|| wrong_field(field, text, "a number below 2^31"))
}

fn wrong_field(field: &'static str, text: &str, expected: &'static str) -> HeaderError {
    HeaderError::Field {
        field,
        text: text.to_owned(),
        expected,
    }
}

/// A decimal number of nothing but digits: `parse` alone takes a plus sign too.
fn digits(text: &str) -> Option<u64> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

fn build_time(date: &str, seconds: Option<&str>) -> Result<Timestamp, HeaderError> {
    let text = seconds.unwrap_or(date);
    let built = match seconds {
        Some(seconds) => digits(seconds)
            .and_then(|seconds| i64::try_from(seconds).ok())
            .and_then(|seconds| Timestamp::from_second(seconds).ok()),
        None => Timestamp::strptime("%d %b %Y %H-%M %z", date).ok(),
    };
    let expected = "seconds, or in an old file a date like `22 Jun 2021 21-34 -0400`";
    built.ok_or_else(|| wrong_field("build time", text, expected))
}

/// What stands for an MD5 or a signature that is not there.
const ABSENT: &str = "X";

fn header_md5(text: &str) -> Result<Option<[u8; 16]>, HeaderError> {
    if text == ABSENT {
        return Ok(None);
    }
    let mut md5 = [0; 16];
    let upper_case = text.bytes().any(|b| b.is_ascii_uppercase()); // ClamAV compares the text
    if upper_case || hex::decode_to_slice(text, &mut md5).is_err() {
        let expected = "32 lower-case hexadecimal digits or X";
        return Err(wrong_field(MD5_FIELD, text, expected));
    }
    Ok(Some(md5))
}

/// [`talos`] decides whether it knows this kind of signature.
fn header_signature(text: &str) -> Result<Option<String>, HeaderError> {
    if text.is_empty() {
        return Err(wrong_field(SIGNATURE_FIELD, text, "a signature or X"));
    }
    Ok((text != ABSENT).then(|| text.to_owned()))
}

/// Passes bytes on, hashing them if the header names their MD5, and hides interrupted reads.
struct Hashed<R> {
    source: R,
    md5: Option<Md5>,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = loop {
            match self.source.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        if let Some(md5) = &mut self.md5 {
            md5.update(&buffer[..read]);
        }
        Ok(read)
    }
}

/// What a tar holds, as far as it was read.
#[derive(Default)]
struct Members {
    info: Option<InfoMember>,
    /// All members, by name.
    found: BTreeMap<String, Member>,
}

/// The first member whose name ends in `.info`.
struct InfoMember {
    name: String,
    text: Vec<u8>,
}

const BLOCK_BYTES: usize = 512;

/// Most blocks of zeros at the end: tools other than ClamAV write two, and then up to 19 to fill a
/// record of 20 blocks.
const END_BLOCKS_MAX: usize = 21;

/// Reads a tar as `tar_addfile` writes it: a member's name, size and checksum in a block of zeros,
/// then its content in whole blocks. ClamAV ends it without blocks of zeros.
struct Tar<R> {
    source: R,
    read_bytes: u64,
    read_bytes_max: u64,
    /// What is being read, for messages.
    place: String,
}

impl<R: Read> Tar<R> {
    fn new(source: R, read_bytes_max: u64) -> Self {
        Self {
            source,
            read_bytes: 0,
            read_bytes_max,
            place: "the first tar header".to_owned(),
        }
    }

    fn read(mut self, members: &mut Members) -> Result<(), ContainerError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Some((name, size)) = self.header()? {
            if members.found.len() == MEMBERS_MAX {
                return Err(ContainerError::MembersMax);
            }
            let is_info = name.ends_with(INFO_SUFFIX) && members.info.is_none();
            let max = if is_info || name == LICENCE {
                INFO_BYTES_MAX
            } else {
                MEMBER_BYTES_MAX
            };
            if size > max {
                return Err(ContainerError::MemberBytesMax {
                    member: name,
                    size,
                    max,
                });
            }
            self.place = format!("member {name}");
            let mut text = Vec::new();
            let mut hasher = Sha256::new();
            let mut left = size;
            while left > 0 {
                let wanted = left.min(BUFFER_BYTES as u64) as usize;
                let piece = &mut buffer[..wanted];
                self.fill_whole(piece)?;
                hasher.update(&*piece);
                if is_info {
                    text.extend_from_slice(piece);
                }
                left -= wanted as u64;
            }
            self.padding(&name, size)?;
            self.place = format!("the tar header after member {name}");
            if is_info {
                let name = name.clone();
                members.info = Some(InfoMember { name, text });
            }
            let sha256 = Digest::finish(hasher);
            let member = Member {
                name: name.clone(),
                size,
                sha256,
            };
            if let Some(first) = members.found.insert(name, member) {
                return Err(ContainerError::Duplicate(first.name));
            }
        }
        Ok(())
    }

    /// The next member's name and size; `None` at the end, which is then the end of the source.
    fn header(&mut self) -> Result<Option<(String, u64)>, ContainerError> {
        let mut block = [0; BLOCK_BYTES];
        if !self.fill(&mut block)? {
            return Ok(None);
        }
        if block == [0; BLOCK_BYTES] {
            let mut blocks = 1;
            while self.fill(&mut block)? {
                blocks += 1;
                if block != [0; BLOCK_BYTES] || blocks > END_BLOCKS_MAX {
                    return Err(ContainerError::Trailing("tar"));
                }
            }
            return Ok(None);
        }
        let wrong = |reason| ContainerError::TarHeader {
            place: self.place.clone(),
            reason,
        };
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum::<u64>()
            - block[148..156].iter().map(|&b| u64::from(b)).sum::<u64>()
            + 8 * u64::from(b' '); // the checksum itself counts as spaces
        if octal(&block[148..156]) != Some(sum) {
            return Err(wrong("its checksum is wrong"));
        }
        if !matches!(block[156], 0 | b'0') {
            return Err(wrong("it is not that of a regular file"));
        }
        let name = block[..100].split(|&b| b == 0).next().unwrap_or_default();
        let name = member_name(name).ok_or_else(|| wrong(NAME_RULE))?;
        let size = octal(&block[124..136]).ok_or_else(|| wrong("its size is not a number"))?;
        Ok(Some((name, size)))
    }

    fn padding(&mut self, name: &str, size: u64) -> Result<(), ContainerError> {
        let used = (size % BLOCK_BYTES as u64) as usize;
        if used == 0 {
            return Ok(());
        }
        let mut block = [0; BLOCK_BYTES];
        let padding = &mut block[used..];
        self.fill_whole(padding)?;
        if padding.iter().any(|&b| b != 0) {
            return Err(ContainerError::Padding(name.to_owned()));
        }
        Ok(())
    }

    fn fill_whole(&mut self, buffer: &mut [u8]) -> Result<(), ContainerError> {
        if self.fill(buffer)? {
            Ok(())
        } else {
            Err(self.cut())
        }
    }

    /// Fills the buffer; false if the source ended before its first byte.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool, ContainerError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.source.read(&mut buffer[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(self.cut()),
                Ok(read) => filled += read,
                Err(error) => return Err(self.failed(error)),
            }
            if filled as u64 > self.read_bytes_max - self.read_bytes {
                return Err(ContainerError::BodyBytesMax {
                    max: self.read_bytes_max,
                });
            }
        }
        self.read_bytes += filled as u64;
        Ok(true)
    }

    /// flate2 reports a damaged stream by these kinds; a plain file has none of them.
    fn failed(&self, source: io::Error) -> ContainerError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            self.cut()
        } else if matches!(
            source.kind(),
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData
        ) {
            ContainerError::Gzip(source)
        } else {
            ContainerError::Read(source)
        }
    }

    fn cut(&self) -> ContainerError {
        ContainerError::Cut(self.place.clone())
    }
}

/// A number as tar writes it: octal digits, then zeros or spaces.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field)
        .ok()?
        .trim_end_matches(['\0', ' ']);
    let octal = text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    octal.then(|| u64::from_str_radix(text, 8).ok())?
}

const NAME_RULE: &str = "the member's name must be printable ASCII without slash or colon";

/// ClamAV refuses slashes; a colon could not be listed.
fn member_name(bytes: &[u8]) -> Option<String> {
    let allowed = |&b: &u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':');
    if bytes.is_empty() || !bytes.iter().all(allowed) {
        return None;
    }
    String::from_utf8(bytes.to_vec()).ok()
}

const INFO_SUFFIX: &str = ".info";
const SIGNATURE_PREFIX: &str = "DSIG:";

impl Info {
    fn parse(name: &str, bytes: Vec<u8>) -> Result<Self, ContainerError> {
        let wrong = |line, reason| ContainerError::Info {
            member: name.to_owned(),
            line,
            reason,
        };
        if let Some(at) = bytes.iter().position(|&b| b != b'\n' && !is_printable(b)) {
            let line = 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count();
            return Err(wrong(line, "it is not printable ASCII"));
        }
        let text = String::from_utf8(bytes).expect("printable ASCII is UTF-8");
        let mut names = BTreeSet::new();
        let mut members = Vec::new();
        let mut signature_at = None;
        let mut at = 0;
        for (index, line) in text.split_inclusive('\n').enumerate() {
            let number = index + 1;
            if signature_at.is_some() {
                return Err(wrong(number, "it follows the signature"));
            } else if index == 0 {
                // the header's copy, compared with the header later
            } else if line.starts_with(SIGNATURE_PREFIX) {
                signature_at = Some(at);
            } else {
                let member = listed_member(line.trim_end_matches('\n'))
                    .ok_or_else(|| wrong(number, "expected NAME:SIZE:SHA256"))?;
                if !names.insert(member.name.clone()) {
                    return Err(wrong(number, "it lists a member for the second time"));
                }
                members.push(member);
            }
            at += line.len();
        }
        if members.is_empty() {
            return Err(wrong(1, "no member is listed after it"));
        }
        if signature_at.is_some() && !text.ends_with('\n') {
            let last = text.lines().count();
            return Err(wrong(last, "it must end with a newline")); // clamd refuses it, too
        }
        Ok(Self {
            members,
            name: name.to_owned(),
            text,
            signature_at,
        })
    }
}

fn listed_member(line: &str) -> Option<Member> {
    let (name, rest) = line.split_once(':')?;
    let (size, sha256) = rest.split_once(':')?;
    Some(Member {
        name: member_name(name.as_bytes())?,
        size: digits(size)?,
        sha256: sha256.parse().ok()?,
    })
}

/// What the header's fields are, in order. ClamAV compares four of them; all come from one text.
const FIELDS: [&str; 9] = [
    "magic",
    "build time",
    "version",
    "number of signatures",
    "functionality level",
    MD5_FIELD,
    SIGNATURE_FIELD,
    "builder",
    "build time in seconds",
];
const MD5_FIELD: &str = "MD5";
const SIGNATURE_FIELD: &str = "signature";

/// Compares the header with the first line of `.info`. That line was written before MD5 and
/// signature were known and has X for both: freshclam copies it into a `.cld`, a signing server
/// fills both into a `.cvd`, and `sigtool --unsigned` the MD5 into a `.cud`.
fn compare_header(kind: DatabaseKind, header: &str, info: &Info) -> Result<(), ContainerError> {
    let line = info
        .text
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches(' ');
    let (mut header, mut line) = (header.split(':'), line.split(':'));
    let mut names = FIELDS.into_iter();
    loop {
        let field = names.next().unwrap_or("field after the last known");
        let (ours, theirs) = (header.next(), line.next());
        let filled_in = match kind {
            DatabaseKind::Cvd => field == MD5_FIELD || field == SIGNATURE_FIELD,
            DatabaseKind::Cud => field == MD5_FIELD,
            DatabaseKind::Cld | DatabaseKind::Sign | DatabaseKind::Loose => false,
        };
        if ours.is_none() && theirs.is_none() {
            return Ok(());
        }
        if ours != theirs && !(filled_in && theirs == Some(ABSENT)) {
            let shown = |value: Option<&str>| value.unwrap_or_default().chars().take(80).collect();
            let (header, info) = (shown(ours), shown(theirs));
            return Err(ContainerError::HeaderDiffers {
                field,
                header,
                info,
            });
        }
    }
}

const LICENCE: &str = "COPYING";

impl Members {
    /// Every member that is there and listed is what the list says.
    fn match_list(&self, info: &Info) -> Result<(), ContainerError> {
        for listed in &info.members {
            if let Some(found) = self.found.get(&listed.name)
                && found != listed
            {
                let (found, listed) = (Box::new(found.clone()), Box::new(listed.clone()));
                return Err(ContainerError::MemberDiffers { found, listed });
            }
        }
        Ok(())
    }

    /// Every member that is listed is there, and none besides.
    fn are_complete(mut self, info: &Info) -> Result<(), ContainerError> {
        for listed in &info.members {
            if self.found.remove(&listed.name).is_none() {
                return Err(ContainerError::Missing(listed.name.clone()));
            }
        }
        let besides = |name: &String| *name != LICENCE && *name != info.name;
        match self.found.into_keys().find(besides) {
            Some(member) => Err(ContainerError::Unlisted(member)),
            None => Ok(()),
        }
    }
}
