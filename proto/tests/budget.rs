//! Files within the budget of a manifest always fit into a manifest.

use std::collections::BTreeSet;

use clamcast_proto::manifest::{
    ContainerFacts, FILES_MAX, Form, MANIFEST_BUDGET, Manifest, ManifestFile, Publisher, SignedBy,
    content_digest,
};
use clamcast_proto::{DatabaseName, Digest, Epoch, Generation};
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// What the names of a set are made of.
#[derive(Clone, Copy, Debug)]
enum Alphabet {
    /// Printable ASCII, with the characters that JSON escapes.
    Ascii,
    /// The same and letters of two and three bytes.
    Wide,
    /// Digits of digests, in which a compressor finds false matches.
    Hexadecimal,
    /// Only characters that JSON escapes, and the text between two names.
    Escaped,
}

/// What is known of each file beside name, size and digest.
#[derive(Clone, Copy, Debug)]
enum Facts {
    None,
    /// A time that no other file has.
    Captured,
    /// The same, and the header of a container.
    Container,
}

fn character(random: &mut StdRng, alphabet: Alphabet) -> char {
    let wide = random.random_range(0xa1..0x1fff_u32);
    let ascii = random.random_range(0x21..0x7f_u8) as char;
    let of = |characters: &[u8], random: &mut StdRng| {
        characters[random.random_range(0..characters.len())] as char
    };
    match alphabet {
        Alphabet::Ascii => ascii,
        Alphabet::Wide if random.random() => char::from_u32(wide).unwrap_or(ascii),
        Alphabet::Wide => ascii,
        Alphabet::Hexadecimal => of(b"0123456789abcdef", random),
        Alphabet::Escaped => of(b"\"\\\"\\,:{}", random),
    }
}

fn name(random: &mut StdRng, alphabet: Alphabet, bytes: usize) -> DatabaseName {
    loop {
        let mut text = String::new();
        while text.len() + ".ndb".len() < bytes {
            text.push(character(random, alphabet));
        }
        while text.len() + ".ndb".len() > bytes.max(5) {
            text.pop();
        }
        // Most characters of a few bytes are allowed; the others are drawn again.
        let allowed = |c: &char| format!("a{c}.ndb").parse::<DatabaseName>().is_ok();
        let text: String = text.chars().filter(allowed).collect();
        if let Ok(name) = format!("{text}.ndb").parse() {
            return name;
        }
    }
}

fn time(random: &mut StdRng) -> Timestamp {
    let second = random.random_range(1_700_000_000..1_900_000_000);
    Timestamp::new(second, random.random_range(0..1_000_000_000)).unwrap()
}

fn file(random: &mut StdRng, alphabet: Alphabet, bytes: usize, facts: Facts) -> ManifestFile {
    let captured = match facts {
        Facts::None => None,
        Facts::Captured | Facts::Container => Some(time(random)),
    };
    let container = match facts {
        Facts::None | Facts::Captured => None,
        Facts::Container => Some(ContainerFacts {
            version: random.random(),
            signatures: random.random(),
            built: Some(time(random)),
            signed_by: Some(match random.random() {
                true => SignedBy::Talos,
                false => SignedBy::None,
            }),
        }),
    };
    ManifestFile {
        name: name(random, alphabet, bytes),
        size: random.random_range(0..2 << 30),
        sha256: Digest::of(&random.random::<[u8; 32]>()),
        captured,
        container,
    }
}

/// As many files as the budget and [`FILES_MAX`] allow.
fn files(random: &mut StdRng, alphabet: Alphabet, bytes: usize, facts: Facts) -> Vec<ManifestFile> {
    let (mut files, mut names, mut budget) = (Vec::new(), BTreeSet::new(), MANIFEST_BUDGET);
    while files.len() < FILES_MAX {
        let file = file(random, alphabet, bytes, facts);
        let Some(left) = budget.checked_sub(file.budget()) else {
            break;
        };
        if names.insert(file.name.folded()) {
            budget = left;
            files.push(file);
        }
    }
    files
}

fn manifest(files: Vec<ManifestFile>) -> Manifest {
    Manifest {
        fleet: "f".repeat(253).parse().unwrap(),
        epoch: Epoch(u64::MAX),
        generation: Generation::new(u64::MAX).unwrap(),
        publisher: Publisher("p".repeat(64)),
        created: Timestamp::MAX,
        previous: Some(Digest::of(b"previous")),
        rollback_of: None,
        content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
        files,
    }
}

#[test]
fn files_within_the_budget_fit_whatever_their_names_are() {
    let mut random = StdRng::seed_from_u64(1);
    for alphabet in [
        Alphabet::Ascii,
        Alphabet::Wide,
        Alphabet::Hexadecimal,
        Alphabet::Escaped,
    ] {
        for facts in [Facts::None, Facts::Captured, Facts::Container] {
            for bytes in [12, 40, 120, 255] {
                let files = files(&mut random, alphabet, bytes, facts);
                let count = files.len();
                let fits = manifest(files).fits();
                assert!(
                    fits.is_ok(),
                    "{count} {alphabet:?} {facts:?} {bytes}: {fits:?}"
                );
            }
        }
    }
}

#[test]
fn six_thousand_loose_files_with_names_of_40_bytes_are_within_the_budget() {
    let mut random = StdRng::seed_from_u64(2);
    let files = files(&mut random, Alphabet::Ascii, 40, Facts::Captured);
    let plain = |file: &&ManifestFile| !file.name.as_str().contains(['"', '\\']);
    let longest = files.iter().filter(plain).map(ManifestFile::budget).max();
    assert!(6_000 * longest.unwrap() <= MANIFEST_BUDGET, "{longest:?}");
    let six_thousand = files.into_iter().take(6_000).collect();
    assert_eq!(manifest(six_thousand).fits(), Ok(Form::Compressed));
}
