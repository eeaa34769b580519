//! The mirror directory, and what brings updates to it: the real freshclam with signed test
//! databases where both are at hand, else databases made here.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::{env, fs, io, thread};

use anyhow::{Context, ensure};
use nix::unistd::Uid;

use super::stage::{PATIENCE, Stage};
use crate::{programs, workspace};

/// What version 5 of `test.cvd` finds and version 4 does not: the bytes of its `Win.Worm.Sobig-1`.
const SOBIG: &str = "6fec40cb4ad432859b126508015369262a47554a451edfaae437057ac6d6683e4a187189b7daf883e3768a107b1f263cbf2dfaeef372e9258f2ded8943fe63fd5dbd6a317ce6f8953634874247aab83228a5caf585c1d3823cc123678823552d71af200b";

/// What the second of the databases made here finds.
const HARMLESS: &[u8] = b"a harmless sample of the clamcast demo";

/// How many signatures these databases have, and how many come with the second: about 2 MB.
const SIGNATURES: u64 = 20_000;
const NEW_SIGNATURES: u64 = 50;

/// A request's head is longer only if it is none.
const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// Where updates come from.
pub(super) enum Mirror {
    /// freshclam, and the directory with the signed test databases.
    Freshclam(PathBuf),
    /// This program.
    Made,
}

/// Bytes that clamd finds with the second version.
pub(super) struct Sample {
    pub(super) name: &'static str,
    pub(super) bytes: Vec<u8>,
}

impl Mirror {
    /// Looks for the parts, and starts the server for freshclam.
    pub(super) fn new(stage: &Stage<'_>, target: &Path) -> anyhow::Result<Self> {
        let files = env::var_os("CLAMCAST_TESTFILES").map(PathBuf::from);
        let files = files.unwrap_or_else(|| workspace().join("../shared/clamav-testfiles"));
        let missing = if programs::find("freshclam", target).is_none() {
            "there is no freshclam here".to_owned()
        } else if !files.join("test-1.cvd").is_file() {
            let files = files.display();
            format!("{files} has no signed test databases (CLAMCAST_TESTFILES says where they are)")
        } else {
            fs::create_dir(stage.path("www"))?;
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let address = listener.local_addr()?;
            serve(listener, stage.path("www"));
            let directory = stage.path("mirror");
            // As root, freshclam becomes the owner, by default a user that need not exist.
            let owner = if Uid::effective().is_root() {
                "DatabaseOwner root\n"
            } else {
                ""
            };
            stage.write(
                "freshclam.conf",
                &format!(
                    "DatabaseDirectory {}\nDatabaseMirror http://{address}\nDNSDatabaseInfo no\n{owner}",
                    directory.display()
                ),
            )?;
            return Ok(Self::Freshclam(files));
        };
        stage.screen().warning(&format!(
            "{missing}; so the demo makes databases itself, without freshclam and without signatures of Talos"
        ))?;
        Ok(Self::Made)
    }

    /// The database's name.
    pub(super) fn file(&self) -> &'static str {
        match self {
            Self::Freshclam(_) => "test.cld",
            Self::Made => "daily.cud",
        }
    }

    /// What clamd finds only with the second version.
    pub(super) fn sample(&self) -> Sample {
        match self {
            Self::Freshclam(_) => Sample {
                name: "Win.Worm.Sobig-1",
                bytes: hex(SOBIG),
            },
            Self::Made => Sample {
                name: "Demo.Harmless-1.UNOFFICIAL",
                bytes: HARMLESS.to_vec(),
            },
        }
    }

    /// Brings the first version.
    pub(super) fn first(&self, stage: &Stage<'_>) -> anyhow::Result<()> {
        match self {
            Self::Freshclam(files) => {
                stage.screen().say(
                    "A server on loopback has ClamAV's signed test database, as database.clamav.net has\n\
                     the real ones. The mirror begins with version 1, and the real freshclam patches it\n\
                     to 4.",
                )?;
                copy(&files.join("test-1.cvd"), &stage.path("mirror/test.cvd"))?;
                freshclam(stage, files, 4)
            }
            Self::Made => make(stage, 1),
        }
    }

    /// Brings the second version.
    pub(super) fn second(&self, stage: &Stage<'_>) -> anyhow::Result<()> {
        match self {
            Self::Freshclam(files) => freshclam(stage, files, 5),
            Self::Made => make(stage, 2),
        }
    }
}

/// Offers versions up to this one, and runs freshclam.
fn freshclam(stage: &Stage<'_>, files: &Path, version: u32) -> anyhow::Result<()> {
    let www = stage.path("www");
    for step in 2..=version {
        let patch = format!("test-{step}.cdiff");
        copy(&files.join(&patch), &www.join(&patch))?;
    }
    let whole = files.join(format!("test-{version}.cvd"));
    copy(&whole, &www.join("test.cvd"))?;
    stage.run("freshclam --config-file=freshclam.conf --no-dns --update-db=test --stdout")?;
    let head = fs::read(stage.path("mirror/test.cld")).context("freshclam left no test.cld")?;
    let head = String::from_utf8_lossy(&head[..head.len().min(512)]).into_owned();
    ensure!(
        head.split(':').nth(2) == Some(version.to_string().as_str()),
        "freshclam did not bring version {version}, but `{}`",
        head.trim_end()
    );
    Ok(())
}

/// Copies a file's content alone: one that nobody may write could not be replaced by the next.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))
}

/// Makes a database as freshclam leaves it on disk (`buildcld` in ClamAV's
/// libfreshclam_internal.c): a header of 512 bytes, which is the first line of daily.info, then a
/// tar. The extension `.cud` says that nobody signed it.
fn make(stage: &Stage<'_>, version: u64) -> anyhow::Result<()> {
    let count = SIGNATURES + NEW_SIGNATURES * (version - 1);
    let mut signatures: String = (0..count).map(signature).collect();
    if version == 2 {
        stage.write("sample", std::str::from_utf8(HARMLESS)?)?;
        let digest = stage.ask("sha256sum sample");
        let digest = digest.split(' ').next().unwrap_or_default();
        let line = format!("{digest}:{}:Demo.Harmless-1:73\n", HARMLESS.len());
        signatures += &line;
    }
    fs::create_dir_all(stage.path("make"))?;
    stage.write("make/COPYING", "made by the clamcast demo\n")?;
    stage.write("make/daily.hsb", &signatures)?;
    let digest = stage.ask("sha256sum make/daily.hsb");
    let digest = digest.split(' ').next().unwrap_or_default();
    let now = stage.ask("LC_ALL=C date -u '+%d %b %Y %H-%M +0000/%s'");
    let (date, seconds) = now.trim_end().split_once('/').context("date(1) failed")?;
    stage.write(
        "make/daily.info",
        &format!(
            "ClamAV-VDB:{date}:{version}:{count}:90:X:X:demo:{seconds}\n\
             daily.hsb:{}:{digest}\n",
            signatures.len()
        ),
    )?;
    stage.run("tar --format=ustar --directory=make -cf make/tar COPYING daily.info daily.hsb")?;
    stage.run(
        "(printf %-512s \"$(head -n 1 make/daily.info)\"; cat make/tar) > mirror/.daily.part",
    )?;
    stage.run("mv mirror/.daily.part mirror/daily.cud")?;
    Ok(())
}

/// A signature by a digest that no file has, as far as anybody knows.
fn signature(number: u64) -> String {
    // The finaliser of SplitMix64: digits that do not compress, as those of a digest do not.
    let digits = |part: u64| {
        let mut z = (4 * number + part + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        format!("{:016x}", z ^ (z >> 31))
    };
    let digest: String = (0..4).map(digits).collect();
    format!(
        "{digest}:{}:Demo.Nothing-{number}:73\n",
        1000 + number % 1000
    )
}

fn hex(text: &str) -> Vec<u8> {
    let digit = |digit: u8| char::from(digit).to_digit(16).expect("hexadecimal digits");
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::try_from(digit(pair[0]) * 16 + digit(pair[1])).expect("two digits"))
        .collect()
}

/// Serves the files of a directory over HTTP until we end, whole or in ranges: freshclam reads a
/// database's header by `bytes=0-511` to learn its version.
fn serve(listener: TcpListener, directory: PathBuf) {
    thread::spawn(move || {
        // One at a time: freshclam is alone here, and closes before it asks again.
        for stream in listener.incoming().flatten() {
            // A client that went away is no matter; it says so itself.
            let _ = answer(stream, &directory);
        }
    });
}

fn answer(mut stream: TcpStream, directory: &Path) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(REQUEST_BYTES_MAX)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        range = range.or(line.strip_prefix("range: bytes=").and_then(bounds));
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let (status, body) = match (fs::read(directory.join(name)), range) {
        (Err(_), _) => ("404 Not Found", Vec::new()),
        (Ok(body), None) => ("200 OK", body),
        (Ok(body), Some((from, to))) => {
            let to = body.len().min(to.saturating_add(1));
            ("206 Partial Content", body[from.min(to)..to].to_vec())
        }
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(&body)
}

/// First and last position of `0-511`.
fn bounds(range: &str) -> Option<(usize, usize)> {
    let (from, to) = range.split_once('-')?;
    Some((from.parse().ok()?, to.parse().ok()?))
}
