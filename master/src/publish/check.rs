//! The checks that a capture must pass before anything is signed.

mod jail;
mod load_test;
mod service;
pub mod sign_file;
mod signature_files;

use std::collections::BTreeMap;
use std::fs::File;

use clamcast_daemon::values::Percent;
use clamcast_proto::DatabaseName;
use clamcast_proto::container::{self, ContainerError, Info};
use clamcast_proto::manifest::{ContainerFacts, ManifestFile, SignedBy};
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::talos::SignatureError;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::config::units::{OFFICIAL, is_official};
use crate::config::{Mirror, Unsigned};
use crate::publish::capture::Captured;
use crate::publish::plan::{CauseKind, Skipped};
use crate::store::{Store, StoreError};

pub use jail::{JailError, gaps};
pub use load_test::{LoadTestError, TIME_MAX};
pub use service::{ServiceError, serve};
pub use signature_files::{SignatureFiles, signs};

/// A unit after its checks.
#[derive(Debug, Default)]
pub struct Judged {
    /// Its databases as the manifest lists them, sorted by name. Empty if a check of one failed.
    pub files: Vec<ManifestFile>,
    /// What is wrong with it.
    pub objections: Vec<Objection>,
    /// Signature files that do not travel.
    pub left_out: Vec<Skipped>,
}

/// Why a unit is not published as the mirror has it.
#[derive(Debug, thiserror::Error)]
pub enum Objection {
    /// clamd does not load an empty file of this kind.
    #[error("{name} is empty, and clamd loads no set with it")]
    Empty {
        /// Its name.
        name: DatabaseName,
    },
    /// A container that is not whole, or not a container.
    #[error("{name} is not a whole database")]
    Container {
        /// Its name.
        name: DatabaseName,
        /// What is wrong.
        source: ContainerError,
    },
    /// A `.cvd` or `.cld` that is whole and not Talos's. No setting lets it pass.
    #[error("{name} has no valid signature of Talos; remove it and run freshclam")]
    Signature {
        /// Its name.
        name: DatabaseName,
        /// What is wrong.
        source: SignatureError,
    },
    /// One official database under the name of another. Its signature is valid, and the other database
    /// would be lost.
    #[error("{name} is the database {of} under another name; remove it and run freshclam")]
    Misnamed {
        /// Its name.
        name: DatabaseName,
        /// The official database that it contains.
        of: &'static str,
    },
    /// Not signed by Talos, where only that is published.
    #[error("{name} is not signed by Talos, and the configuration has `unsigned = \"refuse\"`")]
    Unsigned {
        /// Its name.
        name: DatabaseName,
    },
    /// Older than published.
    #[error("{name} has version {found}, version {published} is published")]
    Version {
        /// Its name.
        name: DatabaseName,
        /// Its version.
        found: u64,
        /// The highest version of that base in the current generation.
        published: u64,
    },
    /// Much smaller than published.
    #[error("{name} shrank from {published} to {found} {unit}")]
    Shrunk {
        /// Its name.
        name: DatabaseName,
        /// What it has.
        found: u64,
        /// What the current generation has.
        published: u64,
        /// Of what.
        unit: &'static str,
    },
    /// A signed database that is published and not in the mirror any more.
    #[error("{name} is published and no longer in the mirror")]
    Withdrawn {
        /// Its name.
        name: DatabaseName,
    },
}

impl Objection {
    /// What can be done about it.
    pub fn kind(&self) -> CauseKind {
        match self {
            Self::Version { .. } | Self::Shrunk { .. } | Self::Withdrawn { .. } => {
                CauseKind::Questionable
            }
            Self::Empty { .. }
            | Self::Container { .. }
            | Self::Signature { .. }
            | Self::Misnamed { .. }
            | Self::Unsigned { .. } => CauseKind::Broken,
        }
    }
}

/// Checks the databases of one unit by themselves, and against what is published of it.
pub fn judge(
    captured: &[Captured],
    published: &[ManifestFile],
    store: &Store,
    rules: &Mirror,
    signatures: &SignatureFiles,
    now: Timestamp,
) -> Result<Judged, StoreError> {
    let mut judged = Judged::default();
    for file in captured {
        if file.name.kind() == DatabaseKind::Sign {
            let verified = match file.size {
                0 => Err("it is empty".to_owned()),
                _ => signatures.check(file, captured, store, now)?,
            };
            if let Err(reason) = verified {
                let name = file.name.to_string();
                judged.left_out.push(Skipped { name, reason });
                continue;
            }
        }
        // What is published passed these checks.
        let mut known = published.iter();
        let known = known.find(|it| (&it.name, it.sha256) == (&file.name, file.sha256));
        let known = known.filter(|it| admits(rules.unsigned, it)).cloned();
        let file = match known {
            Some(known) => Ok(known),
            None => self::file(file, store, rules.unsigned)?,
        };
        match file {
            Ok(file) => judged.files.push(ManifestFile {
                captured: Some(now),
                ..file
            }),
            Err(objection) => judged.objections.push(objection),
        }
    }
    if judged.objections.is_empty() {
        judged.objections = versions(&judged.files, published);
        let lost = losses(&judged.files, published, rules.shrink_max);
        judged.objections.extend(lost);
    } else {
        judged.files.clear();
    }
    Ok(judged)
}

/// The first base of `require` that is not among these files.
pub fn missing<'r>(files: &[ManifestFile], require: &'r [String]) -> Option<&'r String> {
    let there = |base: &String| {
        files
            .iter()
            .any(|file| file.name.kind() != DatabaseKind::Sign && file.name.base() == base)
    };
    require.iter().find(|base| !there(base))
}

/// Loads these files with clamscan, if there is one and the rules do not forbid it.
pub fn load(
    files: &[ManifestFile],
    store: &Store,
    rules: &Mirror,
    stop: &CancellationToken,
) -> Result<(), LoadTestError> {
    let objects: Vec<_> = files.iter().map(|it| (&it.name, &it.sha256)).collect();
    let service = &rules.load_test_socket;
    load_test::run(&objects, store, rules.load_test, service, stop)
}

/// Loose files of these kinds may be empty: libclamav loads them.
const EMPTY_ALLOWED: [&str; 11] = [
    ".ign", ".ign2", ".yar", ".yara", ".pdb", ".wdb", ".gdb", ".crb", ".cfg", ".cat", ".ioc",
];

/// Checks one database by itself.
fn file(
    captured: &Captured,
    store: &Store,
    unsigned: Unsigned,
) -> Result<Result<ManifestFile, Objection>, StoreError> {
    let Captured { name, size, sha256 } = captured;
    let has_extension = |extension: &&str| name.folded().ends_with(*extension);
    if *size == 0 && !name.is_container() && !EMPTY_ALLOWED.iter().any(has_extension) {
        let name = name.clone();
        return Ok(Err(Objection::Empty { name }));
    }
    let mut container = None;
    if name.is_container() {
        match check_container(name, store.open_object(sha256)?) {
            Ok(facts) => container = Some(facts),
            Err(objection) => return Ok(Err(objection)),
        }
    }
    let file = ManifestFile {
        name: name.clone(),
        size: *size,
        sha256: *sha256,
        captured: None,
        container,
    };
    Ok(match admits(unsigned, &file) {
        true => Ok(file),
        false => Err(Objection::Unsigned { name: name.clone() }),
    })
}

/// Whether the signer of a file lets it pass. The publisher asks this of published files too: an
/// earlier build verified no signatures, and the rule may have changed since.
pub(super) fn admits(unsigned: Unsigned, file: &ManifestFile) -> bool {
    match file.signed_by() {
        Some(SignedBy::Talos) => true,
        Some(SignedBy::None) => unsigned == Unsigned::Allow,
        Some(SignedBy::Unknown) => false,
        None => file.name.kind() == DatabaseKind::Sign,
    }
}

/// What a container says of itself, after the checks of its structure, signatures and name.
fn check_container(name: &DatabaseName, object: File) -> Result<ContainerFacts, Objection> {
    let summary = container::check(name.kind(), object).map_err(|error| {
        let name = name.clone();
        if let ContainerError::Signature(source) = error {
            return Objection::Signature { name, source };
        }
        Objection::Container {
            name,
            source: error,
        }
    })?;
    if let Some(oddity) = &summary.oddity {
        tracing::warn!(%name, oddity = chain(oddity), "unusual layout accepted: Talos signed every byte");
    }
    if summary.signed_by == SignedBy::Talos
        && let Some(of) = other_official(name.base(), &summary.info)
    {
        let name = name.clone();
        return Err(Objection::Misnamed { name, of });
    }
    Ok(ContainerFacts {
        version: summary.header.version,
        signatures: summary.header.signatures,
        built: Some(summary.header.built),
        signed_by: Some(summary.signed_by),
    })
}

/// The official database that a member or an `.info` belongs to.
fn official(name: &str) -> Option<&'static str> {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    if extension == "cbc" {
        return Some("bytecode"); // whose members have numbers for names
    }
    OFFICIAL.into_iter().find(|official| *official == stem)
}

/// The other official database whose members a file with an official name contains. Talos's signature
/// covers the names of the members, and not the name of the file: a copy of `daily` over `bytecode` has
/// a valid one.
fn other_official(base: &str, info: &Info) -> Option<&'static str> {
    if !is_official(base) {
        return None;
    }
    let members = info.members.iter().map(|member| member.name.as_str());
    let mut found = members.chain([info.base()]).filter_map(official);
    found.find(|official| !official.eq_ignore_ascii_case(base))
}

/// No base has a lower version than it has in the current generation, under whatever extension. What
/// Talos signed and what nobody signed have versions of their own: an unsigned `daily.cud` with a high
/// number keeps no `daily.cld` from the fleet.
fn versions(files: &[ManifestFile], published: &[ManifestFile]) -> Vec<Objection> {
    let highest = highest_versions(published);
    let older = files.iter().filter_map(|file| {
        let found = file.container.as_ref()?.version;
        let published = *highest.get(&Series::of(file))?;
        (found < published).then(|| Objection::Version {
            name: file.name.clone(),
            found,
            published,
        })
    });
    older.collect()
}

/// The highest container version of each series. What an earlier build published without verifying
/// Talos's signature sets no version: it may be forged.
fn highest_versions(files: &[ManifestFile]) -> BTreeMap<Series<'_>, u64> {
    let mut highest = BTreeMap::new();
    for file in files {
        if let Some(facts) = &file.container {
            let series = Series::of(file);
            if series.signed && facts.signed_by != Some(SignedBy::Talos) {
                continue;
            }
            let version = highest.entry(series).or_default();
            *version = facts.version.max(*version);
        }
    }
    highest
}

/// Whether the file only exempts from detection: a shorter one detects more.
fn is_allow_list(name: &DatabaseName) -> bool {
    let name = name.folded();
    [".ign", ".ign2", ".fp", ".sfp"]
        .into_iter()
        .any(|extension| name.ends_with(extension))
}

/// The databases whose versions count upwards together.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
struct Series<'a> {
    base: &'a str,
    /// Whether these are databases of Talos, in both forms.
    signed: bool,
}

impl<'a> Series<'a> {
    fn of(file: &'a ManifestFile) -> Self {
        Self {
            base: file.name.base(),
            signed: file.name.kind() != DatabaseKind::Cud,
        }
    }
}

/// What the current generation has and this one has not, or has much less of.
///
/// The signatures of a container count, since its length also depends on whether it is compressed.
/// A loose file counts by its bytes. A loose file or a `.cud` may disappear: no updater removes those, so
/// an administrator did.
fn losses(
    files: &[ManifestFile],
    published: &[ManifestFile],
    shrink_max: Percent,
) -> Vec<Objection> {
    let mut objections = Vec::new();
    for old in published {
        let name = &old.name;
        let same = |file: &&ManifestFile| {
            file.name == *name || Some(&file.name) == name.other_form().as_ref()
        };
        let Some(new) = files.iter().find(same) else {
            if matches!(name.kind(), DatabaseKind::Cvd | DatabaseKind::Cld) {
                objections.push(Objection::Withdrawn { name: name.clone() });
            }
            continue;
        };
        let (before, now, unit) = match (&old.container, &new.container) {
            (Some(old), Some(new)) => (old.signatures, new.signatures, "signatures"),
            (Some(_) | None, _) => (old.size, new.size, "bytes"),
        };
        if !is_allow_list(name) && before.saturating_sub(now) > shrink_max.of(before) {
            objections.push(Objection::Shrunk {
                name: new.name.clone(),
                found: now,
                published: before,
                unit,
            });
        }
    }
    objections
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::Digest;

    /// A file of 100 bytes, and of 100 signatures if its kind has any.
    fn published(name: &str, version: u64, signed_by: SignedBy) -> ManifestFile {
        let name: DatabaseName = name.parse().unwrap();
        ManifestFile {
            captured: None,
            container: name.is_container().then_some(ContainerFacts {
                version,
                signatures: 100,
                built: None,
                signed_by: Some(signed_by),
            }),
            name,
            size: 100,
            sha256: Digest::of(b""),
        }
    }

    fn lost(old: &[ManifestFile], new: &[ManifestFile]) -> Vec<String> {
        let objections = losses(new, old, Percent::new(30).unwrap());
        objections.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_database_of_talos_that_is_gone_is_held_in_neither_form() {
        let main = |form: &str| published(form, 60, SignedBy::Talos);
        let local = published("local.ndb", 0, SignedBy::None);
        let old = [main("main.cld"), local.clone()];
        assert_eq!(lost(&old, &[main("main.cvd")]), [""; 0]);
        let lost = lost(&old, &[local]);
        assert!(
            lost[0].starts_with("main.cld is published and no longer in the mirror"),
            "{lost:?}"
        );
    }

    #[test]
    fn the_members_tell_which_official_database_it_is() {
        for (name, of) in [
            ("daily.hsb", Some("daily")),
            ("main.info", Some("main")),
            ("767944.cbc", Some("bytecode")),
            ("bytecode", Some("bytecode")),
            ("last.hdb", None),
            ("test.hdb", None),
        ] {
            assert_eq!(official(name), of, "{name}");
        }
    }

    #[test]
    fn a_shorter_allow_list_is_no_loss() {
        let file = |name: &str, size| ManifestFile {
            captured: None,
            size,
            ..published(name, 0, SignedBy::None)
        };
        for (name, held) in [
            ("local.ndb", true),
            ("local.ign2", false),
            ("local.ign", false),
            ("local.fp", false),
            ("local.sfp", false),
        ] {
            let lost = lost(&[file(name, 100)], &[file(name, 1)]);
            assert_eq!(!lost.is_empty(), held, "{name}");
        }
    }

    #[test]
    fn only_verified_versions_of_talos_keep_lower_ones_of_talos_out() {
        let daily = |name, version| published(name, version, SignedBy::Talos);
        for (name, version, passes) in [
            ("daily.cvd", 6, false),
            ("daily.cud", 6, true),
            ("daily.cvd", 7, true),
            ("main.cld", 6, true),
        ] {
            let verdict = versions(&[daily(name, version)], &[daily("daily.cld", 7)]);
            assert_eq!(verdict.is_empty(), passes, "{name} {version}");
        }
        let forged = published("daily.cld", u64::MAX, SignedBy::Unknown);
        assert!(versions(&[daily("daily.cld", 7)], &[forged]).is_empty());
        let unsigned = published("daily.cud", u64::MAX, SignedBy::None);
        assert!(versions(&[daily("daily.cld", 7)], &[unsigned]).is_empty());
    }
}
