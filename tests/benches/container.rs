//! What checking a large database costs beside reading and hashing it:
//! `cargo bench -p clamcast-tests --bench container`.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::time::{Duration, Instant};

use clamcast_proto::names::DatabaseKind;
use clamcast_proto::{container, talos};
use clamcast_tests::lab::{Container, signatures};
use sha2::{Digest as _, Sha256};

/// Members of about the size of the real daily database.
const MEMBERS: [(&str, usize); 4] = [
    ("hsb", 120_000_000),
    ("ndb", 50_000_000),
    ("ldb", 20_000_000),
    ("mdb", 7_000_000),
];
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let mut file = tempfile::tempfile()?;
    file.write_all(&database())?;
    let mut hashing = Vec::new();
    let mut checking = Vec::new();
    for _ in 0..ROUNDS {
        hashing.push(timed(&mut file, |file| {
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; 64 << 10];
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok(()),
                    read => hasher.update(&buffer[..read]),
                }
            }
        })?);
        checking.push(timed(&mut file, |file| {
            let summary = container::check(DatabaseKind::Cud, file).map_err(io::Error::other)?;
            assert!(summary.oddity.is_none());
            Ok(())
        })?);
    }
    let signature = "b".repeat(341);
    let start = Instant::now();
    let verified = talos::verify_info("", Some(&signature));
    let signature = start.elapsed();
    assert!(verified.is_err(), "that is no signature");

    let (hashing, checking) = (median(hashing), median(checking));
    println!(
        "{} MB, median of {ROUNDS} rounds",
        file.metadata()?.len() / 1_000_000
    );
    println!("reading and hashing    {hashing:>8.1?}");
    println!("checking the structure {checking:>8.1?}");
    println!("verifying a signature  {signature:>8.1?}");
    let ratio = (checking + signature).as_secs_f64() / hashing.as_secs_f64();
    println!("ratio                  {ratio:>8.2}");
    Ok(())
}

fn timed(file: &mut File, work: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<Duration> {
    file.rewind()?;
    let start = Instant::now();
    work(file)?;
    Ok(start.elapsed())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A plain container with lines of hexadecimal digits.
fn database() -> Vec<u8> {
    let lines: Vec<u8> = signatures(0..4096).into_bytes();
    let mut container = Container::new("daily", 7);
    for (extension, size) in MEMBERS {
        let content: Vec<u8> = lines.iter().copied().cycle().take(size).collect();
        container = container.member(extension, content);
    }
    container.bytes()
}
