//! Database containers: unsigned ones, which a real clamd loads under the extension `.cud`, and real
//! ones that a test changes.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use jiff::Timestamp;
use sha2::{Digest, Sha256};

/// A container with the members that a test wants. Its bytes depend on nothing else.
///
/// The format is that of ClamAV's `buildcld` and `tar_addfile` (libfreshclam_internal.c,
/// common/tar.c): a header of 512 bytes, which is the first line of NAME.info, then a plain tar
/// without the blocks that end one.
#[derive(Clone, Debug)]
pub struct Container {
    name: String,
    version: u64,
    built: Timestamp,
    members: Vec<(String, Vec<u8>)>,
}

impl Container {
    /// A container `name`.cud without members.
    pub fn new(name: &str, version: u64) -> Self {
        // Later versions are built later, as in life.
        let built = Timestamp::from_second(1_700_000_000 + 3600 * version as i64);
        let built = built.expect("version numbers are small");
        Self {
            name: name.into(),
            version,
            built,
            members: Vec::new(),
        }
    }

    /// Adds the member `name`.`extension`.
    #[must_use]
    pub fn member(mut self, extension: &str, content: impl Into<Vec<u8>>) -> Self {
        self.members
            .push((format!("{}.{extension}", self.name), content.into()));
        self
    }

    /// A container that is whole and true to its `.info`, and that no clamd loads: one of its
    /// signatures is nonsense.
    pub fn refused_by_clamd(name: &str, version: u64) -> Self {
        Self::new(name, version)
            .member("hsb", signatures(0..10))
            .member("ndb", "Lab.Nonsense:0:*:these are no hexadecimal digits\n")
    }

    /// The container's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let info = self.info();
        let head = info.lines().next().unwrap_or_default();
        let mut bytes = format!("{head:512}").into_bytes();
        let notice = ("COPYING", &b"made for a test\n"[..]);
        let info_name = format!("{}.info", self.name);
        let members = self
            .members
            .iter()
            .map(|(name, content)| (name.as_str(), &content[..]));
        for (name, content) in [notice, (&info_name, info.as_bytes())]
            .into_iter()
            .chain(members)
        {
            bytes.extend(tar_member(name, content));
        }
        bytes
    }

    /// Writes it into `directory` and returns its path. It is renamed into place, since whoever
    /// watches must never see a part.
    pub fn write(&self, directory: &Path) -> PathBuf {
        let path = directory.join(format!("{}.cud", self.name));
        let part = directory.join(format!(".{}.part", self.name));
        fs::write(&part, self.bytes())
            .and_then(|()| fs::rename(&part, &path))
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        path
    }

    /// The header line, then name, size and SHA-256 of every member.
    fn info(&self) -> String {
        let lines = |content: &[u8]| content.iter().filter(|byte| **byte == b'\n').count();
        let count: usize = self.members.iter().map(|(_, content)| lines(content)).sum();
        let Self { version, built, .. } = self;
        let date = built.strftime("%d %b %Y %H-%M +0000");
        let stamp = built.as_second();
        let mut info = format!("ClamAV-VDB:{date}:{version}:{count}:90:X:X:lab:{stamp}\n");
        for (name, content) in &self.members {
            let digest = hex::encode(Sha256::digest(content));
            info += &format!("{name}:{}:{digest}\n", content.len());
        }
        info
    }
}

/// The certificates in a `.cvd.sign` file, as PEM. The root that vouches for ClamAV's test files is not
/// public, so tests trust these.
pub fn certificates_in(sign: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(sign).expect("it is text");
    let (_, base64) = text
        .rsplit_once(':')
        .expect("the last field is the signature");
    let lines: Vec<_> = base64.trim().as_bytes().chunks(64).collect();
    let pem = lines.join(&b'\n');
    let begin = b"-----BEGIN PKCS7-----\n";
    let pem = [begin, &pem[..], b"\n-----END PKCS7-----\n"].concat();
    let mut openssl = Command::new("openssl")
        .args(["pkcs7", "-print_certs"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs openssl(1)");
    let mut input = openssl.stdin.take().expect("it is piped");
    input.write_all(&pem).expect("openssl reads it");
    drop(input);
    openssl.wait_with_output().expect("openssl ends").stdout
}

/// A line of a `.hsb` file by which clamd finds exactly `sample`, which must have six bytes or
/// more, as `name`.
pub fn hash_signature(sample: &[u8], name: &str) -> String {
    let digest = hex::encode(Sha256::digest(sample));
    format!("{digest}:{}:{name}:73\n", sample.len())
}

/// Lines of a `.hsb` file that match nothing: one for each number.
pub fn signatures(numbers: impl IntoIterator<Item = u64>) -> String {
    let line = |number| {
        let digest = hex::encode(Sha256::digest(u64::to_be_bytes(number)));
        format!(
            "{digest}:{}:Lab.Nothing-{number}:73\n",
            1000 + number % 1000
        )
    };
    numbers.into_iter().map(line).collect()
}

/// A member of a tar, as ClamAV writes it.
fn tar_member(name: &str, content: &[u8]) -> Vec<u8> {
    let mut member = tar_header(name, content.len()).to_vec();
    member.extend(content);
    member.resize(member.len().next_multiple_of(512), 0);
    member
}

/// A real container with a plain tar, taken apart so that a test can change it.
#[derive(Clone, Debug)]
pub struct Dismantled {
    /// The 512 bytes in front of the tar.
    pub header: Vec<u8>,
    /// Name and content of the members, in their order.
    pub members: Vec<(String, Vec<u8>)>,
}

impl Dismantled {
    /// Takes a container apart.
    ///
    /// # Panics
    ///
    /// If it is not one, or its tar is compressed.
    pub fn new(container: &[u8]) -> Self {
        let (header, mut tar) = container.split_at(512);
        let text = |field: &[u8]| {
            let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8(text.to_vec()).expect("a plain tar")
        };
        let mut members = Vec::new();
        while !tar.is_empty() {
            let size = usize::from_str_radix(text(&tar[124..136]).trim(), 8).expect("a size");
            members.push((text(&tar[..100]), tar[512..512 + size].to_vec()));
            tar = &tar[512 + size.next_multiple_of(512)..];
        }
        let header = header.to_vec();
        Self { header, members }
    }

    /// The content of the first member whose name ends like this.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn member(&mut self, end: &str) -> &mut Vec<u8> {
        let found = self
            .members
            .iter_mut()
            .find(|(name, _)| name.ends_with(end));
        &mut found.expect("it has such a member").1
    }

    /// Changes the text of `.info`.
    pub fn info(&mut self, change: impl FnOnce(String) -> String) {
        let info = self.member(".info");
        let text = String::from_utf8(info.clone()).expect("a text");
        *info = change(text).into_bytes();
    }

    /// Adds a line to a member, and makes `.info` agree.
    pub fn add(&mut self, end: &str, line: &str) {
        let member = self.member(end);
        let entry =
            |content: &[u8]| format!("{}:{}", content.len(), hex::encode(Sha256::digest(content)));
        let before = entry(member);
        member.extend(line.as_bytes());
        let after = entry(member);
        self.info(|info| info.replace(&before, &after));
    }

    /// The container, put together again.
    pub fn bytes(&self) -> Vec<u8> {
        let tar = self.members.iter();
        let tar = tar.flat_map(|(name, content)| tar_member(name, content));
        self.header.iter().copied().chain(tar).collect()
    }
}

/// Name, size and checksum, all else zero.
fn tar_header(name: &str, size: usize) -> [u8; 512] {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    let size = format!("{size:o}");
    header[124..124 + size.len()].copy_from_slice(size.as_bytes());
    // The checksum counts its own field as spaces.
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0\0").as_bytes());
    header
}
