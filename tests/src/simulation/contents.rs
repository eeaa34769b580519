//! What is published, and which clamd cannot load it.

use std::collections::HashMap;

use clamcast_proto::Digest;
use clamcast_proto::manifest::ManifestFile;

/// Versions of clamd that hosts have: the bits of a set of them.
pub(super) const CLAMD_VERSIONS: u32 = 3;

/// Every version.
pub(super) const EVERY_CLAMD: u8 = (1 << CLAMD_VERSIONS) - 1;

/// Files that some clamd cannot load.
#[derive(Debug, Default)]
pub(super) struct Bad(HashMap<Digest, u8>);

impl Bad {
    /// The databases of this state of the mirror cannot be loaded by these versions.
    pub(super) fn set(&mut self, state: u64, versions: u8) {
        self.0.insert(daily(state), versions);
    }

    /// Whether a clamd of that version loads these files.
    pub(super) fn loads<'d>(
        &self,
        version: u32,
        files: impl IntoIterator<Item = &'d Digest>,
    ) -> bool {
        let refuses = |digest| {
            self.0
                .get(digest)
                .is_some_and(|set| set & (1 << version) != 0)
        };
        !files.into_iter().any(refuses)
    }
}

/// The databases of one state of the mirror: one is always new, one seldom, one comes and goes.
pub(super) fn files(state: u64) -> Vec<ManifestFile> {
    let file = |name: &str, sha256| ManifestFile {
        captured: None,
        name: name.parse().expect("a database name"),
        size: 1000,
        sha256,
        container: None,
    };
    let mut files = vec![file("daily.cld", daily(state))];
    if !state.is_multiple_of(3) {
        files.push(file(
            "extra.ndb",
            Digest::of(format!("extra {}", state / 2).as_bytes()),
        ));
    }
    files.push(file(
        "main.cvd",
        Digest::of(format!("main {}", state / 4).as_bytes()),
    ));
    files
}

fn daily(state: u64) -> Digest {
    Digest::of(format!("daily {state}").as_bytes())
}
