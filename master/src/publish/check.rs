//! The checks that a capture must pass before anything is signed.

mod jail;
mod load_test;
mod service;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;

use clamcast_daemon::values::Percent;
use clamcast_proto::container::{self, ContainerError, Info};
use clamcast_proto::manifest::{ContainerFacts, Manifest, ManifestFile, SignedBy};
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::talos::SignatureError;
use clamcast_proto::{DatabaseName, Digest};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::config::{Mirror, Unsigned};
use crate::publish::capture::{Capture, Captured};
use crate::publish::units::OFFICIAL;
use crate::store::{Store, StoreError};

pub use jail::{JailError, gaps};
pub use load_test::{LoadTestError, TIME_MAX};
pub use service::{ServiceError, serve};

/// A capture that may be signed.
#[derive(Debug)]
pub struct Checked {
    /// The databases as the manifest lists them, sorted by name.
    pub files: Vec<ManifestFile>,
    /// What would have been held, had an operator not accepted it.
    pub accepted: Vec<Objection>,
}

/// Why a capture is not published.
#[derive(Debug, thiserror::Error)]
pub enum Objection {
    /// One name on a file system that folds case.
    #[error("{one} and {other} differ in capitals only")]
    Names {
        /// One.
        one: DatabaseName,
        /// The other.
        other: DatabaseName,
    },
    /// A base that must be there.
    #[error("{base} is not in the mirror, and the configuration requires it")]
    Required {
        /// The base name.
        base: String,
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
    #[error(
        "{name} shrank from {published} to {found} {unit}; `publish --accept REASON` if that is right"
    )]
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
    #[error(
        "{name} is published and no longer in the mirror; `publish --accept REASON` if that is right"
    )]
    Withdrawn {
        /// Its name.
        name: DatabaseName,
    },
    /// `clamscan` could not load it.
    #[error("the load test failed")]
    LoadTest(#[from] LoadTestError),
    /// Ours, not the capture's.
    #[error("cannot check the capture")]
    Store(#[from] StoreError),
}

impl Objection {
    /// Whether an operator may overrule it.
    pub fn may_be_accepted(&self) -> bool {
        matches!(self, Self::Shrunk { .. } | Self::Withdrawn { .. })
    }
}

/// Checks a capture against the rules and the current generation. `accept`: an operator overrules
/// what may be overruled. `stop` breaks the load test off.
///
/// The cheap checks come first. The load test is the last, so that `clamscan` never sees what is
/// known to be broken.
pub fn check(
    capture: &Capture,
    store: &Store,
    rules: &Mirror,
    published: Option<&Manifest>,
    accept: bool,
    stop: &CancellationToken,
) -> Result<Checked, Objection> {
    names(&capture.files)?;
    required(&capture.files, &rules.require)?;
    let mut files = Vec::new();
    for captured in &capture.files {
        files.push(file(captured, store, rules.unsigned)?);
    }
    let mut accepted = Vec::new();
    if let Some(published) = published {
        versions(&files, &published.files)?;
        for objection in losses(&files, &published.files, rules.shrink_max) {
            if !accept {
                return Err(objection);
            }
            accepted.push(objection);
        }
    }
    let objects: Vec<(&DatabaseName, &Digest)> = files
        .iter()
        .map(|file| (&file.name, &file.sha256))
        .collect();
    let service = &rules.load_test_socket;
    load_test::run(&objects, store, rules.load_test, service, stop)?;
    Ok(Checked { files, accepted })
}

/// Agents may have a file system that folds case.
fn names(files: &[Captured]) -> Result<(), Objection> {
    let mut folded = HashMap::new();
    for Captured { name: one, .. } in files {
        if let Some(other) = folded.insert(one.as_str().to_ascii_lowercase(), one) {
            let (one, other) = (one.clone(), other.clone());
            return Err(Objection::Names { one, other });
        }
    }
    Ok(())
}

fn required(files: &[Captured], require: &[String]) -> Result<(), Objection> {
    let there = |base: &String| {
        files
            .iter()
            .any(|file| file.name.kind() != DatabaseKind::Sign && file.name.base() == base)
    };
    match require.iter().find(|base| !there(base)) {
        Some(base) => Err(Objection::Required { base: base.clone() }),
        None => Ok(()),
    }
}

/// Checks one database by itself.
fn file(captured: &Captured, store: &Store, unsigned: Unsigned) -> Result<ManifestFile, Objection> {
    let Captured { name, size, sha256 } = captured;
    let mut container = None;
    if name.is_container() {
        container = Some(check_container(name, store.open_object(sha256)?)?);
    }
    let file = ManifestFile {
        captured: None,
        name: name.clone(),
        size: *size,
        sha256: *sha256,
        container,
    };
    if !admits(unsigned, &file) {
        return Err(Objection::Unsigned { name: name.clone() });
    }
    Ok(file)
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
    if !OFFICIAL.contains(&base) {
        return None;
    }
    let members = info.members.iter().map(|member| member.name.as_str());
    let mut found = members.chain([info.base()]).filter_map(official);
    found.find(|official| *official != base)
}

/// No base has a lower version than it has in the current generation, under whatever extension. What
/// Talos signed and what nobody signed have versions of their own: an unsigned `daily.cud` with a high
/// number keeps no `daily.cld` from the fleet.
fn versions(files: &[ManifestFile], published: &[ManifestFile]) -> Result<(), Objection> {
    let highest = highest_versions(published);
    for file in files {
        let (Some(facts), Some(published)) = (&file.container, highest.get(&Series::of(file)))
        else {
            continue;
        };
        if facts.version < *published {
            return Err(Objection::Version {
                name: file.name.clone(),
                found: facts.version,
                published: *published,
            });
        }
    }
    Ok(())
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
    [".ign", ".ign2", ".fp", ".sfp"]
        .into_iter()
        .any(|extension| name.as_str().ends_with(extension))
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
/// A loose file counts by its bytes. That a loose file or a `.cud` is gone is no objection: only
/// whoever looks after the mirror removes those.
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
            assert_eq!(verdict.is_ok(), passes, "{name} {version}");
        }
        let forged = published("daily.cld", u64::MAX, SignedBy::Unknown);
        assert!(versions(&[daily("daily.cld", 7)], &[forged]).is_ok());
        let unsigned = published("daily.cud", u64::MAX, SignedBy::None);
        assert!(versions(&[daily("daily.cld", 7)], &[unsigned]).is_ok());
    }
}
