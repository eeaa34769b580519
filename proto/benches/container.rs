//! What checking a large database costs beside reading and hashing it:
//! `cargo bench -p clamcast-proto --bench container`.

#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::error::Error;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::time::{Duration, Instant};

use clamcast_proto::names::DatabaseKind;
use clamcast_proto::{Digest, container, talos};
use sha2::{Digest as _, Sha256};

/// Size of the real daily database.
const MEMBER_BYTES: [usize; 4] = [120_000_000, 50_000_000, 20_000_000, 7_000_000];
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
    let head = "ClamAV-VDB:22 Nov 2026 06-05 +0000:7:3:90:X:X:bench:1795327500";
    let mut info = format!("{head}\n");
    let mut members = Vec::new();
    for (number, size) in MEMBER_BYTES.into_iter().enumerate() {
        let name = format!("daily.{}", ["hsb", "ndb", "ldb", "mdb"][number]);
        let line = |at: u64| format!("{}:Bench-{at}\n", Digest::of(&at.to_be_bytes()));
        let mut content: Vec<u8> = (0..).map(line).take(4096).collect::<String>().into_bytes();
        content = content.into_iter().cycle().take(size).collect();
        info += &format!("{name}:{size}:{}\n", Digest::of(&content));
        members.push((name, content));
    }
    members.insert(0, ("daily.info".to_owned(), info.into_bytes()));
    let mut bytes = format!("{head:512}").into_bytes();
    for (name, content) in members {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        let size = format!("{:o}", content.len());
        block[124..124 + size.len()].copy_from_slice(size.as_bytes());
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0\0").as_bytes());
        bytes.extend(block);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes
}
