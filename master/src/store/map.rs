//! Objects as slices of memory: fast_rsync wants the old and the new file whole, and they may have
//! hundreds of megabytes each, which as page cache cost nothing that cannot be dropped.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps an object of the store for reading.
///
/// Sound only for files that nobody changes or cuts while they are mapped, which is why this takes
/// nothing but what the store keeps: written once, by us, under a name that is its digest, mode
/// 0444, in a directory that is ours. Retention unlinks a file and so leaves a mapping whole.
#[expect(
    unsafe_code,
    reason = "a mapping is undefined behaviour if the file changes under it; objects never do"
)]
pub(super) fn object(file: &File) -> io::Result<Mmap> {
    // SAFETY: see above; the file is an object, and objects are immutable.
    unsafe { Mmap::map(file) }
}
