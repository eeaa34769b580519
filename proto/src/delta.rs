//! Deltas: the recipe that makes one object from another.
//!
//! A delta says which parts of the old object to copy and what to insert between them. The master
//! makes it once for a pair of objects ([`make`]); an agent opens it, which refuses a delta for
//! another pair before any work, and applies it as a stream ([`Delta`]).
//!
//! # Format
//!
//! Integers of fixed width are unsigned and big-endian.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! |   0 |  7 | `clamdlt` |
//! |   7 |  1 | version of the format, 1 |
//! |   8 | 32 | SHA-256 of the old object |
//! |  40 | 32 | SHA-256 of the new object |
//! |  72 |  8 | size of the old object in bytes |
//! |  80 |  8 | size of the new object in bytes |
//! |  88 |  8 | inserted bytes in all |
//! |  96 |  4 | size of the operations, inflated; at most [`OPERATIONS_BYTES_MAX`] |
//! | 100 |  4 | size `n` of the operations, compressed |
//! | 104 | `n` | the operations, one zstd frame (RFC 8878) |
//! | 104 + `n` | to the end | the inserted bytes, one zstd frame with a window of at most 2^[`WINDOW_LOG_MAX`] bytes |
//!
//! An operation is two or three varints (LEB128: seven bits a byte, the lowest first, the top bit
//! set on all but the last byte; at most 64 bits):
//!
//! 1. how many inserted bytes come next in the new object;
//! 2. how many bytes of the old object come after those;
//! 3. only if these are not none: where they start in the old object, as the distance from the end
//!    of the previous copy (from 0 for the first), zigzag (`(d << 1) ^ (d >> 63)`), so that a step
//!    back is a small number too.
//!
//! An operation makes at least one byte; together they make the new object and use up the inserted
//! bytes exactly. Nothing follows either frame.
//!
//! The operations are in a stream of their own because they compress differently from the
//! inserted bytes, and come first, whole, because they are small.

mod apply;
mod make;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, Read};

pub use apply::{ApplyError, Delta};
pub use make::{Input, MakeError, make};

use crate::Digest;

/// The version of the format. It belongs into the key under which a delta is kept.
pub const VERSION: u8 = 1;

/// Most bytes of operations, inflated. The agent holds them in memory; the busiest day needs 0.1
/// MB, and a delta of more operations than fit saves little.
pub const OPERATIONS_BYTES_MAX: usize = 2 << 20;

/// Largest window of the inserted bytes' zstd frame, as a power of two: the agent allocates it, and
/// has 16 MiB for everything. A larger one makes no delta of databases smaller.
pub const WINDOW_LOG_MAX: u32 = 20;

const MAGIC: [u8; 8] = [b'c', b'l', b'a', b'm', b'd', b'l', b't', VERSION];

/// The content of a file, as a manifest names it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Object {
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// How many bytes there are.
    pub size: u64,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.digest, self.size)
    }
}

/// What stands in front of the two frames.
struct Header {
    old: Object,
    new: Object,
    inserted_bytes: u64,
    operations_bytes: u32,
    operations_frame_bytes: u32,
}

impl Header {
    const BYTES: usize = 104;

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.old.digest.as_bytes());
        bytes.extend(self.new.digest.as_bytes());
        bytes.extend(self.old.size.to_be_bytes());
        bytes.extend(self.new.size.to_be_bytes());
        bytes.extend(self.inserted_bytes.to_be_bytes());
        bytes.extend(self.operations_bytes.to_be_bytes());
        bytes.extend(self.operations_frame_bytes.to_be_bytes());
        bytes
    }

    /// The inner error is what the eight first bytes are instead of ours.
    fn read(stream: &mut impl Read) -> io::Result<Result<Self, [u8; 8]>> {
        let magic = array(stream)?;
        if magic != MAGIC {
            return Ok(Err(magic));
        }
        let [old, new] = [array::<32>(stream)?, array::<32>(stream)?].map(Digest::from);
        let mut number = || array(stream).map(u64::from_be_bytes);
        Ok(Ok(Self {
            old: Object {
                digest: old,
                size: number()?,
            },
            new: Object {
                digest: new,
                size: number()?,
            },
            inserted_bytes: number()?,
            operations_bytes: u32::from_be_bytes(array(stream)?),
            operations_frame_bytes: u32::from_be_bytes(array(stream)?),
        }))
    }
}

fn array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
