//! `header`, `tar`, `info` and `dsig`: database containers, compared with a second reader that holds
//! everything in memory.

use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};

use arbitrary::Unstructured;
use clamcast_proto::Digest;
use clamcast_proto::container::{ContainerError, HEADER_BYTES, Header, Summary, check};
use clamcast_proto::manifest::SignedBy;
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::talos::{SignatureError, verify_body, verify_info};
use flate2::Compression;
use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;
use md5::{Digest as _, Md5};

use crate::render;

const BLOCK_BYTES: usize = 512;

/// The header of the containers that the targets build, before the MD5 is known.
const HEADER: &str = "ClamAV-VDB:22 Nov 2026 06-05 +0000:7:3:90:X:X:lab:1795327500";

/// Parses the input, filled up with spaces or cut to the length of a header.
pub fn header(bytes: &[u8]) -> bool {
    let mut block = [b' '; HEADER_BYTES];
    let length = bytes.len().min(HEADER_BYTES);
    block[..length].copy_from_slice(&bytes[..length]);
    let header = match Header::parse(&block) {
        Ok(header) => header,
        Err(error) => {
            let text = render(&error);
            assert!(!text.contains(char::is_control), "{text:?}");
            return false;
        }
    };
    let limit = i32::MAX as u64; // clamd reads the numbers with atoi
    let numbers = [
        header.version,
        header.signatures,
        header.functionality_level,
    ];
    assert!(numbers.iter().all(|number| *number <= limit), "{header:?}");
    assert!(!header.builder.contains(':'));
    assert_eq!(Header::read(&block[..]).ok().as_ref(), Some(&header));

    // The facts, written as a header, are the same facts.
    let Header {
        version,
        signatures,
        functionality_level,
        built,
        md5,
        signature,
        builder,
    } = &header;
    let md5 = md5.map_or("X".to_owned(), hex::encode);
    let signature = signature.as_deref().unwrap_or("X");
    let seconds = built.as_second();
    if seconds >= 0 {
        let text = format!(
            "ClamAV-VDB:date:{version}:{signatures}:{functionality_level}:{md5}:{signature}:{builder}:{seconds}"
        );
        // The number of seconds may be longer than the date that it replaces.
        if let Ok(again) = <[u8; HEADER_BYTES]>::try_from(format!("{text:512}").as_bytes()) {
            assert_eq!(Header::parse(&again).ok().as_ref(), Some(&header));
        }
    }
    true
}

/// Checks the input as a container, as the body of one, as the body inside gzip, and as
/// instructions that build a container and damage it.
pub fn tar(bytes: &[u8]) -> bool {
    let Some((&mode, rest)) = bytes.split_first() else {
        return false;
    };
    let kind = [DatabaseKind::Cvd, DatabaseKind::Cld, DatabaseKind::Cud][usize::from(mode % 3)];
    match mode / 3 % 4 {
        0 => judge(kind, rest).is_ok(),
        1 => judge(kind, &with_header(kind, HEADER, rest)).is_ok(),
        2 => judge(kind, &with_header(kind, HEADER, &gzip(rest))).is_ok(),
        _ => built(kind, &mut Unstructured::new(rest)).unwrap_or(false),
    }
}

/// Checks the input as the `.info` of a container that holds the members listed in the input. The
/// content of a member is its size times `x`; `~` stands for the SHA-256 of that content.
pub fn info(bytes: &[u8]) -> bool {
    let mut text = Vec::new();
    let mut members = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let fields: Vec<_> = line.trim_ascii_end().split(|byte| *byte == b':').collect();
        let size = fields.get(1).and_then(|size| str::from_utf8(size).ok());
        let size: usize = size.and_then(|size| size.parse().ok()).unwrap_or(0);
        let content = vec![b'x'; size.min(2 * BLOCK_BYTES)];
        for &byte in line {
            match byte {
                b'~' => text.extend(Digest::of(&content).to_string().bytes()),
                byte => text.push(byte),
            }
        }
        if let [name, _, _] = fields[..] {
            members.push((name, content));
        }
    }
    let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let header = String::from_utf8_lossy(first).into_owned();
    let mut body = tar_member(b"lab.info", &text);
    for (name, content) in &members {
        body.extend(tar_member(name, content));
    }
    let mut accepted = false;
    for kind in [DatabaseKind::Cvd, DatabaseKind::Cld, DatabaseKind::Cud] {
        for header in [HEADER, &header] {
            accepted |= judge(kind, &with_header(kind, header, &body)).is_ok();
        }
    }
    accepted
}

/// Digits of the longest number that is read: 2048 bits in digits of six.
const DIGITS_MAX: usize = 342;

/// Verifies the input as a signature in ClamAV's digits, over a list and over an MD5. Only Talos has
/// the private keys, and of the numbers that fit an MD5 only zero and one are their own roots.
pub fn dsig(bytes: &[u8]) -> bool {
    let (&last, text) = bytes.split_first().unwrap_or((&0, &[]));
    let text = String::from_utf8_lossy(text);
    let is_digit = |c: char| c.is_ascii_alphanumeric() || c == '+' || c == '/';
    let is_number = (1..=DIGITS_MAX).contains(&text.len()) && text.chars().all(is_digit);
    let mut md5 = [0; 16];
    md5[15] = last;
    let list = verify_info(&format!("{HEADER}\n"), Some(&text));
    let body = verify_body(&md5, Some(&text));
    for (verdict, modulus_bits) in [(&list, 2047), (&body, 1024)] {
        match verdict {
            Err(SignatureError::UnknownScheme(_)) => {
                assert!(!is_number || text.len() * 6 >= modulus_bits, "{text}");
            }
            Ok(()) | Err(SignatureError::UnknownSigner(_)) => assert!(is_number, "{text}"),
            Err(SignatureError::Missing(_)) => panic!("{text:?} is missing"),
        }
        if let Err(error) = verdict {
            render(error);
        }
    }
    assert!(list.is_err(), "a forged list is accepted");
    // `a` is zero and `b` is one; the least significant digit comes first.
    let root = match text.trim_end_matches('a') {
        "" => Some(0),
        "b" => Some(1),
        _ => None,
    };
    assert_eq!(body.is_ok(), is_number && root == Some(last), "{text}");

    // The same signatures in containers.
    let info = format!("{HEADER}\nlab.cfg:0:{}\nDSIG:{text}\n", Digest::of(b""));
    let mut tar = tar_member(b"lab.info", info.as_bytes());
    tar.extend(tar_member(b"lab.cfg", b""));
    let header = HEADER.replacen(":X:X:", &format!(":X:{text}:"), 1);
    let cvd = with_header(DatabaseKind::Cvd, &header, &tar);
    judge(DatabaseKind::Cvd, &cvd).expect_err("a forged .cvd is accepted");
    let cld = with_header(DatabaseKind::Cld, HEADER, &tar);
    judge(DatabaseKind::Cld, &cld).expect_err("a forged .cld is accepted");
    judge(DatabaseKind::Cud, &cld).expect_err("a .cld under another name is accepted");
    body.is_ok()
}

/// Builds a container whose list may be wrong, and damages it. Exactly the containers that are whole and
/// not damaged must be accepted.
fn built(kind: DatabaseKind, input: &mut Unstructured<'_>) -> arbitrary::Result<bool> {
    let names = [
        &b"COPYING"[..],
        b"lab.ndb",
        b"lab.hdb",
        b"lab.ign2",
        b"lab.cfg",
    ];
    let mut info = format!("{HEADER}\n");
    let mut members = Vec::new();
    let (mut listed, mut lied) = (false, false);
    for name in names {
        if input.ratio(1, 4)? {
            continue;
        }
        let length = input.int_in_range(0..=2 * BLOCK_BYTES + 3)?;
        let content = vec![input.arbitrary::<u8>()?; length];
        let digest = Digest::of(&content);
        let line = |size: usize| format!("{}:{size}:{digest}\n", String::from_utf8_lossy(name));
        let lie = match name {
            b"COPYING" => None, // it is not listed
            _ => Some(input.int_in_range(0..=15)?),
        };
        match lie {
            None | Some(0) => {}
            Some(1) => info += &line(length).repeat(2),
            Some(2) => info += &line(length + 1),
            Some(_) => info += &line(length),
        }
        listed |= lie.is_some();
        lied |= lie.is_some_and(|lie| lie < 5);
        match lie {
            Some(3) => {}
            Some(4) => members.extend([(name, content.clone()), (name, content)]),
            None | Some(_) => members.push((name, content)),
        }
    }
    let signed = input.arbitrary()?;
    if signed {
        info += "DSIG:aZ09+/\n";
    }
    let at = input.int_in_range(0..=members.len())?;
    members.insert(at, (b"lab.info", info.clone().into_bytes()));
    let mut body: Vec<u8> = members
        .iter()
        .flat_map(|(name, content)| tar_member(name, content))
        .collect();
    let zero_blocks: usize = input.int_in_range(0..=2)?;
    body.resize(body.len() + zero_blocks * BLOCK_BYTES, 0);
    let compressed: bool = input.arbitrary()?;

    let mut damaged = damage(&mut body, input)?;
    if compressed {
        body = gzip(&body);
        damaged |= damage(&mut body, input)?;
    }
    // `sigtool --unsigned` writes the MD5 into a `.cud`.
    let has_md5 = kind == DatabaseKind::Cvd || (kind == DatabaseKind::Cud && input.arbitrary()?);
    let mut file = match has_md5 {
        true => container(&with_md5(HEADER, &body), &body),
        false => container(HEADER, &body),
    };
    damaged |= damage(&mut file, input)?;

    let verdict = judge(kind, &file);
    if lied && !damaged {
        assert!(verdict.is_err(), "members and list differ");
    } else if listed && !damaged {
        match &verdict {
            Ok(()) => {}
            Err(ContainerError::Signature(_)) if kind != DatabaseKind::Cud => {}
            Err(ContainerError::Renamed(_)) if kind == DatabaseKind::Cud && signed => {}
            Err(error) => panic!("a whole container is refused: {}", render(error)),
        }
    }
    Ok(verdict.is_ok())
}

/// Damages `bytes` up to three times. Returns whether it did.
fn damage(bytes: &mut Vec<u8>, input: &mut Unstructured<'_>) -> arbitrary::Result<bool> {
    let count = input.int_in_range(0..=3)?;
    for _ in 0..count {
        let Some(last) = bytes.len().checked_sub(1) else {
            break;
        };
        let at = input.int_in_range(0..=last)?;
        let block = at - at % BLOCK_BYTES;
        let block = block..bytes.len().min(block + BLOCK_BYTES);
        match input.int_in_range(0..=6)? {
            0 => bytes[at] ^= input.arbitrary::<u8>()?,
            1 => bytes.truncate(at),
            2 => bytes.insert(at, input.arbitrary()?),
            3 => drop(bytes.drain(block)),
            4 => bytes.extend_from_within(block),
            5 => bytes.truncate(block.start),
            _ if block.len() == BLOCK_BYTES => seal(&mut bytes[block]),
            _ => bytes.push(0),
        }
    }
    Ok(count > 0)
}

/// Checks a container, from a slice and from a source that gives a few bytes at a time. A `.cud` that
/// is accepted must be whole to the second reader, too. A `.cvd` or `.cld` is never accepted, because
/// only Talos can sign it.
fn judge(kind: DatabaseKind, file: &[u8]) -> Result<(), ContainerError> {
    let verdict = check(kind, file);
    let slowly = check(kind, Trickle(file));
    // Of two faults, the one that is found first depends on the sizes of the pieces.
    assert_eq!(verdict.is_ok(), slowly.is_ok());
    match verdict {
        Ok(summary) => {
            assert_eq!(kind, DatabaseKind::Cud, "a forged container is accepted");
            assert_eq!(summary.signed_by, SignedBy::None);
            assert!(summary.oddity.is_none(), "{:?}", summary.oddity);
            assert_whole(file, &summary);
            Ok(())
        }
        Err(error) => {
            render(&error);
            Err(error)
        }
    }
}

/// A source that gives at most 61 bytes at a time.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&mut self.0).take(61).read(buffer)
    }
}

/// The second reader.
fn assert_whole(file: &[u8], summary: &Summary) {
    let (head, body) = file.split_at(HEADER_BYTES);
    assert_eq!(Header::read(head).ok().as_ref(), Some(&summary.header));
    if let Some(md5) = summary.header.md5 {
        assert_eq!(md5[..], Md5::digest(body)[..], "another body");
    }
    let body = match body.first() {
        Some(0x1f) => {
            let mut inflated = Vec::new();
            let mut decoder = GzDecoder::new(body);
            decoder.read_to_end(&mut inflated).expect("a gzip stream");
            assert!(decoder.into_inner().is_empty(), "bytes behind the stream");
            inflated
        }
        _ => body.to_vec(),
    };

    let (blocks, rest) = body.as_chunks::<BLOCK_BYTES>();
    assert!(rest.is_empty(), "a part of a block");
    let mut blocks = blocks.iter();
    let mut members = BTreeMap::new();
    while let Some(block) = blocks.next() {
        if *block == [0; BLOCK_BYTES] {
            assert!(blocks.all(|block| *block == [0; BLOCK_BYTES]));
            break;
        }
        let mut sealed = *block;
        seal(&mut sealed);
        assert_eq!(
            octal(&block[148..156]),
            octal(&sealed[148..156]),
            "checksum"
        );
        let name = block[..100].split(|byte| *byte == 0).next();
        let name = String::from_utf8(name.expect("one part").to_vec()).expect("ASCII");
        let size = octal(&block[124..136]);
        let count = size.div_ceil(BLOCK_BYTES);
        let mut content: Vec<u8> = blocks.by_ref().take(count).flatten().copied().collect();
        assert_eq!(content.len(), count * BLOCK_BYTES, "{name} is cut");
        assert!(content.drain(size..).all(|byte| byte == 0), "padding");
        assert!(members.insert(name, content).is_none(), "a name twice");
    }

    let text = summary.info.text();
    let holds_the_list = |(name, content): &(&String, &Vec<u8>)| {
        name.ends_with(".info") && content.as_slice() == text.as_bytes()
    };
    let (list, _) = members.iter().find(holds_the_list).expect("`.info`");
    let list = list.clone();
    members.remove(&list);
    let mut lines = text.lines();
    let head = str::from_utf8(head).expect("ASCII").trim_end_matches(' ');
    let first = lines.next().expect("the header").trim_end_matches(' ');
    let facts = |line: &str| -> Vec<String> {
        let fields = line.split(':').enumerate();
        let compared = fields.filter(|(index, _)| !matches!(index, 5 | 6));
        compared.map(|(_, field)| field.to_owned()).collect()
    };
    assert_eq!(facts(head), facts(first), "header and list");
    let mut signature = None;
    let mut listed = 0;
    for line in lines {
        if let Some(text) = line.strip_prefix("DSIG:") {
            signature = Some(text);
            continue;
        }
        assert_eq!(signature, None, "a line behind the signature");
        let fields: Vec<_> = line.split(':').collect();
        let [name, size, sha256] = fields[..] else {
            panic!("{line:?} is no line of a list");
        };
        let content = members.remove(name).expect(name);
        assert_eq!(size.parse(), Ok(content.len()));
        assert_eq!(sha256, Digest::of(&content).to_string());
        let member = &summary.info.members[listed];
        assert_eq!((&*member.name, member.size), (name, content.len() as u64));
        listed += 1;
    }
    assert_eq!(summary.info.members.len(), listed);
    assert!(listed > 0, "nothing is listed");
    assert!(members.keys().all(|name| name == "COPYING"), "{members:?}");

    assert_eq!(summary.info.signature(), signature);
    let signed = match text.rfind("\nDSIG:") {
        Some(at) if signature.is_some() => &text[..=at],
        Some(_) | None => text,
    };
    assert_eq!(summary.info.signed(), signed);
}

/// A container of `header` and `body`. The header of a `.cvd` has the MD5 of the body.
fn with_header(kind: DatabaseKind, header: &str, body: &[u8]) -> Vec<u8> {
    match kind == DatabaseKind::Cvd {
        true => container(&with_md5(header, body), body),
        false => container(header, body),
    }
}

fn with_md5(header: &str, body: &[u8]) -> String {
    let md5 = hex::encode(Md5::digest(body));
    header.replacen(":X:", &format!(":{md5}:"), 1)
}

fn container(header: &str, body: &[u8]) -> Vec<u8> {
    let mut file = header.as_bytes().to_vec();
    file.resize(HEADER_BYTES, b' ');
    file.extend(body);
    file
}

fn tar_member(name: &[u8], content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    let length = name.len().min(100);
    bytes[..length].copy_from_slice(&name[..length]);
    bytes[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    seal(&mut bytes);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

/// Writes the checksum of a tar header, which counts its own field as spaces.
fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0\0").as_bytes());
}

fn octal(field: &[u8]) -> usize {
    let text = str::from_utf8(field).expect("ASCII");
    let text = text.trim_end_matches(['\0', ' ']);
    usize::from_str_radix(text, 8).expect("an octal number")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory takes everything");
    encoder.finish().expect("memory takes everything")
}
