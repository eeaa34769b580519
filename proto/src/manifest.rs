//! The manifest: the signed, immutable description of one generation.

use std::collections::HashSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::dsse::{Envelope, EnvelopeError, PublicKey, Statement, Verified};
use crate::names::DatabaseKind;
use crate::{DatabaseName, Digest, Epoch, FleetName, Generation, Position};

/// Largest manifest payload in bytes: in base64 and with a key set beside it, it fits a control
/// frame of 1 MiB.
pub const MANIFEST_BYTES_MAX: usize = 700 << 10;

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
    pub files: Vec<ManifestFile>,
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
}

impl Statement for Manifest {
    const TYPE: &'static str = "application/vnd.clamcast.manifest+json";
    const BYTES_MAX: usize = MANIFEST_BYTES_MAX;
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

    /// Where it stands in the fleet's history.
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch,
            generation: self.generation,
        }
    }

    /// The entry of a name.
    pub fn file(&self, name: &DatabaseName) -> Option<&ManifestFile> {
        self.files.iter().find(|file| file.name == *name)
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
        let mut names = HashSet::new();
        for file in &self.files {
            let ManifestFile { name, size, .. } = file;
            if !names.insert(name.as_str().to_ascii_lowercase()) {
                return Err(format!("`{name}` is listed twice"));
            }
            if let Some(other) = name.other_form().filter(|other| self.file(other).is_some()) {
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
            (&["a.ndb=a", "A.ndb=b"], "twice"),
            (&["daily.cld=a", "daily.cvd=b"], "both"),
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
