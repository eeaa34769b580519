//! Making a delta: what both objects share, found by `fast_rsync` and grown byte by byte.

use std::io::{self, Write};

use fast_rsync::{Signature, SignatureOptions, diff};

use super::{Header, OPERATIONS_BYTES_MAX, Object, WINDOW_LOG_MAX};
use crate::Digest;

/// Smallest block that is looked for. Growing makes the result nearly independent of it, and the
/// signature never travels, so the only price of a small block is memory.
const BLOCK_BYTES: usize = 256;

/// Most blocks of the old object: as many as fit into a hash table of 2^20 slots, which with the
/// signature is 46 MB. A larger object gets larger blocks.
const BLOCKS_MAX: usize = 7 << 17;

/// Bytes of MD4 that a block is known by. A wrong match is as likely as 2^-69 for the largest
/// databases, and the digest of the result would catch it.
const BLOCK_HASH_BYTES: u32 = 8;

/// One side of a delta that is to be made.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// SHA-256 of `bytes`. It is believed: objects are named by it, and the agent checks.
    pub digest: Digest,
    /// The whole content.
    pub bytes: &'a [u8],
}

impl Input<'_> {
    fn object(&self) -> Object {
        Object {
            digest: self.digest,
            size: self.bytes.len() as u64,
        }
    }
}

/// Why there is no delta.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The objects share many small pieces in another order. The full file serves better.
    #[error(
        "the delta from {old} to {new} needs {bytes} bytes of operations, expected at most \
         {OPERATIONS_BYTES_MAX}; send the full file"
    )]
    TooManyOperations {
        /// The old object.
        old: Digest,
        /// The new object.
        new: Digest,
        /// What its operations take, inflated.
        bytes: usize,
    },
    /// The output failed.
    #[error("cannot write the delta from {old} to {new}")]
    Write {
        /// The old object.
        old: Digest,
        /// The new object.
        new: Digest,
        /// What the output said.
        source: io::Error,
    },
}

/// Writes the delta from `old` to `new` to `out`, in pieces of at most 32 KiB or so.
///
/// Beside the inputs it takes some 50 MB of memory, and at worst a fifth of the new object's size
/// more; of time a second or two for databases of 200 MB, ten if they have nothing in common.
/// Whether the result is smaller than the new object is for the caller to see.
pub fn make(old: Input<'_>, new: Input<'_>, mut out: impl Write) -> Result<(), MakeError> {
    let mut copies = find_copies(old.bytes, new.bytes);
    grow(&mut copies, old.bytes, new.bytes);

    let operations = encode(&copies, new.bytes.len());
    if operations.len() > OPERATIONS_BYTES_MAX {
        let (old, new, bytes) = (old.digest, new.digest, operations.len());
        return Err(MakeError::TooManyOperations { old, new, bytes });
    }
    let inserts = inserts(&copies, new.bytes);
    let inserted = inserts.iter().map(|piece| piece.len()).sum();
    let level = if inserted < FAST_BYTES_MIN {
        LEVEL
    } else {
        FAST_LEVEL
    };

    let write = || {
        let frame = compress(Vec::new(), LEVEL, operations.len(), [&operations[..]])?;
        let header = Header {
            old: old.object(),
            new: new.object(),
            inserted_bytes: inserted as u64,
            operations_bytes: bounded(operations.len()),
            operations_frame_bytes: bounded(frame.len()),
        };
        out.write_all(&header.to_bytes())?;
        out.write_all(&frame)?;
        compress(out, level, inserted, inserts)?.flush()
    };
    write().map_err(|source| MakeError::Write {
        old: old.digest,
        new: new.digest,
        source,
    })
}

/// A part of the new object that is also in the old one.
#[derive(Clone, Copy, Debug)]
struct Shared {
    /// Where it starts in the new object.
    start: usize,
    /// Where it starts in the old object.
    offset: usize,
    length: usize,
}

impl Shared {
    fn end(&self) -> usize {
        self.start + self.length
    }

    fn offset_end(&self) -> usize {
        self.offset + self.length
    }
}

/// Whole blocks of `old` that are anywhere in `new`, in the order of `new`.
fn find_copies(old: &[u8], new: &[u8]) -> Vec<Shared> {
    let mut block_bytes = BLOCK_BYTES;
    while old.len().div_ceil(block_bytes) > BLOCKS_MAX {
        block_bytes *= 2;
    }
    let options = SignatureOptions {
        block_size: u32::try_from(block_bytes).expect("no object fills the address space"),
        crypto_hash_size: BLOCK_HASH_BYTES,
    };
    let signature = Signature::calculate(old, options);
    let mut commands = Commands {
        copies: Vec::new(),
        made: 0,
        skip: 4,
        command: Vec::new(),
    };
    diff(&signature.index(), new, &mut commands)
        .expect("the signature is our own, and writing to a parser cannot fail");
    commands.copies
}

/// Takes the librsync delta in the pieces in which `fast_rsync` writes it, and keeps the copies:
/// what lies between them is inserted, and is at hand in the new object.
struct Commands {
    copies: Vec<Shared>,
    /// How much of the new object the commands so far make.
    made: usize,
    /// Bytes that are no command: the magic number at first, then inserted bytes.
    skip: usize,
    /// The beginning of a command.
    command: Vec<u8>,
}

impl Write for Commands {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while let Some(&byte) = rest.first() {
            let taken = if self.skip == 0 {
                self.command.push(byte);
                self.end_command();
                1
            } else {
                let taken = self.skip.min(rest.len());
                self.skip -= taken;
                taken
            };
            rest = &rest[taken..];
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Commands {
    /// Carries the command out if it is complete (opcodes: librsync, `prototab.c`).
    fn end_command(&mut self) {
        let (&code, rest) = self.command.split_first().expect("a byte was just pushed");
        let width = |class: u8| 1 << class; // of an integer: 1, 2, 4 or 8 bytes
        match code {
            0 => {}
            1..=0x40 => self.insert(code.into()),
            0x41..=0x44 if rest.len() < width(code - 0x41) => return,
            0x41..=0x44 => self.insert(integer(rest)),
            0x45..=0x54 => {
                let (offset_width, length_width) =
                    (width((code - 0x45) / 4), width((code - 0x45) % 4));
                if rest.len() < offset_width + length_width {
                    return;
                }
                let (offset, length) = rest.split_at(offset_width);
                let (offset, length) = (integer(offset), integer(length));
                self.copies.push(Shared {
                    start: self.made,
                    offset,
                    length,
                });
                self.made += length;
            }
            _ => unreachable!("librsync has no command {code:#x} that fast_rsync would write"),
        }
        self.command.clear();
    }

    fn insert(&mut self, length: usize) {
        self.made += length;
        self.skip = length;
    }
}

fn integer(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .fold(0, |number, &byte| number << 8 | usize::from(byte))
}

/// Grows every copy into what lies between it and its neighbours, forward first, and joins copies
/// that then continue each other. An empty copy at either end of the objects grows too: that finds
/// the short last block, and everything in objects shorter than a block.
fn grow(copies: &mut Vec<Shared>, old: &[u8], new: &[u8]) {
    copies.insert(
        0,
        Shared {
            start: 0,
            offset: 0,
            length: 0,
        },
    );
    copies.push(Shared {
        start: new.len(),
        offset: old.len(),
        length: 0,
    });
    for right in 1..copies.len() {
        let [left, right] = &mut copies[right - 1..=right] else {
            unreachable!("a range of two is two");
        };
        let gap = &new[left.end()..right.start];
        let forward = gap
            .iter()
            .zip(&old[left.offset_end()..])
            .take_while(|(a, b)| a == b)
            .count();
        left.length += forward;

        let gap = gap[forward..].iter().rev();
        let backward = gap
            .zip(old[..right.offset].iter().rev())
            .take_while(|(a, b)| a == b)
            .count();
        right.start -= backward;
        right.offset -= backward;
        right.length += backward;
    }
    copies.retain(|copy| copy.length > 0);
    copies.dedup_by(|next, kept| {
        let joins = (kept.end(), kept.offset_end()) == (next.start, next.offset);
        kept.length += if joins { next.length } else { 0 };
        joins
    });
}

/// The operations, as the module describes them.
fn encode(copies: &[Shared], new_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut made, mut expected) = (0, 0);
    for copy in copies {
        varint(&mut bytes, (copy.start - made) as u64);
        varint(&mut bytes, copy.length as u64);
        let distance = copy.offset as i64 - expected as i64;
        varint(&mut bytes, (distance << 1 ^ distance >> 63) as u64);
        (made, expected) = (copy.end(), copy.offset_end());
    }
    if made < new_bytes {
        varint(&mut bytes, (new_bytes - made) as u64);
        varint(&mut bytes, 0);
    }
    bytes
}

fn varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// What no copy covers.
fn inserts<'a>(copies: &[Shared], new: &'a [u8]) -> Vec<&'a [u8]> {
    let starts = [0].into_iter().chain(copies.iter().map(Shared::end));
    let ends = copies.iter().map(|copy| copy.start).chain([new.len()]);
    starts
        .zip(ends)
        .map(|(start, end)| &new[start..end])
        .collect()
}

/// The zstd level that suits database lines: higher ones take twice the time and give more bytes.
const LEVEL: i32 = 16;

/// The level for objects that have little in common, where [`LEVEL`] would take a minute.
const FAST_LEVEL: i32 = 1;

/// From so many inserted bytes on, four times those of a day with twenty times the usual change,
/// the fast level is taken. [`LEVEL`] needs 5 s for them.
const FAST_BYTES_MIN: usize = 16 << 20;

/// Writes one zstd frame of the `size` bytes that `pieces` have together.
fn compress<'a, W: Write>(
    out: W,
    level: i32,
    size: usize,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> io::Result<W> {
    let mut encoder = zstd::Encoder::new(out, level)?;
    encoder.window_log(WINDOW_LOG_MAX)?;
    encoder.set_pledged_src_size(Some(size as u64))?;
    for piece in pieces {
        encoder.write_all(piece)?;
    }
    encoder.finish()
}

fn bounded(bytes: usize) -> u32 {
    bytes
        .try_into()
        .expect("the operations were checked against their limit")
}
