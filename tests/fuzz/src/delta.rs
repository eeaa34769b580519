//! `delta`: the recipe that makes one object from another, compared with a second reader that holds
//! everything in memory.

use std::io::{self, Write};

use arbitrary::Unstructured;
use clamcast_proto::Digest;
use clamcast_proto::delta::{ApplyError, Delta, Input, Object, make};

use crate::render;

/// Bytes of the header in front of the two frames.
const HEADER_BYTES: usize = 104;

/// Largest object of the targets: operations of a few bytes can ask for as much as a manifest allows.
const OBJECT_BYTES_MAX: u64 = 1 << 20;

/// Takes the input as a delta, as the operations and inserted bytes of one, or as two objects between
/// which a delta is made.
pub fn delta(bytes: &[u8]) -> bool {
    let Some((&mode, rest)) = bytes.split_first() else {
        return false;
    };
    match mode % 3 {
        0 => raw(rest),
        1 => parts(&mut Unstructured::new(rest)).unwrap_or(false),
        _ => between(&mut Unstructured::new(rest)).unwrap_or(false),
    }
}

/// Takes the input as a delta from our old object to the object that its header names.
fn raw(stream: &[u8]) -> bool {
    let header = stream.first_chunk().unwrap_or(&[0; HEADER_BYTES]);
    let (digest, size) = (header[40..72].first_chunk(), header[80..88].first_chunk());
    let new = Object {
        digest: Digest::from(*digest.expect("32 bytes")),
        // Operations of a few bytes can ask for as much as this.
        size: u64::from_be_bytes(*size.expect("8 bytes")).min(OBJECT_BYTES_MAX),
    };
    apply(stream, &counted(256), new).is_some()
}

/// Makes a delta of operations and inserted bytes, and a header that may lie.
fn parts(input: &mut Unstructured<'_>) -> arbitrary::Result<bool> {
    let old = counted(input.int_in_range(0..=300)?);
    let new_size = input.int_in_range(0..=1000)?;
    let lie: u8 = input.int_in_range(0..=9)?;
    let change: i8 = input.arbitrary()?;
    let length = input.int_in_range(0..=32)?;
    let operations = input.bytes(length.min(input.len()))?;
    let inserts = input.bytes(input.len().min(512))?;

    let made = second_reader(&old, operations, inserts, new_size);
    let new = Object {
        digest: Digest::of(made.as_deref().unwrap_or(b"nothing")),
        size: new_size as u64,
    };
    let bent = |length: usize, which: u8| match lie == which {
        true => (length as i64).wrapping_add(change.into()) as u64,
        false => length as u64,
    };
    let frame = zstd::bulk::compress(operations, 1).expect("memory takes everything");
    let mut stream = b"clamdlt\x01".to_vec();
    stream.extend(Digest::of(&old).as_bytes());
    stream.extend(new.digest.as_bytes());
    stream.extend(bent(old.len(), 1).to_be_bytes());
    stream.extend(bent(new_size, 2).to_be_bytes());
    stream.extend(bent(inserts.len(), 3).to_be_bytes());
    stream.extend((bent(operations.len(), 4) as u32).to_be_bytes());
    stream.extend((bent(frame.len(), 5) as u32).to_be_bytes());
    stream.extend(frame);
    let more = match lie {
        7 => usize::from(change.unsigned_abs()),
        _ => 0,
    };
    let inserted = [inserts, &counted(more)].concat();
    stream.extend(zstd::bulk::compress(&inserted, 1).expect("memory takes everything"));
    if lie == 6 {
        let length = stream.len().saturating_add_signed(change.into());
        stream.resize(length, 0);
    }

    let honest = !(1..=7).contains(&lie) || change == 0;
    let result = apply(&stream, &old, new);
    match (honest, made) {
        (true, made) => assert_eq!(result, made),
        (false, _) => assert_eq!(result, None, "lie {lie} by {change}"),
    }
    Ok(result.is_some())
}

/// Makes a delta between two objects and applies it.
fn between(input: &mut Unstructured<'_>) -> arbitrary::Result<bool> {
    let mut old = Vec::new();
    for _ in 0..input.int_in_range(0..=4)? {
        let (seed, length) = (input.arbitrary()?, input.int_in_range(0..=1500)?);
        old.extend(noise(seed).take(length));
    }
    let mut new = Vec::new();
    while !input.is_empty() && new.len() < 8000 {
        match input.int_in_range(0..=3)? {
            0 => {
                let length = input.int_in_range(0..=32)?;
                new.extend(input.bytes(length.min(input.len()))?);
            }
            1 => {
                let (seed, length) = (input.arbitrary()?, input.int_in_range(0..=600)?);
                new.extend(noise(seed).take(length));
            }
            _ => {
                let start = input.int_in_range(0..=old.len())?;
                let end = input.int_in_range(start..=old.len())?;
                new.extend(&old[start..end]);
            }
        }
    }
    let input = |bytes| Input {
        digest: Digest::of(bytes),
        bytes,
    };
    let mut delta = Vec::new();
    make(input(&old), input(&new), &mut delta).expect("there are few operations");
    let made = apply(&delta, &old, object(&new));
    assert_eq!(made.as_ref(), Some(&new));
    Ok(true)
}

/// Applies a delta: it reads nothing beyond the old object, and writes no more than the new one has.
fn apply(stream: &[u8], old: &[u8], new: Object) -> Option<Vec<u8>> {
    let mut out = Bounded {
        bytes: Vec::new(),
        limit: new.size,
    };
    let read_old = |buffer: &mut [u8], offset| {
        let rest = usize::try_from(offset).ok().and_then(|at| old.get(at..));
        let piece = rest.and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(piece.expect("within the old object"));
        Ok(())
    };
    let opened = Delta::open(stream, object(old), new);
    match opened.and_then(|delta| delta.apply(read_old, &mut out)) {
        Ok(()) => {
            assert_eq!(object(&out.bytes), new);
            Some(out.bytes)
        }
        Err(error) => {
            let ours = matches!(error, ApplyError::ReadOld { .. } | ApplyError::Write { .. });
            assert!(!ours, "{}", render(&error));
            None
        }
    }
}

/// Panics rather than taking more than it should.
struct Bounded {
    bytes: Vec<u8>,
    limit: u64,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend(bytes);
        assert!(self.bytes.len() as u64 <= self.limit, "more than declared");
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Carries out operations as the format describes them.
fn second_reader(old: &[u8], operations: &[u8], inserts: &[u8], size: usize) -> Option<Vec<u8>> {
    let (mut operations, mut inserts) = (operations.iter(), inserts.iter());
    let mut new = Vec::new();
    let mut copied_to = 0;
    while !operations.as_slice().is_empty() {
        let insert = varint(&mut operations)?;
        let length = varint(&mut operations)?;
        if insert + length == 0 || insert + length > (size - new.len()) as i128 {
            return None;
        }
        for _ in 0..insert {
            new.push(*inserts.next()?);
        }
        if length > 0 {
            let zigzag = varint(&mut operations)?;
            let start = copied_to
                + match zigzag % 2 {
                    0 => zigzag / 2,
                    _ => -(zigzag / 2) - 1,
                };
            copied_to = start + length;
            let copy = usize::try_from(start).ok()?..usize::try_from(copied_to).ok()?;
            new.extend(old.get(copy)?);
        }
    }
    (new.len() == size && inserts.as_slice().is_empty()).then_some(new)
}

fn varint(bytes: &mut std::slice::Iter<'_, u8>) -> Option<i128> {
    let mut number = 0;
    for index in 0..10 {
        let byte = *bytes.next()?;
        number |= i128::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            return (number <= u64::MAX.into()).then_some(number);
        }
    }
    None
}

fn object(bytes: &[u8]) -> Object {
    Object {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
    }
}

/// Bytes of which no two neighbours are equal.
fn counted(length: usize) -> Vec<u8> {
    (0..length).map(|index| index as u8).collect()
}

/// Bytes without a pattern (xorshift32).
fn noise(seed: u8) -> impl Iterator<Item = u8> {
    let mut state = u32::from(seed) + 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
}
