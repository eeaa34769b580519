//! From a capture to a generation in the making: each unit is checked, and then the set is loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::time::Instant;

use clamcast_daemon::clamscan::culprit;
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::{FILES_MAX, MANIFEST_BUDGET, Manifest, ManifestFile};
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::{DatabaseName, Digest};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{PublishError, Publisher, RefusalKind, Request};
use crate::chain;
use crate::config::OnBadUnit;
use crate::config::units::UnitName;
use crate::publish::capture::{Capture, CaptureError, Fault, Source, capture};
use crate::publish::check::{LoadTestError, SignatureFiles, admits, judge, load, missing, signs};
use crate::publish::culprits::{Verdict, find};
use crate::publish::mirror::quiet::Reason;
use crate::publish::plan::{
    Cause, CauseKind, Plan, REASONS_SHOWN, Skipped, content, is_signed, listed,
};
use crate::publish::withdrawn::{Directives, newest};

/// What can be made of the mirror.
pub(super) enum Drafted {
    /// A generation, if no obstacle is in it.
    Draft(Box<Draft>),
    /// Nothing: the mirror cannot be captured.
    Obstacle(String),
}

/// A generation in the making.
pub(super) struct Draft {
    pub(super) plan: Plan,
    pub(super) content: Digest,
    pub(super) skipped: Vec<Skipped>,
    /// Why it cannot be published.
    pub(super) obstacle: Option<Obstacle>,
    /// Whether the fleet has it, or went back to it.
    pub(super) is_published: bool,
}

/// Why a draft cannot be published.
pub(super) enum Obstacle {
    /// Some program is at work in the mirror.
    Busy(String),
    /// It has to be mended or accepted.
    Refusal(RefusalKind, String),
}

impl Obstacle {
    pub(super) fn into_refusal(self) -> (RefusalKind, String) {
        match self {
            Self::Busy(reason) => (RefusalKind::Held, reason),
            Self::Refusal(kind, reason) => (kind, reason),
        }
    }

    fn refused(reason: String) -> Self {
        Self::Refusal(RefusalKind::Refused, reason)
    }
}

/// What units are compared with and carried from.
struct Base<'a> {
    /// What the fleet rejected, and which names it accepts.
    directives: &'a Directives,
    /// The newest generation of this master that the fleet did not reject.
    own: Option<Arc<Verified<Manifest>>>,
    /// That, or a higher one of a lost master.
    manifest: Option<Arc<Verified<Manifest>>>,
    /// The files of `manifest` by unit.
    published: BTreeMap<UnitName, Vec<ManifestFile>>,
}

impl Base<'_> {
    fn of(&self, unit: &UnitName) -> &[ManifestFile] {
        self.published.get(unit).map_or(&[], Vec::as_slice)
    }

    fn content(&self) -> Option<Digest> {
        self.manifest.as_ref().map(|manifest| manifest.content)
    }
}

/// A draft before its load test.
struct Checked {
    plan: Plan,
    skipped: Vec<Skipped>,
    /// Whether a unit is held because the fleet rejected it.
    has_rejected: bool,
}

impl Publisher {
    /// Captures the mirror, and makes of it what could be published.
    pub(super) fn draft(
        &self,
        request: &Request,
        directives: &Directives,
        is_preview: bool,
        now: Timestamp,
        stop: &CancellationToken,
    ) -> Result<Drafted, PublishError> {
        let mirror = &self.settings.mirror;
        let accepted = self.accepted_units(request);
        let is_at_work = |reason: &Reason| matches!(reason, Reason::Writing(_) | Reason::Run(_));
        // An operator does not wait for what changed a moment ago.
        let waits_for = |unit: &UnitName, reason: &Reason| {
            (is_at_work(reason) || !request.is_operators) && !accepted.names(unit)
        };
        let source = Source {
            path: &mirror.path,
            units: &mirror.units,
            activity: &self.activity,
            waits_for: &waits_for,
        };
        let capture = match capture(&source, &self.store) {
            Ok(capture) => capture,
            Err(CaptureError::Store(error)) => return Err(error.into()),
            Err(error) => return Ok(Drafted::Obstacle(chain(&error))),
        };
        if !is_preview {
            self.look_again_at(&capture);
        }
        let base = self.base(directives);
        self.verify_named_units(request, &capture, &base)?;

        let mut captured = capture.units.values().flatten().flatten();
        let signatures = match captured.any(|file| file.name.kind() == DatabaseKind::Sign) {
            true => SignatureFiles::of(mirror.cvd_certs.as_deref(), mirror.load_test),
            false => SignatureFiles::Nobody("nobody was asked".to_owned()),
        };
        let Checked {
            mut plan,
            mut skipped,
            has_rejected,
        } = self.check_units(request, &accepted, &capture, &base, &signatures, now)?;
        let unsettled = self.activity.unsettled(Instant::now()).into_iter();
        let overruled =
            unsettled.filter(|(unit, it)| accepted.names(unit) && is_at_work(&it.reason));
        plan.accepted
            .extend(overruled.map(|(unit, it)| format!("{unit}: {it}")));
        let obstacle_of =
            |plan: &Plan| lost_unit(plan, &base).or_else(|| self.refusal_of_holds(plan));
        let mut obstacle = obstacle_of(&plan);
        let may_be_new = base.content() != Some(plan.content()) || self.is_due();
        if obstacle.is_none() && may_be_new && !plan.is_empty() {
            obstacle = self.load_test(&mut plan, &mut skipped, &signatures, stop)?;
            obstacle = obstacle.or_else(|| obstacle_of(&plan));
        }
        let drafted = plan.content();
        let obstacle = obstacle
            .or_else(|| self.missing_databases(&plan))
            .or_else(|| self.rejection_of_all(&accepted, &mut plan, drafted));

        let current = self.store.current();
        let is_current = current.is_some_and(|current| {
            let mut files = current.files.iter();
            current.content == drafted && files.all(|file| admits(mirror.unsigned, file))
        });
        let went_back = has_rejected && base.content() == Some(drafted);
        skipped.sort();
        Ok(Drafted::Draft(Box::new(Draft {
            is_published: (is_current || went_back) && !self.is_due(),
            content: drafted,
            obstacle,
            plan,
            skipped,
        })))
    }

    /// The units that an operator wants in spite of what is wrong with them.
    fn accepted_units(&self, request: &Request) -> Accepted {
        match &request.accept {
            None => Accepted::None,
            Some(accept) if accept.units.is_empty() => Accepted::All,
            Some(accept) => {
                let units = &self.settings.mirror.units;
                Accepted::Some(accept.units.iter().map(|it| units.named(it)).collect())
            }
        }
    }

    /// Refuses the name of a unit that does not exist: it would pass as accepted.
    fn verify_named_units(
        &self,
        request: &Request,
        capture: &Capture,
        base: &Base<'_>,
    ) -> Result<(), PublishError> {
        let named = request.accept.iter().flat_map(|accept| &accept.units);
        for name in named {
            let unit = self.settings.mirror.units.named(name);
            if !capture.units.contains_key(&unit) && !base.published.contains_key(&unit) {
                let name = name.clone();
                return Err(PublishError::NoSuchUnit { name });
            }
        }
        // The likeliest slip: the unit alone, which would accept everything.
        if let Some(accept) = request.accept.as_ref().filter(|it| it.units.is_empty()) {
            let unit = self.settings.mirror.units.named(&accept.reason);
            if capture.units.contains_key(&unit) || base.published.contains_key(&unit) {
                let unit = accept.reason.clone();
                return Err(PublishError::NoReason { unit });
            }
        }
        Ok(())
    }

    /// Has the units captured again that some program was at work on, when it is done.
    fn look_again_at(&self, capture: &Capture) {
        let busy = capture.units.iter();
        let busy = busy.filter(|(_, it)| matches!(it, Err(Fault::Changing | Fault::Waiting(_))));
        let busy: BTreeSet<_> = busy.map(|(unit, _)| unit.clone()).collect();
        if !busy.is_empty() {
            self.activity.again(&busy, Instant::now());
        }
    }

    /// What the fleet has and did not reject, whether this master published it or a lost one.
    fn base<'a>(&self, directives: &'a Directives) -> Base<'a> {
        let own = newest(&self.store.manifests(), &directives.withdrawn);
        let adopted = self.records().adopted.clone();
        let known = own.clone().into_iter().chain(adopted);
        let manifest = known.max_by_key(|manifest| manifest.position());
        Base {
            directives,
            published: self.by_unit(manifest.as_ref()),
            manifest,
            own,
        }
    }

    /// The files of a generation by unit.
    fn by_unit(
        &self,
        manifest: Option<&Arc<Verified<Manifest>>>,
    ) -> BTreeMap<UnitName, Vec<ManifestFile>> {
        let files = manifest.into_iter().flat_map(|it| it.files.iter().cloned());
        self.settings.mirror.units.group(files, |file| &file.name)
    }

    /// Whether the files may be published again without another look at the mirror.
    fn may_be_carried(&self, files: &[ManifestFile]) -> bool {
        let unsigned = self.settings.mirror.unsigned;
        let mut files = files.iter();
        files.all(|file| {
            admits(unsigned, file) && fs::exists(self.store.object(&file.sha256)).unwrap_or(false)
        })
    }

    /// What can be published in the place of a unit that is held. A restored master may lack what the
    /// fleet has; then it is what it published itself.
    fn carried(&self, base: &Base<'_>) -> BTreeMap<UnitName, Vec<ManifestFile>> {
        let own = self.by_unit(base.own.as_ref());
        let carried = base.published.iter().filter_map(|(unit, files)| {
            let older = own.get(unit).filter(|_| !is_signed(files));
            let mut versions = [Some(files), older].into_iter().flatten();
            let version = versions.find(|it| self.may_be_carried(it))?;
            Some((unit.clone(), version.clone()))
        });
        carried.collect()
    }

    /// Checks each unit, and holds or takes it.
    fn check_units(
        &self,
        request: &Request,
        accepted: &Accepted,
        capture: &Capture,
        base: &Base<'_>,
        signatures: &SignatureFiles,
        now: Timestamp,
    ) -> Result<Checked, PublishError> {
        let mirror = &self.settings.mirror;
        let manifests = self.store.manifests();
        let before = match request.is_operators {
            true => BTreeMap::new(),
            false => self.holds(),
        };
        let mut plan = Plan::new(self.carried(base));
        let skipped = capture.skipped.iter().map(|it| Skipped {
            name: it.name.clone(),
            reason: it.reason.to_string(),
        });
        let left_out = capture.left_out.iter().map(|(name, fault)| Skipped {
            name: name.to_string(),
            reason: chain(fault),
        });
        let mut skipped: Vec<_> = skipped.chain(left_out).collect();
        let mut has_rejected = false;
        let gone = base.published.keys();
        let gone = gone.filter(|unit| !capture.units.contains_key(*unit));
        let gone = gone.map(|unit| match capture.waiting.get(unit) {
            None if capture.is_whole => (unit, Ok(&[][..])),
            None => (unit, Err(&Fault::Changing)),
            // A program that replaces a file may have removed it first.
            Some(fault) => (unit, Err(fault)),
        });
        let official = UnitName::official();
        // An unmounted file system takes everything.
        let lacks_official =
            base.published.contains_key(&official) && !capture.units.contains_key(&official);
        let there = capture.units.iter();
        let there = there.map(|(unit, it)| (unit, it.as_ref().map(Vec::as_slice)));
        for (unit, captured) in there.chain(gone) {
            let published = base.of(unit);
            let captured = match captured {
                Ok(captured) => captured,
                Err(fault) => {
                    plan.hold(unit.clone(), cause_of(fault), None);
                    continue;
                }
            };
            let is_gone = captured.is_empty();
            if is_gone && published.is_empty() {
                continue; // signature files without their database
            }
            if let Some(reason) = &base.directives.plain_names
                && !captured.iter().all(|file| file.name.is_plain())
                && published.is_empty()
            {
                skipped.extend(captured.iter().map(|file| Skipped {
                    name: file.name.to_string(),
                    reason: reason.clone(),
                }));
                continue;
            }
            let judged = judge(captured, published, &self.store, mirror, signatures, now)?;
            skipped.extend(judged.left_out);
            let version = content(&judged.files);
            let version = (!judged.files.is_empty()).then_some(version);
            let objections = judged.objections.iter();
            let mut objections: Vec<_> = objections.map(|it| (it.kind(), chain(it))).collect();
            let is_published = !published.is_empty() && version == Some(content(published));
            let is_of_unit = |name: &DatabaseName| mirror.units.of(name) == *unit;
            let withdrawn = &base.directives.withdrawn;
            let condemned = withdrawn.condemnation(&judged.files, &manifests, is_of_unit);
            if let Some((withdrawal, name)) = condemned.filter(|_| !is_published) {
                let (position, outcome) = (withdrawal.position, withdrawal.outcome);
                let text = format!("{name} was new in generation {position}, which was {outcome}");
                objections.push((CauseKind::Questionable, text));
                has_rejected |= !accepted.contains(unit);
            }
            if is_gone && lacks_official && *unit != official {
                let text = "it is gone from the mirror together with the official databases";
                objections.push((CauseKind::Questionable, text.to_owned()));
            }
            if let Some(held) = before.get(unit).map(|it| &it.held)
                && held.cause.kind == CauseKind::Unloadable
                && held.version == version
                && objections.is_empty()
            {
                plan.hold(unit.clone(), held.cause.clone(), version);
                continue;
            }
            let worst = objections.iter().map(|(kind, _)| *kind).max();
            match worst {
                Some(kind) if kind != CauseKind::Questionable || !accepted.contains(unit) => {
                    let cause = Cause::joined(kind, &objections);
                    plan.hold(unit.clone(), cause, version);
                    continue;
                }
                Some(_) | None => plan.accepted.extend(objections.into_iter().map(|it| it.1)),
            }
            match judged.files.is_empty() {
                true => plan.remove(unit.clone()),
                false => plan.take(unit.clone(), judged.files),
            }
        }
        plan.separate_names();
        plan.fit(FILES_MAX, |_| 1, "files");
        plan.fit(
            MANIFEST_BUDGET,
            ManifestFile::budget,
            "bytes of names and digests",
        );
        Ok(Checked {
            plan,
            skipped,
            has_rejected,
        })
    }

    /// Whether the configuration wants nothing published while a unit is held.
    fn refusal_of_holds(&self, plan: &Plan) -> Option<Obstacle> {
        if self.settings.mirror.on_bad_unit == OnBadUnit::Hold {
            return None;
        }
        let worst = plan.held().map(|(_, held)| held.cause.kind).max()?;
        let held = plan.held().filter(|(_, held)| held.cause.kind == worst);
        let reasons = listed(
            held.map(|(_, held)| held.cause.text.as_str()),
            REASONS_SHOWN,
        );
        Some(match worst {
            CauseKind::Restless | CauseKind::Unfinished => Obstacle::Busy(reasons),
            CauseKind::Questionable => {
                let reason = format!("{reasons}; `publish --accept REASON` if that is right");
                Obstacle::Refusal(RefusalKind::Held, reason)
            }
            CauseKind::Broken | CauseKind::Suspect | CauseKind::Unloadable => {
                Obstacle::refused(reasons)
            }
        })
    }

    /// Whether the draft lacks what every generation must have.
    fn missing_databases(&self, plan: &Plan) -> Option<Obstacle> {
        let files = plan.files();
        let why = |unit: &UnitName| {
            let held = plan.held().find(|(held, _)| *held == unit);
            held.map_or_else(String::new, |(unit, held)| {
                format!(": {unit} is held, because {}", held.cause.text)
            })
        };
        if let Some(base) = missing(&files, &self.settings.mirror.require) {
            let unit = self.settings.mirror.units.named(&format!("{base}.cvd"));
            let lack = match plan.held().any(|(held, _)| *held == unit) {
                true => "cannot be published",
                false => "is not in the mirror",
            };
            return Some(Obstacle::refused(format!(
                "{base} {lack}, and the configuration requires it{}",
                why(&unit)
            )));
        }
        let (unit, _) = plan.held().next().filter(|_| files.is_empty())?;
        Some(Obstacle::refused(format!(
            "nothing is left to publish{}",
            why(unit)
        )))
    }

    /// Whether the fleet rejected this very set.
    fn rejection_of_all(
        &self,
        accepted: &Accepted,
        plan: &mut Plan,
        content: Digest,
    ) -> Option<Obstacle> {
        let rejected = self.rejection(content)?;
        let text = rejected.to_string();
        let is_accepted = !matches!(accepted, Accepted::None)
            && plan.changed().iter().all(|unit| accepted.contains(unit));
        if !is_accepted {
            return Some(Obstacle::Refusal(RefusalKind::Held, text));
        }
        if rejected.new.is_none() {
            plan.accepted.push(text); // otherwise the units say it
        }
        None
    }

    /// Loads the draft with clamscan, and holds the units that keep it from loading.
    fn load_test(
        &self,
        plan: &mut Plan,
        skipped: &mut Vec<Skipped>,
        signatures: &SignatureFiles,
        stop: &CancellationToken,
    ) -> Result<Option<Obstacle>, PublishError> {
        let mirror = &self.settings.mirror;
        let mut suspects = plan.changed();
        suspects.sort_by_key(|unit| !unit.is_official());
        let others: BTreeSet<_> = suspects
            .iter()
            .filter(|it| !it.is_official())
            .cloned()
            .collect();
        let signed = suspects.iter().filter(|unit| {
            let mut files = plan.files_of(unit).iter();
            matches!(signatures, SignatureFiles::LoadTest)
                && files.any(|file| file.name.kind() == DatabaseKind::Sign)
        });
        // Signature files that nobody else verified are left out before their database is.
        let signed: BTreeMap<_, _> = signed.map(|it| (signatures_of(it), it.clone())).collect();
        let all = signed.keys().chain(&suspects).cloned().collect();
        let found = find(all, |out| {
            let unsigned = out.iter().filter_map(|unit| signed.get(unit).cloned());
            let files = plan.files_if(out, &unsigned.collect());
            if files.is_empty() {
                return Ok(Verdict::Loads); // clamscan would complain of that
            }
            let error = match load(&files, &self.store, mirror, stop) {
                Ok(()) => return Ok(Verdict::Loads),
                Err(LoadTestError::Stopping) => return Err(PublishError::Stopping),
                // Too little for the official databases is too little on this host. A list of somebody
                // else's that needs more is at fault itself.
                Err(error) if error.is_about_resources() && !others.is_subset(out) => error,
                Err(error) if error.is_ours() => return Err(error.into()),
                Err(error) => error,
            };
            let names = files.iter().map(|file| file.name.as_str());
            let named = error.refusal().and_then(|reason| culprit(reason, names));
            let unit = named.and_then(|name| {
                let file = files.iter().find(|file| file.name.as_str() == name)?;
                let unit = mirror.units.of(&file.name);
                let is_signed = files.iter().any(|it| signs(&it.name, &file.name));
                let signatures = signatures_of(&unit);
                let is_suspect = is_signed && signed.contains_key(&signatures);
                Some(if is_suspect { signatures } else { unit })
            });
            Ok(Verdict::Fails {
                named: unit.into_iter().collect(),
                reason: chain(&error),
            })
        })?;
        if let Some(reason) = found.hopeless {
            return Ok(Some(Obstacle::refused(format!(
                "the load test failed: {reason}"
            ))));
        }
        let (drops, holds): (Vec<_>, Vec<_>) = found
            .held
            .into_iter()
            .partition(|(unit, _)| signed.contains_key(unit));
        for (unit, reason) in drops.into_iter().chain(holds) {
            if let Some(of) = signed.get(&unit) {
                let mut files = plan.files_of(of).iter();
                let name = files.find(|file| file.name.kind() == DatabaseKind::Sign);
                skipped.extend(name.map(|file| Skipped {
                    name: file.name.to_string(),
                    reason: format!("the load test failed with it: {reason}"),
                }));
                plan.drop_signatures(of);
                continue;
            }
            let kind = match found.groups.contains(&unit) {
                true => CauseKind::Suspect,
                false => CauseKind::Unloadable,
            };
            let text = format!("the load test failed: {reason}");
            plan.hold_taken(&unit, Cause { kind, text });
        }
        Ok(None)
    }
}

/// Whether a signed database would be lost because its published version cannot be carried.
fn lost_unit(plan: &Plan, base: &Base<'_>) -> Option<Obstacle> {
    plan.held().find_map(|(unit, held)| {
        if held.carries.is_some() || !is_signed(base.of(unit)) {
            return None;
        }
        let text = &held.cause.text;
        Some(Obstacle::refused(format!(
            "{text}; and the published version of {unit} cannot be published again"
        )))
    })
}

/// Units that an operator accepts.
enum Accepted {
    None,
    Some(BTreeSet<UnitName>),
    All,
}

impl Accepted {
    /// Whether the operator names it. Nobody overrules a program that is at work without looking at the
    /// unit.
    fn names(&self, unit: &UnitName) -> bool {
        matches!(self, Self::Some(units) if units.contains(unit))
    }

    fn contains(&self, unit: &UnitName) -> bool {
        match self {
            Self::None => false,
            Self::Some(units) => units.contains(unit),
            Self::All => true,
        }
    }
}

/// The signature files of a unit, as a suspect of their own. The blank keeps the name from being a
/// unit's.
fn signatures_of(unit: &UnitName) -> UnitName {
    UnitName::new(format!("{unit} .sign"))
}

fn cause_of(fault: &Fault) -> Cause {
    let kind = match fault {
        Fault::Changing => CauseKind::Restless,
        Fault::Waiting(_) => CauseKind::Unfinished,
        Fault::NotAFile { .. }
        | Fault::TooLarge { .. }
        | Fault::Read { .. }
        | Fault::Header { .. } => CauseKind::Broken,
    };
    let text = chain(fault);
    Cause { kind, text }
}
