//! Applying a delta: a stream in, a stream out, and a few buffers whatever the size.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::ops::Range;

use sha2::{Digest as _, Sha256};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};
use zstd::zstd_safe::compress_bound;

use super::{Header, OPERATIONS_BYTES_MAX, Object, WINDOW_LOG_MAX};
use crate::Digest;

/// Bytes that are read, hashed and written at a time.
const BUFFER_BYTES: usize = 128 << 10;

/// Why a delta was refused or did not make the new object.
///
/// A delta is at fault unless the variant says otherwise, and the full file is the way out.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The stream that the delta comes in failed, or ended before the delta did.
    #[error("cannot read the delta to its end")]
    Receive {
        /// What the stream said.
        source: io::Error,
    },
    /// The stream is no delta, or one of another version.
    #[error("expected a delta of version {version}, found one that starts with {found:02x?}", version = super::VERSION)]
    Unknown {
        /// The first bytes.
        found: [u8; 8],
    },
    /// The delta starts from another object than the one at hand.
    #[error("the delta is for the base {found}, but the base here is {expected}")]
    WrongBase {
        /// What the delta starts from.
        found: Object,
        /// What it was to start from.
        expected: Object,
    },
    /// The delta makes another object than the one that is wanted.
    #[error("the delta makes {found}, but {expected} is wanted")]
    WrongTarget {
        /// What the delta says it makes.
        found: Object,
        /// What it was to make.
        expected: Object,
    },
    /// The delta contradicts itself, a limit, or the format.
    #[error("the delta is damaged: {reason}")]
    Damaged {
        /// What was found, and what was expected.
        reason: &'static str,
    },
    /// The delta holds something that is not zstd, or zstd with too large a window.
    #[error("the delta is damaged: cannot inflate its {part}")]
    Inflate {
        /// The operations or the inserted bytes.
        part: &'static str,
        /// What zstd said.
        source: io::Error,
    },
    /// This host cannot read the old object.
    #[error("cannot read {length} bytes at {offset} of the base")]
    ReadOld {
        /// Where in the old object.
        offset: u64,
        /// How many bytes.
        length: usize,
        /// What the file system said.
        source: io::Error,
    },
    /// This host cannot write the new object.
    #[error("cannot write the new file")]
    Write {
        /// What the file system said.
        source: io::Error,
    },
    /// The result is not what the delta promised: it is damaged, or the old object is not what it
    /// was taken for.
    #[error("the delta made {made}, expected {expected}; the base or the delta is damaged")]
    WrongResult {
        /// SHA-256 of what was written.
        made: Digest,
        /// SHA-256 of the new object.
        expected: Digest,
    },
}

fn damaged(reason: &'static str) -> ApplyError {
    ApplyError::Damaged { reason }
}

/// A delta that starts from the object at hand and makes the one that is wanted, as far as it says.
pub struct Delta<R> {
    header: Header,
    operations: Vec<u8>,
    inserts: Inserts<R>,
}

impl<R: Read> Delta<R> {
    /// Reads the head of a delta from `stream` and refuses it unless it leads from `old` to `new`,
    /// both as signed manifests have them. So everything that is allocated or written later is
    /// bounded by the size that a manifest gives and by the limits of the format.
    ///
    /// The delta must be all that `stream` has.
    pub fn open(mut stream: R, old: Object, new: Object) -> Result<Self, ApplyError> {
        let receive = |source| ApplyError::Receive { source };
        let header = Header::read(&mut stream)
            .map_err(receive)?
            .map_err(|found| ApplyError::Unknown { found })?;
        if header.old != old {
            return Err(ApplyError::WrongBase {
                found: header.old,
                expected: old,
            });
        }
        if header.new != new {
            return Err(ApplyError::WrongTarget {
                found: header.new,
                expected: new,
            });
        }
        if header.inserted_bytes > new.size {
            return Err(damaged("it inserts more than the whole new file"));
        }
        let (bytes, frame_bytes) = (
            header.operations_bytes as usize,
            header.operations_frame_bytes as usize,
        );
        if bytes > OPERATIONS_BYTES_MAX || frame_bytes > compress_bound(bytes) {
            return Err(damaged("its operations are larger than the limit"));
        }
        let mut frame = vec![0; frame_bytes];
        stream.read_exact(&mut frame).map_err(receive)?;
        let operations =
            zstd::bulk::decompress(&frame, bytes).map_err(|source| ApplyError::Inflate {
                part: "operations",
                source,
            })?;
        if operations.len() != bytes {
            return Err(damaged("its operations are shorter than its header says"));
        }
        let inserts = Inserts::new(stream, header.inserted_bytes)?;
        Ok(Self {
            header,
            operations,
            inserts,
        })
    }

    /// Writes the new object to `out` and proves that it is the one that is wanted: the exact
    /// length, and its SHA-256.
    ///
    /// `read_old(buffer, offset)` fills the buffer from that offset of the old object. After an
    /// error `out` has got some of the new object, or all of a wrong one.
    pub fn apply(
        mut self,
        read_old: impl Fn(&mut [u8], u64) -> io::Result<()>,
        out: impl Write,
    ) -> Result<(), ApplyError> {
        let mut output = Output {
            out,
            hasher: Sha256::new(),
            buffer: vec![0; BUFFER_BYTES],
            filled: 0,
        };
        let mut operations = Operations::new(&self.operations, &self.header);
        while let Some(operation) = operations.next()? {
            output.write(operation.insert, |buffer, _| self.inserts.fill(buffer))?;
            let copy = operation.copy;
            output.write(copy.end - copy.start, |buffer, done| {
                let offset = copy.start + done;
                read_old(buffer, offset).map_err(|source| ApplyError::ReadOld {
                    offset,
                    length: buffer.len(),
                    source,
                })
            })?;
        }
        self.inserts.end()?;
        let made = output.finish()?;
        let expected = self.header.new.digest;
        if made != expected {
            return Err(ApplyError::WrongResult { made, expected });
        }
        Ok(())
    }
}

/// First so many inserted bytes, then a part of the old object.
pub(super) struct Operation {
    pub(super) insert: u64,
    pub(super) copy: Range<u64>,
}

/// Reads one operation after the other and answers for it: it makes something, the old object has
/// what it copies, and all together make the new object and nothing beyond.
pub(super) struct Operations<'a> {
    bytes: &'a [u8],
    /// Where in the old object the last copy ended.
    copied_to: u64,
    old_size: u64,
    new_left: u64,
    inserted_left: u64,
}

impl<'a> Operations<'a> {
    pub(super) fn new(bytes: &'a [u8], header: &Header) -> Self {
        Self {
            bytes,
            copied_to: 0,
            old_size: header.old.size,
            new_left: header.new.size,
            inserted_left: header.inserted_bytes,
        }
    }

    pub(super) fn next(&mut self) -> Result<Option<Operation>, ApplyError> {
        if self.bytes.is_empty() {
            return match (self.new_left, self.inserted_left) {
                (0, 0) => Ok(None),
                (0, _) => Err(damaged("its operations leave inserted bytes over")),
                _ => Err(damaged("its operations make less than the new file")),
            };
        }
        let (insert, length) = (self.varint()?, self.varint()?);
        let start = match length {
            0 => self.copied_to,
            _ => {
                let zigzag = self.varint()?;
                let distance = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
                self.copied_to
                    .checked_add_signed(distance)
                    .ok_or(damaged("it copies from before the base"))?
            }
        };
        if insert == 0 && length == 0 {
            return Err(damaged("an operation makes nothing"));
        }
        self.inserted_left = self
            .inserted_left
            .checked_sub(insert)
            .ok_or(damaged("its operations insert more than there is"))?;
        self.new_left = self
            .new_left
            .checked_sub(insert)
            .and_then(|left| left.checked_sub(length))
            .ok_or(damaged("its operations make more than the new file"))?;
        let end = start
            .checked_add(length)
            .filter(|end| *end <= self.old_size)
            .ok_or(damaged("it copies from beyond the base"))?;
        self.copied_to = end;
        Ok(Some(Operation {
            insert,
            copy: start..end,
        }))
    }

    fn varint(&mut self) -> Result<u64, ApplyError> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let (&byte, rest) = self
                .bytes
                .split_first()
                .ok_or(damaged("its operations end within one"))?;
            self.bytes = rest;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(damaged("a number in its operations has more than 64 bits"))
    }
}

/// Inflates the inserted bytes as they are asked for.
struct Inserts<R> {
    stream: BufReader<R>,
    decoder: Decoder<'static>,
    /// Compressed bytes that may still come: a frame can go on for ever without inflating to
    /// anything.
    frame_left: u64,
    ended: bool,
}

const INSERTS: &str = "inserted bytes";

impl<R: Read> Inserts<R> {
    fn new(stream: R, size: u64) -> Result<Self, ApplyError> {
        let inflate = |source| ApplyError::Inflate {
            part: INSERTS,
            source,
        };
        let mut decoder = Decoder::new().map_err(inflate)?;
        decoder
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(inflate)?;
        let frame_left = compress_bound(usize::try_from(size).unwrap_or(usize::MAX)) as u64;
        let stream = BufReader::with_capacity(BUFFER_BYTES, stream);
        Ok(Self {
            stream,
            decoder,
            frame_left,
            ended: false,
        })
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), ApplyError> {
        let mut output = OutBuffer::around(buffer);
        while output.pos() < output.capacity() {
            if self.ended {
                return Err(damaged(
                    "it holds fewer inserted bytes than its header says",
                ));
            }
            self.inflate(&mut output)?;
        }
        Ok(())
    }

    /// Makes sure that neither the frame nor the stream goes on.
    fn end(mut self) -> Result<(), ApplyError> {
        while !self.ended {
            let mut beyond = [0];
            let mut output = OutBuffer::around(&mut beyond[..]);
            self.inflate(&mut output)?;
            if output.pos() > 0 {
                return Err(damaged("it holds more inserted bytes than its header says"));
            }
        }
        if !self.input()?.is_empty() {
            return Err(damaged("something follows it"));
        }
        Ok(())
    }

    fn inflate(&mut self, output: &mut OutBuffer<'_, [u8]>) -> Result<(), ApplyError> {
        let before = output.pos();
        self.input()?;
        let mut input = InBuffer::around(self.stream.buffer());
        let hint = self
            .decoder
            .run(&mut input, output)
            .map_err(|source| ApplyError::Inflate {
                part: INSERTS,
                source,
            })?;
        let taken = input.pos();
        self.stream.consume(taken);
        self.frame_left = self.frame_left.checked_sub(taken as u64).ok_or(damaged(
            "its inserted bytes are compressed to more than they are",
        ))?;
        self.ended = hint == 0;
        if taken == 0 && output.pos() == before && !self.ended {
            return Err(ApplyError::Receive {
                source: io::ErrorKind::UnexpectedEof.into(),
            });
        }
        Ok(())
    }

    /// What has come and was not inflated yet; nothing only at the end of the stream.
    fn input(&mut self) -> Result<&[u8], ApplyError> {
        loop {
            match self.stream.fill_buf() {
                Ok(_) => return Ok(self.stream.buffer()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ApplyError::Receive { source }),
            }
        }
    }
}

/// Gathers small pieces, then hashes and writes them together.
struct Output<W> {
    out: W,
    hasher: Sha256,
    buffer: Vec<u8>,
    filled: usize,
}

impl<W: Write> Output<W> {
    /// Takes `length` bytes from `fill(buffer, done)`, which fills the buffer with what comes after
    /// the `done` bytes it gave before.
    fn write(
        &mut self,
        length: u64,
        mut fill: impl FnMut(&mut [u8], u64) -> Result<(), ApplyError>,
    ) -> Result<(), ApplyError> {
        let mut done = 0;
        while done < length {
            let room = &mut self.buffer[self.filled..];
            let piece = usize::try_from(length - done)
                .unwrap_or(usize::MAX)
                .min(room.len());
            fill(&mut room[..piece], done)?;
            done += piece as u64;
            self.filled += piece;
            if self.filled == self.buffer.len() {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ApplyError> {
        let bytes = &self.buffer[..self.filled];
        self.hasher.update(bytes);
        self.out
            .write_all(bytes)
            .map_err(|source| ApplyError::Write { source })?;
        self.filled = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<Digest, ApplyError> {
        self.flush()?;
        self.out
            .flush()
            .map_err(|source| ApplyError::Write { source })?;
        Ok(Digest::finish(self.hasher))
    }
}
