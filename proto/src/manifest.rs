//! The manifest: the signed, immutable description of one generation.

use std::collections::HashMap;
use std::fmt;

use jiff::Timestamp;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};

use crate::dsse::{Compressed, Envelope, EnvelopeError, PublicKey, Statement, Verified, payload};
use crate::names::DatabaseKind;
use crate::{DatabaseName, Digest, Epoch, FleetName, Generation, Position};

/// Largest manifest payload in bytes: in base64 and with a key set beside it, it fits a control
/// frame of 1 MiB. A manifest whose JSON is longer is compressed.
pub const MANIFEST_BYTES_MAX: usize = 700 << 10;

/// Longest JSON of a compressed manifest in bytes: [`FILES_MAX`] files with the longest names and every
/// fact of a container.
pub const MANIFEST_JSON_BYTES_MAX: usize = 4 << 20;

/// Most files in a manifest. The longest plain manifest has fewer, and clamd takes seconds to open so
/// many.
pub const FILES_MAX: usize = 8_000;

/// Files whose [`ManifestFile::budget`]s have at most this sum fit into a manifest: the payload without
/// 8 KiB for what stands beside the files.
pub const MANIFEST_BUDGET: usize = MANIFEST_BYTES_MAX - (8 << 10);

/// Largest database file in bytes. libclamav maps a database whole and refuses 2 GiB and more
/// (CLI_MAX_ALLOCATION and `cl_engine` limits); the official files are below 300 MB.
pub const DATABASE_BYTES_MAX: u64 = 2 << 30;

/// The statement that a generation consists of these files.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Manifest {
    /// The fleet it is for.
    pub fleet: FleetName,
    /// The epoch of the key set it was signed under.
    pub epoch: Epoch,
    /// Its number within the epoch.
    pub generation: Generation,
    /// Random id of the master's state directory. Two of them in one epoch mean two masters.
    pub publisher: Publisher,
    /// When it was published.
    pub created: Timestamp,
    /// SHA-256 of the preceding manifest's payload; absent in the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Digest>,
    /// The generation whose files these are again, if this is a rollback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_of: Option<Position>,
    /// [`content_digest`] of the files.
    pub content: Digest,
    /// The databases, sorted by name.
    #[serde(deserialize_with = "at_most_files_max")]
    pub files: Vec<ManifestFile>,
}

/// Reads a list of files that ends before it is longer than [`FILES_MAX`].
fn at_most_files_max<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<ManifestFile>, D::Error> {
    struct Files;

    impl<'de> Visitor<'de> for Files {
        type Value = Vec<ManifestFile>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {FILES_MAX} files")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut files = Vec::new();
            while let Some(file) = list.next_element()? {
                if files.len() == FILES_MAX {
                    return Err(A::Error::invalid_length(FILES_MAX + 1, &self));
                }
                files.push(file);
            }
            Ok(files)
        }
    }

    input.deserialize_seq(Files)
}

/// Random id of one master's state directory, 32 hexadecimal digits.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Publisher(pub String);

/// One database of a generation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ManifestFile {
    /// File name in the database directory.
    pub name: DatabaseName,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256 of the content.
    pub sha256: Digest,
    /// When the master last found these bytes in the mirror and they passed its checks. A file that
    /// is held back keeps the time from before. Absent in a manifest of an earlier build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captured: Option<Timestamp>,
    /// What its header says, if it is a container.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerFacts>,
}

/// What the header of a ClamAV container says.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ContainerFacts {
    /// Database version, for example 27821.
    pub version: u64,
    /// Number of signatures.
    pub signatures: u64,
    /// When it was built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built: Option<Timestamp>,
    /// Whose signature was verified. Absent in a manifest of an earlier build, which verified none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<SignedBy>,
}

/// Whose signature over a container was verified.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SignedBy {
    /// Cisco Talos: [`crate::talos`] verified the signature in `.info`.
    Talos,
    /// Nobody: the database carries no signature that says who made it.
    None,
    /// Somebody whom this version does not know.
    #[serde(other)]
    Unknown,
}

impl ManifestFile {
    /// Whose signature was verified when the file was published. `None` for a container that an earlier
    /// build published, and for a `.sign`, which is a signature itself.
    pub fn signed_by(&self) -> Option<SignedBy> {
        match self.name.kind() {
            DatabaseKind::Cvd | DatabaseKind::Cld => {
                self.container.as_ref().and_then(|facts| facts.signed_by)
            }
            DatabaseKind::Cud | DatabaseKind::Loose => Some(SignedBy::None),
            DatabaseKind::Sign => None,
        }
    }

    /// An upper bound of what the file adds to a compressed manifest, in bytes. Compression leaves about
    /// 32 bytes of a digest, five of a size, one byte for each byte of a name that has no pattern, 15 of
    /// a time that no other file has, and some bytes for what is equal in all files. The constants add a
    /// fifth to what was measured at the compression level in use, with names of every length.
    pub fn budget(&self) -> usize {
        const FILE: usize = 56;
        const CAPTURED: usize = 20;
        const CONTAINER: usize = 80;
        let escaped = |b: &u8| matches!(b, b'"' | b'\\');
        let name = self.name.as_str().as_bytes();
        let mut budget = FILE + name.len() + name.iter().filter(|b| escaped(b)).count();
        if self.captured.is_some() {
            budget += CAPTURED;
        }
        if self.container.is_some() {
            budget += CONTAINER;
        }
        budget
    }
}

impl Statement for Manifest {
    const TYPE: &'static str = "application/vnd.clamcast.manifest+json";
    const BYTES_MAX: usize = MANIFEST_BYTES_MAX;
    const COMPRESSED: Option<Compressed> = Some(Compressed {
        payload_type: "application/vnd.clamcast.manifest+json+zstd",
        json_bytes_max: MANIFEST_JSON_BYTES_MAX,
    });
}

/// A manifest cannot be signed, because agents would not read it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TooLarge {
    /// More files than a manifest may have.
    #[error("the manifest would have {found} files, at most {FILES_MAX} are allowed")]
    Files {
        /// How many.
        found: usize,
    },
    /// More bytes than a reader takes.
    #[error(
        "the manifest of {files} databases would have {bytes} bytes {when} compression, at most \
         {limit} are allowed; publish fewer files, or files with shorter names"
    )]
    Bytes {
        /// How many files.
        files: usize,
        /// How many bytes.
        bytes: usize,
        /// `before` or `after`.
        when: &'static str,
        /// The bound.
        limit: usize,
    },
}

/// Why a manifest was not believed.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not signed by a manifest key.
    #[error("the manifest is not to be trusted")]
    Envelope(#[from] EnvelopeError),
    /// Signed, and yet not what a master makes.
    #[error("the manifest of generation {position} is inconsistent: {reason}")]
    Inconsistent {
        /// Which one.
        position: Position,
        /// What is wrong.
        reason: String,
    },
}

/// In which form a manifest is signed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// As JSON, which every agent reads.
    Plain,
    /// Compressed, which agents read that announce [`crate::wire::Feature::LargeManifests`].
    Compressed,
}

/// SHA-256 over the set's sorted (name, size, sha256), one line each: two sets with one digest are
/// the same set.
pub fn content_digest<'f>(
    files: impl IntoIterator<Item = (&'f DatabaseName, u64, &'f Digest)>,
) -> Digest {
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort();
    let mut hasher = Sha256::new();
    for (name, size, sha256) in files {
        hasher.update(format!("{name} {size} {sha256}\n"));
    }
    Digest::finish(hasher)
}

impl Manifest {
    /// Checks signature and consistency.
    pub fn verify<'k>(
        envelope: &Envelope,
        keys: impl IntoIterator<Item = &'k PublicKey> + Clone,
    ) -> Result<Verified<Self>, ManifestError> {
        let manifest: Verified<Self> = envelope.verify(keys)?;
        manifest.check().map_err(|reason| {
            let position = manifest.position();
            ManifestError::Inconsistent { position, reason }
        })?;
        Ok(manifest)
    }

    /// Whether it can be signed so that agents read it, and in which form.
    pub fn fits(&self) -> Result<Form, TooLarge> {
        let files = self.files.len();
        if files > FILES_MAX {
            return Err(TooLarge::Files { found: files });
        }
        let bounded = |bytes: usize, when, limit| match bytes > limit {
            true => Err(TooLarge::Bytes {
                files,
                bytes,
                when,
                limit,
            }),
            false => Ok(()),
        };
        let (payload_type, payload) = payload(self);
        bounded(payload.len(), "after", MANIFEST_BYTES_MAX)?;
        if payload_type == Self::TYPE {
            return Ok(Form::Plain);
        }
        let json = serde_json::to_vec(self).expect("our own statements serialise");
        bounded(json.len(), "before", MANIFEST_JSON_BYTES_MAX)?;
        Ok(Form::Compressed)
    }

    /// The form in which an envelope has a manifest, by its payload type.
    pub fn form_of(envelope: &Envelope) -> Form {
        match envelope.payload_type == Self::TYPE {
            true => Form::Plain,
            false => Form::Compressed,
        }
    }

    /// Where it stands in the fleet's history.
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch,
            generation: self.generation,
        }
    }

    /// The entry of a name. Fast where the files are sorted, as every master writes them.
    pub fn file(&self, name: &DatabaseName) -> Option<&ManifestFile> {
        let sorted = self.files.binary_search_by(|file| file.name.cmp(name));
        let at = sorted.ok().or_else(|| {
            let mut files = self.files.iter();
            files.position(|file| file.name == *name)
        })?;
        self.files.get(at)
    }

    /// The databases without a verified signature of Talos: anyone who can write into the mirror can
    /// have made them.
    pub fn unsigned(&self) -> impl Iterator<Item = &DatabaseName> {
        let unsigned = self.files.iter().filter(|file| {
            file.name.kind() != DatabaseKind::Sign && file.signed_by() != Some(SignedBy::Talos)
        });
        unsigned.map(|file| &file.name)
    }

    /// Length of all files in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// A set clamd would load in part, or twice, is not a set: no name twice, also not on a file
    /// system that folds case, and never both forms of one container.
    fn check(&self) -> Result<(), String> {
        if self.files.is_empty() {
            return Err("it has no files".into()); // clamd does not start without databases
        }
        let mut names = HashMap::new();
        for ManifestFile { name, .. } in &self.files {
            match names.insert(name.folded(), name) {
                Some(other) if other == name => return Err(format!("`{name}` is listed twice")),
                Some(other) => {
                    return Err(format!("`{name}` and `{other}` differ only in case"));
                }
                None => {}
            }
        }
        for file in &self.files {
            let ManifestFile { name, size, .. } = file;
            let other_form = name.other_form();
            if let Some(other) = other_form.and_then(|other| names.get(&other.folded())) {
                return Err(format!("both `{name}` and `{other}` are listed"));
            }
            if *size > DATABASE_BYTES_MAX {
                return Err(format!(
                    "`{name}` has {size} bytes, at most {DATABASE_BYTES_MAX}"
                ));
            }
        }
        let content = content_digest(self.files.iter().map(|f| (&f.name, f.size, &f.sha256)));
        if content != self.content {
            return Err(format!(
                "its files have content digest {content}, not {}",
                self.content
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dsse::sign;
    use ed25519_dalek::SigningKey;

    /// A manifest of files given as `name=content`.
    pub(crate) fn manifest(epoch: u64, generation: u64, files: &[&str]) -> Manifest {
        let files: Vec<_> = files
            .iter()
            .map(|file| {
                let (name, content) = file.split_once('=').unwrap();
                ManifestFile {
                    captured: None,
                    name: name.parse().unwrap(),
                    size: content.len() as u64,
                    sha256: Digest::of(content.as_bytes()),
                    container: None,
                }
            })
            .collect();
        Manifest {
            fleet: "bank".parse().unwrap(),
            epoch: Epoch(epoch),
            generation: Generation::new(generation).unwrap(),
            publisher: Publisher("p1".into()),
            created: Timestamp::UNIX_EPOCH,
            previous: None,
            rollback_of: None,
            content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
            files,
        }
    }

    fn check(manifest: Manifest) -> Result<(), String> {
        let key = SigningKey::from_bytes(&[1; 32]);
        let signed = sign(manifest, &key);
        Manifest::verify(signed.envelope(), [&PublicKey::of(&key)])
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_manifest_is_one_consistent_set() {
        assert_eq!(
            check(manifest(1, 1, &["daily.cld=a", "main.cvd=b"])),
            Ok(())
        );
        for (files, reason) in [
            (&[][..], "no files"),
            (&["daily.cld=a", "daily.cld=b"], "twice"),
            (&["a.ndb=a", "A.NDB=b"], "differ only in case"),
            (&["gr\u{f6}.ndb=a", "GR\u{d6}.ndb=b"], "differ only in case"),
            (&["daily.cld=a", "daily.cvd=b"], "both"),
            (&["daily.cld=a", "DAILY.CVD=b"], "both"),
        ] {
            assert!(
                check(manifest(1, 1, files)).unwrap_err().contains(reason),
                "{files:?}"
            );
        }
        let mut lied = manifest(1, 1, &["daily.cld=a"]);
        lied.files[0].size += 1;
        assert!(check(lied).unwrap_err().contains("content digest"));
    }

    /// So many small files with names of this length.
    fn many(count: usize, name_bytes: usize) -> Manifest {
        let name = |number: usize| format!("{number:0width$}.ndb=x", width = name_bytes - 4);
        let files: Vec<_> = (0..count).map(name).collect();
        let files: Vec<_> = files.iter().map(String::as_str).collect();
        let mut manifest = manifest(1, 1, &files);
        for (number, file) in manifest.files.iter_mut().enumerate() {
            file.sha256 = Digest::of(number.to_string().as_bytes());
        }
        let files = manifest.files.iter();
        manifest.content = content_digest(files.map(|f| (&f.name, f.size, &f.sha256)));
        manifest
    }

    #[test]
    fn a_manifest_up_to_the_old_limit_is_signed_plain_and_a_larger_one_compressed() {
        let small = many(4_000, 40);
        assert_eq!(small.fits(), Ok(Form::Plain));
        let large = many(FILES_MAX, 40);
        assert_eq!(large.fits(), Ok(Form::Compressed));
        for (manifest, form) in [(small, Form::Plain), (large, Form::Compressed)] {
            let signed = sign(manifest.clone(), &SigningKey::from_bytes(&[1; 32]));
            assert_eq!(Manifest::form_of(signed.envelope()), form);
            assert_eq!(signed.envelope().peek::<Manifest>().unwrap(), manifest);
            assert_eq!(check(manifest), Ok(()));
        }
    }

    #[test]
    fn a_manifest_with_too_many_files_is_neither_signed_nor_read() {
        let many = many(FILES_MAX + 1, 10);
        assert_eq!(
            many.fits(),
            Err(TooLarge::Files {
                found: FILES_MAX + 1
            })
        );
        let error = check(many).unwrap_err();
        assert!(error.contains("not to be trusted"), "{error}");
    }

    #[test]
    fn a_file_is_found_by_its_name_in_any_order() {
        let manifest = manifest(1, 1, &["c.ndb=1", "a.ndb=2", "d.ndb=3", "b.ndb=4"]);
        for file in &manifest.files {
            assert_eq!(manifest.file(&file.name), Some(file));
        }
        assert_eq!(manifest.file(&"e.ndb".parse().unwrap()), None);
    }

    #[test]
    fn the_content_digest_does_not_depend_on_the_order() {
        let [ab, ba] = [["a.ndb=1", "b.ndb=2"], ["b.ndb=2", "a.ndb=1"]].map(|f| manifest(1, 1, &f));
        assert_eq!(ab.content, ba.content);
        assert_ne!(ab.content, manifest(1, 1, &["a.ndb=2", "b.ndb=1"]).content);
    }

    #[test]
    fn a_file_name_with_a_slash_or_dots_does_not_parse() {
        let text = serde_json::to_string(&manifest(1, 1, &["daily.cld=a"])).unwrap();
        for bad in ["../daily.cld", "a/daily.cld", "..", "clamcast-canary.hsb"] {
            let bent = text.replace("daily.cld", bad);
            let error = serde_json::from_str::<Manifest>(&bent)
                .unwrap_err()
                .to_string();
            assert!(error.contains("not a database name"), "{error}");
        }
    }

    #[test]
    fn the_payload_has_the_documented_fields() {
        let mut value = manifest(1, 1, &["daily.cld=a"]);
        value.files[0].container = Some(ContainerFacts {
            version: 27001,
            signatures: 5,
            built: Some(Timestamp::UNIX_EPOCH),
            signed_by: Some(SignedBy::Talos),
        });
        let json = serde_json::to_value(&value).unwrap();
        for field in [
            "fleet",
            "epoch",
            "generation",
            "publisher",
            "created",
            "content",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
        assert_eq!(json["files"][0]["version"], 27001);
        assert_eq!(json["files"][0]["signed_by"], "talos");
        let mut later = json.clone();
        later["files"][0]["signed_by"] = "a later signer".into();
        let later: Manifest = serde_json::from_value(later).unwrap();
        assert_eq!(later.files[0].signed_by(), Some(SignedBy::Unknown));
        assert!(later.unsigned().any(|name| *name == later.files[0].name));
        assert_eq!(serde_json::from_value::<Manifest>(json).unwrap(), value);
    }
}
