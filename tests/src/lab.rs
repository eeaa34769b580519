//! The laboratory: real programs on real directories and sockets, cleaned up after themselves.
//!
//! A test first says what it cannot do without, then uses it:
//!
//! ```no_run
//! use clamcast_tests::{lab, require};
//!
//! fn the_mirror_reaches_clamd() {
//!     require!(Clamd, Freshclam, TestFiles);
//!     let mirror = lab::Mirror::new();
//!     mirror.freshclam_to(2);
//!     let mut clamd = lab::Clamd::new(mirror.directory());
//!     clamd.start();
//!     clamd.wait_ready();
//!     assert!(clamd.scan(b"nothing bad").unwrap().ends_with("OK"));
//! }
//! ```
//!
//! Ports are chosen by the system, sockets and files live in a [`Scratch`] directory, and no more
//! than [`CLAMDS_MAX`] clamds run at a time, whatever runs the tests.

mod clamd;
mod container;
mod datagrams;
mod dns;
mod fleet;
mod freeze;
mod mirror;
mod mount;
mod needs;
mod packages;
mod proxy;
mod rogue;
mod scratch;
mod slots;
mod strace;
mod tree;
mod until;
mod usage;

pub use clamd::Clamd;
pub use container::{Container, Dismantled, certificates_in, hash_signature, signatures};
pub use datagrams::{halfway, initials, send_from};
pub use dns::NameServer;
pub use fleet::{Agent, Daemon, Fleet, Master, program};
pub use freeze::{freeze, threads};
pub use mirror::{Hold, Mirror, Update};
pub use mount::{Mount, SmallDisk};
pub use needs::{Part, make_corpus, named, needs, search_path, target, wants_long};
pub use packages::package;
pub use proxy::{Counts, Link, UdpProxy};
pub use rogue::{Conversation, Rogue, code, hello, receipt, with_transport};
pub use scratch::Scratch;
pub use slots::CLAMDS_MAX;
pub use strace::{Call, Strace};
pub use tree::{Tree, succeeded};
pub use until::{Answer, PATIENCE, pace, until, until_async};
pub use usage::{Usage, datagrams_dropped};
