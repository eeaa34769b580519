//! ClamAV's database containers: `.cvd`, `.cld` and `.cud`.
//!
//! A container is a 512-byte header, then a tar, plain or as one gzip stream. The member
//! `NAME.info` repeats the header and lists every other member but `COPYING` with its size and
//! SHA-256; Talos signs that list. clamd's own check proves little: it loads a file that was cut
//! between two members, and verifies neither tar checksums nor the gzip trailer. [`check`] accepts
//! only what is whole to its last byte. It cannot see a change in the text of `COPYING` in a plain
//! tar, which nothing covers, nor one in a signature, nor that somebody made a new list: that takes
//! verifying Talos's signature, for which [`Info`] keeps what was signed.
//!
//! The format is that of libclamav/cvd.c (`cl_cvdparse`, `cli_cvdload`, `cli_tgzload`),
//! libclamav/readdb.c (`cli_loadinfo`) and common/tar.c (`tar_addfile`). The tar is read by hand,
//! because a tar library reads past a short member, and shows neither the padding nor what follows
//! the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;
use jiff::Timestamp;
use md5::Md5;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::names::DatabaseKind;

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
/// a digest.
pub const INFO_BYTES_MAX: u64 = 1 << 20;

/// Reads a container to its end and checks that it is whole: the header agrees with the first line
/// of `.info`; the tar and the gzip stream end where the file does; every member that `.info` lists
/// is there once with its size and SHA-256; nothing else is there but `.info` and `COPYING`; and
/// the MD5 in the header, which a `.cvd` must have, is that of the body.
///
/// Signatures are not verified. `kind` says how much of the header `.info` repeats; a kind that is
/// not a container fails for want of a header. Memory is bounded whatever the file says: buffers
/// of 64 KiB, `.info`, and the members' names and digests.
pub fn check(kind: DatabaseKind, source: impl Read) -> Result<Summary, ContainerError> {
    check_within(kind, source, BODY_BYTES_MAX)
}

/// What a whole container says of itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Summary {
    /// Version, number of signatures, build time.
    pub header: Header,
    /// The list of members.
    pub info: Info,
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
    text: String,
    /// Where the `DSIG:` line begins, if there is one.
    signature_at: Option<usize>,
}

impl Info {
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

/// A container is not whole. None of these says anything of Talos's signatures. A `String` is the
/// name of the member in question.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
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
}

/// How much is read at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// First byte of a gzip stream, which no member's name begins with.
const GZIP_MAGIC: u8 = 0x1f;

fn check_within(
    kind: DatabaseKind,
    mut source: impl Read,
    body_bytes_max: u64,
) -> Result<Summary, ContainerError> {
    let bytes = header_bytes(&mut source)?;
    let header = Header::parse(&bytes)?;
    if kind == DatabaseKind::Cvd && header.md5.is_none() {
        return Err(ContainerError::NoMd5);
    }
    let hashed = Hashed {
        source,
        md5: header.md5.map(|_| Md5::new()),
    };
    let mut body = BufReader::with_capacity(BUFFER_BYTES, hashed);
    let gzip = body.fill_buf().map_err(ContainerError::Read)?.first() == Some(&GZIP_MAGIC);
    let contents = if gzip {
        let contents = Tar::new(GzDecoder::new(&mut body), body_bytes_max).contents()?;
        if !body.fill_buf().map_err(ContainerError::Read)?.is_empty() {
            return Err(ContainerError::Trailing("gzip stream"));
        }
        contents
    } else {
        Tar::new(&mut body, body_bytes_max).contents()?
    };
    let (info_name, info_bytes) = contents.info.ok_or(ContainerError::NoInfo)?;
    let info = Info::parse(&info_name, info_bytes)?;
    compare_header(kind, header_text(&bytes)?, &info)?;
    compare_members(&info_name, &info, contents.members)?;
    if let (Some(listed), Some(md5)) = (header.md5, body.into_inner().md5) {
        let found = md5.finalize().into();
        if found != listed {
            return Err(ContainerError::Md5 { found, listed });
        }
    }
    Ok(Summary { header, info })
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

fn header_signature(text: &str) -> Result<Option<String>, HeaderError> {
    let is_digit = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/');
    if text.is_empty() || !text.bytes().all(is_digit) {
        return Err(wrong_field(
            SIGNATURE_FIELD,
            text,
            "digits of a-z A-Z 0-9 + / or X",
        ));
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

/// What a tar holds: the name and text of `.info`, and all members by name.
struct Contents {
    info: Option<(String, Vec<u8>)>,
    members: BTreeMap<String, Member>,
}

const BLOCK_BYTES: usize = 512;

/// Reads a tar as `tar_addfile` writes it: a member's name, size and checksum in a block of zeros,
/// then its content in whole blocks. ClamAV ends it without zero blocks; other tools add some.
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

    fn contents(mut self) -> Result<Contents, ContainerError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut contents = Contents {
            info: None,
            members: BTreeMap::new(),
        };
        while let Some((name, size)) = self.header()? {
            if contents.members.len() == MEMBERS_MAX {
                return Err(ContainerError::MembersMax);
            }
            let is_info = name.ends_with(INFO_SUFFIX) && contents.info.is_none();
            let max = if is_info {
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
                contents.info = Some((name.clone(), text));
            }
            let sha256 = Digest::finish(hasher);
            let member = Member {
                name: name.clone(),
                size,
                sha256,
            };
            if let Some(first) = contents.members.insert(name, member) {
                return Err(ContainerError::Duplicate(first.name));
            }
        }
        Ok(contents)
    }

    /// The next member's name and size; `None` at the end, which is then the end of the source.
    fn header(&mut self) -> Result<Option<(String, u64)>, ContainerError> {
        let mut block = [0; BLOCK_BYTES];
        if !self.fill(&mut block)? {
            return Ok(None);
        }
        if block == [0; BLOCK_BYTES] {
            while self.fill(&mut block)? {
                if block != [0; BLOCK_BYTES] {
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
        Ok(Self {
            members,
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

fn compare_members(
    info_name: &str,
    info: &Info,
    mut members: BTreeMap<String, Member>,
) -> Result<(), ContainerError> {
    for listed in &info.members {
        let Some(found) = members.remove(&listed.name) else {
            return Err(ContainerError::Missing(listed.name.clone()));
        };
        if found != *listed {
            let (found, listed) = (Box::new(found), Box::new(listed.clone()));
            return Err(ContainerError::MemberDiffers { found, listed });
        }
    }
    match members
        .into_keys()
        .find(|name| name != info_name && name != LICENCE)
    {
        Some(member) => Err(ContainerError::Unlisted(member)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;
    use std::io::Write;
    use std::path::PathBuf;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    /// A `.cud` in the making: header, text of `.info`, all other members.
    #[derive(Clone)]
    struct Cud {
        header: String,
        info: String,
        members: Vec<(String, Vec<u8>)>,
    }

    const HEADER: &str = "ClamAV-VDB:22 Nov 2026 06-05 +0000:7:3:90:X:X:lab:1795327500";

    /// Three members, the last with a content of whole blocks, and `.info` after the first.
    fn cud() -> Cud {
        let whole_blocks =
            "Lab.N-1:0:*:6c61627465737431\n".repeat(40).into_bytes()[..1024].to_vec();
        let members = vec![
            ("COPYING".to_owned(), b"free\n".to_vec()),
            (
                "lab.hdb".to_owned(),
                b"aa15bcf478d165efd2065190eb473bcb:5:Lab.H-1\n".to_vec(),
            ),
            ("lab.ign2".to_owned(), Vec::new()),
            ("lab.ndb".to_owned(), whole_blocks),
        ];
        let mut info = format!("{HEADER}\n");
        for (name, content) in &members[1..] {
            info += &format!("{name}:{}:{}\n", content.len(), Digest::of(content));
        }
        Cud {
            header: HEADER.to_owned(),
            info,
            members,
        }
    }

    impl Cud {
        fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
            change(&mut self);
            self
        }

        fn header_block(&self) -> Vec<u8> {
            format!("{:512}", self.header).into_bytes()
        }

        fn tar(&self) -> Vec<u8> {
            let mut members: Vec<(&str, &[u8])> = self
                .members
                .iter()
                .map(|(name, content)| (&**name, &**content))
                .collect();
            members.insert(1, ("lab.info", self.info.as_bytes()));
            members
                .iter()
                .flat_map(|(name, content)| tar_member(name, content))
                .collect()
        }

        fn plain(&self) -> Vec<u8> {
            [self.header_block(), self.tar()].concat()
        }

        fn gzip(&self) -> Vec<u8> {
            [self.header_block(), gzip(&self.tar())].concat()
        }
    }

    fn tar_member(name: &str, content: &[u8]) -> Vec<u8> {
        let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
        [
            &tar_header(name, content.len() as u64)[..],
            content,
            &padding,
        ]
        .concat()
    }

    fn tar_header(name: &str, size: u64) -> [u8; 512] {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        let size = format!("{size:o}");
        block[124..124 + size.len()].copy_from_slice(size.as_bytes());
        sealed(block)
    }

    fn sealed(mut block: [u8; 512]) -> [u8; 512] {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0\0").as_bytes());
        block
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn whole(kind: DatabaseKind, bytes: &[u8]) -> Summary {
        check(kind, bytes).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    /// Checks a `.cud`, which must be refused with this text somewhere in the message.
    fn refused(bytes: &[u8], because: &str) {
        refused_as(DatabaseKind::Cud, bytes, because);
    }

    fn refused_as(kind: DatabaseKind, bytes: &[u8], because: &str) {
        let message = match check(kind, bytes) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => chain(&error),
        };
        assert!(message.contains(because), "{message}, expected: {because}");
    }

    fn chain(error: &dyn Error) -> String {
        let source = error.source().map(|source| format!(": {}", chain(source)));
        format!("{error}{}", source.unwrap_or_default())
    }

    #[test]
    fn a_whole_container_is_accepted_plain_and_gzipped() {
        let cud = cud();
        for bytes in [cud.plain(), cud.gzip()] {
            let summary = whole(DatabaseKind::Cud, &bytes);
            assert_eq!(summary.header.version, 7);
            assert_eq!(summary.header.signatures, 3);
            assert_eq!(summary.header.functionality_level, 90);
            assert_eq!(summary.header.built.as_second(), 1_795_327_500);
            assert_eq!(summary.header.builder, "lab");
            let members: Vec<_> = summary
                .info
                .members
                .iter()
                .map(|m| (m.name.as_str(), m.size))
                .collect();
            assert_eq!(
                members,
                [("lab.hdb", 43), ("lab.ign2", 0), ("lab.ndb", 1024)]
            );
            assert_eq!(Header::read(bytes.as_slice()).unwrap(), summary.header);
        }
    }

    #[test]
    fn a_cld_has_the_same_form() {
        whole(DatabaseKind::Cld, &cud().plain());
        whole(DatabaseKind::Cld, &cud().gzip());
    }

    #[test]
    fn zero_blocks_may_end_the_tar() {
        let padded = [cud().plain(), vec![0; 1024]].concat();
        whole(DatabaseKind::Cud, &padded);
        refused(&padded[..padded.len() - 1], "it was cut off");
        refused(
            &[padded, vec![0; 511], vec![1]].concat(),
            "something follows the end of the tar",
        );
    }

    #[test]
    fn the_order_of_members_does_not_matter() {
        whole(
            DatabaseKind::Cud,
            &cud().with(|cud| cud.members.reverse()).plain(),
        );
    }

    #[test]
    fn reading_in_small_pieces_makes_no_difference() {
        struct Dribble<'a>(&'a [u8], bool);
        impl Read for Dribble<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.1 = !self.1;
                if self.1 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let one = buffer.len().min(1);
                self.0.read(&mut buffer[..one])
            }
        }
        for bytes in [cud().plain(), cud().gzip()] {
            let dribbled = check(DatabaseKind::Cud, Dribble(&bytes, false)).unwrap();
            assert_eq!(dribbled, whole(DatabaseKind::Cud, &bytes));
        }
    }

    #[test]
    fn a_read_error_does_not_blame_the_file() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::PermissionDenied.into())
            }
        }
        for bytes in [cud().plain(), cud().gzip()] {
            for read in [0, 100, 512, 600, bytes.len() - 1, bytes.len()] {
                let result = check(DatabaseKind::Cud, bytes[..read].chain(Broken));
                assert!(
                    matches!(result, Err(ContainerError::Read(_))),
                    "{read}: {result:?}"
                );
            }
        }
    }

    #[test]
    fn a_file_cut_between_two_members_is_refused() {
        let bytes = cud().plain();
        let tar_header_at = |name: &str| {
            let at = bytes
                .chunks(512)
                .position(|block| block.starts_with(&[name.as_bytes(), &[0]].concat()));
            &bytes[..at.unwrap() * 512]
        };
        refused(tar_header_at("COPYING"), "there is no `.info` member");
        refused(tar_header_at("lab.info"), "there is no `.info` member");
        refused(
            tar_header_at("lab.hdb"),
            "lists lab.hdb, which is not there",
        );
        refused(
            tar_header_at("lab.ign2"),
            "lists lab.ign2, which is not there",
        );
        refused(
            tar_header_at("lab.ndb"),
            "lists lab.ndb, which is not there",
        );
        let cut_inside = &tar_header_at("lab.ndb").len() + 512;
        refused(&bytes[..cut_inside], "the container ends in member lab.ndb");
        refused(
            &bytes[..cut_inside - 1],
            "the container ends in the tar header after member lab.ign2",
        );
        refused(&bytes[..100], "the container ends in its header");
        refused(&[], "the container ends in its header");
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        for bytes in [cud().plain(), cud().gzip()] {
            for length in 0..bytes.len() {
                assert!(
                    check(DatabaseKind::Cud, &bytes[..length]).is_err(),
                    "{length}"
                );
            }
        }
    }

    #[test]
    fn a_changed_byte_is_refused_anywhere_but_in_the_licence() {
        let bytes = cud().plain();
        let licence = 1024..1024 + "free\n".len();
        for at in 0..bytes.len() {
            for mask in [0x01, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= mask;
                let result = check(DatabaseKind::Cud, changed.as_slice());
                assert_eq!(
                    result.is_ok(),
                    licence.contains(&at),
                    "{at} {mask}: {result:?}"
                );
            }
        }
    }

    #[test]
    fn a_changed_byte_in_a_gzip_stream_is_refused() {
        let bytes = cud().gzip();
        for at in HEADER_BYTES + 10..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0xff;
            assert!(
                check(DatabaseKind::Cud, changed.as_slice()).is_err(),
                "{at}"
            );
        }
        let mut crc = bytes.clone();
        crc[bytes.len() - 8] ^= 1;
        refused(
            &crc,
            "the gzip stream is damaged: corrupt gzip stream does not have a matching checksum",
        );
    }

    #[test]
    fn nothing_may_follow_the_end() {
        let (plain, stream) = (cud().plain(), cud().gzip());
        refused(&[&plain[..], b"x"].concat(), "it was cut off");
        refused(
            &[&plain[..], &[b'x'; 512]].concat(),
            "its checksum is wrong",
        );
        refused(
            &[&stream[..], b"x"].concat(),
            "something follows the end of the gzip stream",
        );
        refused(
            &[&stream[..], &[0; 512]].concat(),
            "something follows the end of the gzip stream",
        );
        let second = gzip(&tar_member("lab.cfg", b"x\n"));
        refused(
            &[stream, second].concat(),
            "something follows the end of the gzip stream",
        );
    }

    #[test]
    fn info_and_members_must_agree() {
        let change = |change: fn(&mut Cud)| cud().with(change).plain();
        refused(
            &change(|cud| cud.members.push(("lab.pad".to_owned(), vec![0; 9]))),
            "member lab.pad is not listed in `.info`",
        );
        refused(
            &change(|cud| drop(cud.members.remove(2))),
            "lists lab.ign2, which is not there",
        );
        refused(
            &change(|cud| cud.members.push(cud.members[1].clone())),
            "member lab.hdb is there twice",
        );
        refused(
            &change(|cud| cud.members.push(("lab.info".to_owned(), Vec::new()))),
            "member lab.info is there twice",
        );
        refused(
            &change(|cud| cud.members.push(("other.info".to_owned(), Vec::new()))),
            "member other.info is not listed in `.info`",
        );
        refused(
            &change(|cud| cud.members[1].1[0] ^= 1),
            "member lab.hdb has 43 bytes with SHA-256",
        );
        refused(
            &change(|cud| cud.members[1].1.push(b'x')),
            "member lab.hdb has 44 bytes",
        );
    }

    #[test]
    fn info_must_be_a_list_of_members() {
        let with_info = |change: fn(&mut String)| cud().with(|cud| change(&mut cud.info)).plain();
        let line = format!("lab.cfg:1:{}\n", Digest::of(b"x"));
        refused(
            &cud().with(|cud| cud.info += &line.repeat(2)).plain(),
            "line 6 of lab.info is wrong: it lists a member for the second time",
        );
        refused(
            &with_info(|info| *info += "\n"),
            "line 5 of lab.info is wrong: expected NAME:SIZE:SHA256",
        );
        refused(
            &with_info(|info| *info += "a/b:1:00\n"),
            "line 5 of lab.info is wrong",
        );
        refused(
            &with_info(|info| *info = info.replace(":43:", ":+43:")),
            "line 2 of lab.info is wrong",
        );
        refused(
            &with_info(|info| *info = info.replace(".ndb", "\u{7}")),
            "line 4 of lab.info is wrong: it is not printable",
        );
        refused(
            &with_info(|info| *info = format!("{HEADER}\n")),
            "no member is listed",
        );
        refused(&with_info(String::clear), "no member is listed");
        refused(
            &with_info(|info| *info += "DSIG:abc\nlab.cfg:0:00\n"),
            "line 6 of lab.info is wrong: it follows the signature",
        );
    }

    #[test]
    fn what_is_signed_ends_with_the_newline_before_the_signature() {
        let unsigned = whole(DatabaseKind::Cud, &cud().plain()).info;
        assert_eq!(
            (unsigned.signed(), unsigned.signature()),
            (unsigned.text(), None)
        );

        let signed = cud().with(|cud| cud.info += "DSIG:aZ09+/\n");
        let info = whole(DatabaseKind::Cld, &signed.plain()).info;
        assert_eq!(
            (info.signed(), info.signature()),
            (unsigned.text(), Some("aZ09+/"))
        );
        assert_eq!(info.text(), signed.info);
    }

    #[test]
    fn the_header_must_agree_with_info() {
        let header = |from: &str, to: &str| {
            cud()
                .with(|cud| cud.header = HEADER.replacen(from, to, 1))
                .plain()
        };
        refused(
            &header(":7:", ":8:"),
            "the version is `8` in the header, and `7` in the first line of `.info`",
        );
        refused(&header(":3:", ":4:"), "the number of signatures is `4`");
        refused(&header(":90:", ":91:"), "the functionality level is `91`");
        refused(&header("06-05", "06-06"), "the build time is");
        refused(&header(":lab:", ":lob:"), "the builder is `lob`");
        refused(&header("7500", "7501"), "the build time in seconds is");
        refused(
            &header(":1795327500", ""),
            "the build time in seconds is ``",
        );
        refused(
            &header("7500", "7500:more"),
            "the field after the last known is `more`",
        );
        refused(&header(":X:X:", ":X:abc:"), "the signature is `abc`");
    }

    #[test]
    fn the_md5_must_be_that_of_the_body() {
        let filled_in = |signature: &str, body: &[u8]| {
            let md5 = hex::encode(Md5::digest(body));
            let header = HEADER.replace(":X:X:", &format!(":{md5}:{signature}:"));
            cud().with(|cud| cud.header = header)
        };
        for signature in ["X", "abc"] {
            whole(
                DatabaseKind::Cvd,
                &filled_in(signature, &gzip(&cud().tar())).gzip(),
            );
        }
        let unsigned = filled_in("X", &cud().tar()); // as `sigtool --unsigned` makes it
        whole(DatabaseKind::Cud, &unsigned.plain());
        refused(&filled_in("X", b"other").plain(), "the body has MD5");
        refused_as(DatabaseKind::Cld, &unsigned.plain(), "the MD5 is");
        refused_as(
            DatabaseKind::Cvd,
            &cud().gzip(),
            "the header of a .cvd must have the MD5",
        );
    }

    #[test]
    fn a_member_is_a_regular_file_without_a_path() {
        for name in [
            "../lab.cfg",
            "/lab.cfg",
            "lab/x.ndb",
            "lab:x",
            "lab x",
            "lab\u{7f}",
            "l\u{e4}b",
        ] {
            let bytes = cud()
                .with(|cud| cud.members.push((name.to_owned(), vec![])))
                .plain();
            refused(
                &bytes,
                "the tar header after member lab.ndb is damaged: the member's name must be",
            );
        }
        for kind in *b"1257xgLK" {
            let mut block = tar_header("lab.cfg", 0);
            block[156] = kind;
            refused(
                &[&cud().plain()[..], &sealed(block)].concat(),
                "it is not that of a regular file",
            );
        }
        for (field, size) in [
            (124..136, "9"),
            (124..136, ""),
            (124..136, " 1 2"),
            (0..100, ""),
        ] {
            let mut block = tar_header("lab.cfg", 0);
            block[field.clone()].fill(0);
            block[field.start..][..size.len()].copy_from_slice(size.as_bytes());
            refused(&[&cud().plain()[..], &sealed(block)].concat(), "is damaged");
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_goes_off() {
        let announced =
            |name: &str, size| [&cud().header_block()[..], &tar_header(name, size)].concat();
        refused(
            &announced("lab.ndb", MEMBER_BYTES_MAX + 1),
            "the limit is 1073741824",
        );
        refused(
            &announced("lab.ndb", (1 << 36) - 1),
            "the limit is 1073741824",
        );
        refused(
            &announced("lab.info", INFO_BYTES_MAX + 1),
            "the limit is 1048576",
        );

        let many: Vec<u8> = (0..=MEMBERS_MAX)
            .flat_map(|number| tar_member(&format!("lab{number}.ndb"), b""))
            .collect();
        refused(
            &[cud().header_block(), many].concat(),
            "there are more than 4096 members",
        );

        let zeros = vec![0; 1 << 20];
        let big_member = [cud().tar(), tar_member("lab.pad", &zeros)].concat();
        let zero_blocks = [cud().tar(), zeros].concat();
        for body in [big_member, zero_blocks] {
            let bytes = [cud().header_block(), gzip(&body)].concat();
            assert!(bytes.len() < 8192);
            let result = check_within(DatabaseKind::Cud, bytes.as_slice(), 1 << 20);
            assert!(
                matches!(result, Err(ContainerError::BodyBytesMax { .. })),
                "{result:?}"
            );
        }
    }

    fn header(text: &str) -> Result<Header, HeaderError> {
        Header::parse(
            format!("{text:512}")
                .as_bytes()
                .try_into()
                .expect("the text fits"),
        )
    }

    #[test]
    fn an_old_header_has_no_seconds() {
        let old = header("ClamAV-VDB:22 Jun 2021 21-34 -0400:6:14:81:X:X:nervous").unwrap();
        assert_eq!(old.built.to_string(), "2021-06-23T01:34:00Z");
        let new =
            header("ClamAV-VDB:22 Jun 2021 21-34 -0400:6:14:81:X:X:nervous:1624412045").unwrap();
        assert_eq!(new.built.to_string(), "2021-06-23T01:34:05Z");
        let later = header("ClamAV-VDB:some day:6:14:81:X:X:nervous:1624412045:more").unwrap();
        assert_eq!(later, new);
    }

    #[test]
    fn a_hostile_header_is_an_error() {
        let with =
            |from: &str, to: &str| chain(&header(&HEADER.replacen(from, to, 1)).unwrap_err());
        for number in [
            "-1",
            "+7",
            "",
            " 7",
            "7x",
            "2147483648",
            "99999999999999999999",
        ] {
            let message = with(":7:", &format!(":{number}:"));
            assert!(
                message.starts_with(&format!("the version is `{number}`, expected a number")),
                "{message}"
            );
        }
        for md5 in [
            "x",
            "",
            "00",
            &"g".repeat(32),
            &"A".repeat(32),
            &"0".repeat(33),
        ] {
            assert!(
                with(":X:X:", &format!(":{md5}:X:")).starts_with("the MD5 is"),
                "{md5}"
            );
        }
        for signature in ["", "a b", "a-b", "="] {
            assert!(with(":X:X:", &format!(":X:{signature}:")).starts_with("the signature is"));
        }
        for seconds in ["", "-1", "x", "9223372036854775808", "9223372036854775807"] {
            assert!(
                with("1795327500", seconds).starts_with("the build time is"),
                "{seconds}"
            );
        }
        for date in [
            "",
            "some day",
            "22 Nov 2026 06:05 +0000",
            "31 Feb 2026 06-05 +0000",
        ] {
            let old = HEADER
                .replace("22 Nov 2026 06-05 +0000", date)
                .replace(":1795327500", "");
            assert!(header(&old).is_err(), "{date}");
        }
        assert_eq!(
            with(":X:X:lab:1795327500", ":X:X"),
            "they have 7 fields between colons, expected 9, or 8 in an old file"
        );
        assert_eq!(
            with("ClamAV", "Clamav"),
            "they do not begin with `ClamAV-VDB:`"
        );
        assert_eq!(with("lab", "l\tb"), "byte 47 is not printable ASCII");
        for byte in 0..=u8::MAX {
            assert!(Header::parse(&[byte; 512]).is_err());
        }
    }

    /// The folder of real databases; `None`, with a word why, where it is not there.
    fn real_databases() -> Option<PathBuf> {
        let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/clamav-testfiles");
        let folder = std::env::var_os("CLAMCAST_TESTFILES").map_or(beside.into(), PathBuf::from);
        if folder.is_dir() {
            return Some(folder);
        }
        let why = format!(
            "no real databases in {}; CLAMCAST_TESTFILES can name them",
            folder.display()
        );
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
        eprintln!("skipped: {why}");
        None
    }

    #[test]
    fn every_real_cvd_is_whole() {
        let Some(folder) = real_databases() else {
            return;
        };
        for (file, version, signatures, level, members, built) in [
            ("bytecode.cvd", 19, 3, 51, 4, "2010-05-14T13:57:10Z"),
            ("test-1.cvd", 1, 0, 81, 2, "2021-06-22T18:58:22Z"),
            ("test-2.cvd", 2, 0, 81, 2, "2021-06-22T20:55:01Z"),
            ("test-3.cvd", 3, 11, 81, 18, "2021-06-23T00:40:09Z"),
            ("test-4.cvd", 4, 12, 81, 18, "2021-06-23T01:29:36Z"),
            ("test-5.cvd", 5, 13, 81, 18, "2021-06-23T01:31:42Z"),
            ("test-6.cvd", 6, 14, 81, 18, "2021-06-23T01:34:05Z"),
        ] {
            let bytes = std::fs::read(folder.join(file)).unwrap();
            let Summary { header, info } = whole(DatabaseKind::Cvd, &bytes);
            assert_eq!(
                (
                    header.version,
                    header.signatures,
                    header.functionality_level,
                    info.members.len()
                ),
                (version, signatures, level, members),
                "{file}"
            );
            assert_eq!(header.built.to_string(), built);
            assert_eq!(Header::read(bytes.as_slice()).unwrap(), header);
            assert!(header.signature.is_some());
            assert_eq!(
                format!("{}DSIG:{}\n", info.signed(), info.signature().unwrap()),
                info.text()
            );
        }
    }

    #[test]
    fn a_changed_byte_in_a_real_cvd_is_refused_anywhere_but_in_its_signature() {
        let Some(folder) = real_databases() else {
            return;
        };
        let bytes = std::fs::read(folder.join("test-6.cvd")).unwrap();
        let signature = Header::read(bytes.as_slice()).unwrap().signature.unwrap();
        let start = bytes
            .windows(signature.len())
            .position(|w| w == signature.as_bytes())
            .unwrap();
        for at in (0..start)
            .chain(start + signature.len()..bytes.len())
            .step_by(3)
        {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(
                check(DatabaseKind::Cvd, changed.as_slice()).is_err(),
                "{at}"
            );
        }
    }
}
