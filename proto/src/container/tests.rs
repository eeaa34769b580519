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
    let whole_blocks = "Lab.N-1:0:*:6c61627465737431\n".repeat(40).into_bytes()[..1024].to_vec();
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

/// Reads a container without its signatures, which takes Talos's key to make.
fn read(kind: DatabaseKind, source: impl Read) -> Result<Contents, ContainerError> {
    let contents = Contents::read(kind, source, BODY_BYTES_MAX)?;
    match contents.defect {
        Some(defect) => Err(defect),
        None => Ok(contents),
    }
}

fn whole(kind: DatabaseKind, bytes: &[u8]) -> Contents {
    read(kind, bytes).unwrap_or_else(|error| panic!("{}", chain(&error)))
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
    let ended = |blocks: usize| [cud().plain(), vec![0; 512 * blocks]].concat();
    whole(DatabaseKind::Cud, &ended(21));
    refused(&ended(22), "something follows the end of the tar");
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
        let whole = whole(DatabaseKind::Cud, &bytes);
        assert_eq!((dribbled.header, dribbled.info), (whole.header, whole.info));
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
    refused(
        &with_info(|info| *info += "DSIG:abc"),
        "line 5 of lab.info is wrong: it must end with a newline",
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

/// A header that names the MD5 of this body.
fn filled_in(signature: &str, body: &[u8]) -> Cud {
    let md5 = hex::encode(Md5::digest(body));
    let header = HEADER.replace(":X:X:", &format!(":{md5}:{signature}:"));
    cud().with(|cud| cud.header = header)
}

#[test]
fn the_md5_must_be_that_of_the_body() {
    for signature in ["X", "abc"] {
        whole(
            DatabaseKind::Cvd,
            &filled_in(signature, &gzip(&cud().tar())).gzip(),
        );
    }
    let unsigned = filled_in("X", &cud().tar()); // as `sigtool --unsigned` makes it
    whole(DatabaseKind::Cud, &unsigned.plain());
    refused(&filled_in("X", b"other").plain(), "the body has MD5");
    let no_md5 = cud().with(|cud| cud.header = HEADER.replace(":X:X:", ":X:abc:"));
    refused_as(
        DatabaseKind::Cvd,
        &no_md5.gzip(),
        "the header of a .cvd must have the MD5",
    );
}

#[test]
fn a_container_under_the_extension_of_another_kind_is_named() {
    let signed = cud().with(|cud| cud.info += "DSIG:abc\n");
    let (cvd, unsigned) = (
        filled_in("abc", &gzip(&cud().tar())),
        filled_in("X", &cud().tar()),
    );
    for (bytes, kind, is) in [
        (
            cud().plain(),
            DatabaseKind::Cvd,
            "it is a .cld or .cud under",
        ),
        (cvd.gzip(), DatabaseKind::Cld, "it is a .cvd under"),
        (cvd.gzip(), DatabaseKind::Cud, "it is a .cvd under"),
        (unsigned.plain(), DatabaseKind::Cld, "it is a .cud under"),
        (signed.plain(), DatabaseKind::Cud, "it is a .cld under"),
    ] {
        refused_as(kind, &bytes, is);
    }
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
    for text in ["lab.info", "COPYING"] {
        refused(&announced(text, INFO_BYTES_MAX + 1), "the limit is 1048576");
    }

    let many: Vec<u8> = (0..=MEMBERS_MAX)
        .flat_map(|number| tar_member(&format!("lab{number}.ndb"), b""))
        .collect();
    refused(
        &[cud().header_block(), many].concat(),
        "there are more than 4096 members",
    );

    let member = tar_member("lab.pad", &vec![0; 1 << 20]);
    let body = [cud().tar(), member].concat();
    let bytes = [cud().header_block(), gzip(&body)].concat();
    assert!(bytes.len() < 8192);
    let found = Contents::read(DatabaseKind::Cud, bytes.as_slice(), 1 << 20).unwrap();
    assert!(
        matches!(found.defect, Some(ContainerError::BodyBytesMax { .. })),
        "{found:?}"
    );
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
    let new = header("ClamAV-VDB:22 Jun 2021 21-34 -0400:6:14:81:X:X:nervous:1624412045").unwrap();
    assert_eq!(new.built.to_string(), "2021-06-23T01:34:05Z");
    let later = header("ClamAV-VDB:some day:6:14:81:X:X:nervous:1624412045:more").unwrap();
    assert_eq!(later, new);
}

#[test]
fn a_hostile_header_is_an_error() {
    let with = |from: &str, to: &str| chain(&header(&HEADER.replacen(from, to, 1)).unwrap_err());
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
    assert!(with(":X:X:", ":X::").starts_with("the signature is ``, expected"));
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
fn every_real_cvd_is_whole_and_signed_by_talos() {
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
        let summary = check(DatabaseKind::Cvd, bytes.as_slice());
        let Summary {
            header,
            info,
            signed_by,
            oddity,
        } = summary.unwrap_or_else(|error| panic!("{file}: {}", chain(&error)));
        assert_eq!(signed_by, SignedBy::Talos);
        assert!(oddity.is_none(), "{file}: {oddity:?}");
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
fn a_changed_byte_in_a_real_cvd_is_refused_anywhere() {
    let Some(folder) = real_databases() else {
        return;
    };
    let bytes = std::fs::read(folder.join("test-6.cvd")).unwrap();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert!(
            check(DatabaseKind::Cvd, changed.as_slice()).is_err(),
            "{at}"
        );
    }
}

#[test]
fn a_cvd_or_cld_without_a_signature_of_talos_is_refused() {
    refused_as(
        DatabaseKind::Cld,
        &cud().plain(),
        "`.info` has no signature, and clamd refuses a .cvd or .cld without one",
    );
    for (line, because) in [
        ("DSIG:aZ09+/\n", "`.info` is by an unknown signer"),
        ("DSIG:PKCS7-MIIB\n", "`.info` is of an unknown kind"),
    ] {
        let signed = cud().with(|cud| cud.info += line);
        refused_as(DatabaseKind::Cld, &signed.plain(), because);
        refused_as(DatabaseKind::Cld, &signed.gzip(), because);
    }
    for (signature, because) in [
        ("X", "the header has no signature"),
        ("abc", "the header is by an unknown signer"),
        ("pkcs7=MIIB", "the header is of an unknown kind"),
    ] {
        let signed = filled_in(signature, &gzip(&cud().tar()));
        refused_as(DatabaseKind::Cvd, &signed.gzip(), because);
    }
}

#[test]
fn an_unusual_form_passes_only_where_talos_signed_every_byte() {
    let Some(folder) = real_databases() else {
        return;
    };
    let genuine = std::fs::read(folder.join("test-6.cvd")).unwrap();
    // The only unusual thing that a real database can have: more bytes than a limit for this test.
    let read = |bytes: &[u8]| Contents::read(DatabaseKind::Cvd, bytes, 30_000).unwrap();
    let summary = read(&genuine).verify().unwrap();
    assert_eq!(
        (summary.signed_by, summary.header.version),
        (SignedBy::Talos, 6)
    );
    let oddity = summary.oddity.unwrap();
    assert!(
        matches!(oddity, ContainerError::BodyBytesMax { max: 30_000 }),
        "{oddity:?}"
    );

    let unlisted = ContainerError::Unlisted("daily.ign2".to_owned());
    let refused = Contents {
        defect: Some(unlisted),
        ..read(&genuine)
    };
    let refused = refused.verify().unwrap_err();
    assert!(
        matches!(refused, ContainerError::Unlisted(_)),
        "{refused:?}"
    );
    let signature = summary.header.signature.unwrap();
    let header = String::from_utf8(genuine[..HEADER_BYTES].to_vec()).unwrap();
    let forged = header.replace(&signature, &"b".repeat(signature.len()));
    let forged = [forged.as_bytes(), &genuine[HEADER_BYTES..]].concat();
    let refused = read(&forged).verify().unwrap_err();
    assert!(
        matches!(refused, ContainerError::BodyBytesMax { .. }),
        "{refused:?}"
    );
}
