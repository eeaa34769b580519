//! Finds the units that make a set fail its load test, in few loads.
//!
//! Pure: the load test is an argument.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::units::UnitName;

/// Loads of a search without any culprit, and for each culprit. One load of the official databases takes
/// clamscan ten seconds and more.
const LOADS: u32 = 4;
const LOADS_PER_CULPRIT: u32 = 2;

/// Culprits that are searched for one by one. Beyond that all other suspects are left out together.
const CULPRITS_MAX: u32 = 20;

/// What came of loading a set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// It loads.
    Loads,
    /// It does not.
    Fails {
        /// The units that the loader named.
        named: BTreeSet<UnitName>,
        /// Its reason.
        reason: String,
    },
}

/// What a search found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Found {
    /// The units without which the set loads, with the reason.
    pub(super) held: BTreeMap<UnitName, String>,
    /// Those of them that may be innocent: they were left out together with others.
    pub(super) groups: BTreeSet<UnitName>,
    /// Why the set does not load without them either.
    pub(super) hopeless: Option<String>,
    /// How often a set was loaded.
    pub(super) loads: u32,
}

/// Loads the whole set, and then without some of the `suspects` until it loads. `load` gets the units to
/// leave out. The last set that was loaded is the one without `held`, unless it is hopeless.
///
/// A unit that the loader names is left out at once. Otherwise the suspects are halved: a part that
/// loads is sound, and the culprit is in the rest. Where the loads run out, several units are left out
/// together.
pub(super) fn find<E>(
    mut suspects: Vec<UnitName>,
    mut load: impl FnMut(&BTreeSet<UnitName>) -> Result<Verdict, E>,
) -> Result<Found, E> {
    let mut found = Found::default();
    let mut culprits = 0;
    // The suspects before this one load together.
    let mut sound = 0;
    loop {
        let out: BTreeSet<_> = found.held.keys().cloned().collect();
        found.loads += 1;
        let Verdict::Fails { named, reason } = load(&out)? else {
            return Ok(found);
        };
        let is_named = |unit: &UnitName| named.contains(unit) && culprits < CULPRITS_MAX;
        if suspects.iter().any(is_named) {
            sound -= suspects[..sound].iter().filter(|it| is_named(it)).count();
            let (blamed, left) = suspects.into_iter().partition::<Vec<_>, _>(is_named);
            suspects = left;
            culprits += 1;
            let held = blamed.into_iter().map(|unit| (unit, reason.clone()));
            found.held.extend(held);
            continue;
        }
        if sound == suspects.len() {
            // Nothing that is new is at fault.
            found.hopeless = Some(reason);
            return Ok(found);
        }
        culprits += 1;
        let (mut low, mut high, mut why) = (sound, suspects.len(), reason);
        // One load is for the set without them.
        let limit = match culprits > CULPRITS_MAX {
            true => 0,
            false => LOADS + LOADS_PER_CULPRIT * culprits - 1,
        };
        while high - low > 1 && found.loads < limit {
            let middle = low + (high - low) / 2;
            let mut out = out.clone();
            out.extend(suspects[middle..].iter().cloned());
            found.loads += 1;
            match load(&out)? {
                Verdict::Loads => low = middle,
                Verdict::Fails { reason, .. } => (high, why) = (middle, reason),
            }
        }
        if high - low > 1 {
            found.groups.extend(suspects[low..high].iter().cloned());
            why = format!(
                "it or another one of {} units does not load: {why}",
                high - low
            );
        }
        let held = suspects.drain(low..high).map(|unit| (unit, why.clone()));
        found.held.extend(held);
        sound = low;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches among so many units, of which the `bad` ones do not load. `names`: whether the loader
    /// names the first bad unit. Returns what is held and the number of loads.
    fn search(units: usize, bad: &[usize], names: bool) -> (Vec<usize>, u32) {
        let unit = |number: usize| UnitName::new(format!("{number:04}"));
        let suspects: Vec<_> = (0..units).map(unit).collect();
        let mut last = None;
        let found = find(suspects, |out| {
            let mut left = bad.iter().map(|number| unit(*number));
            let failing = left.find(|unit| !out.contains(unit));
            last = Some((out.clone(), failing.is_none()));
            Ok::<_, ()>(match failing {
                None => Verdict::Loads,
                Some(unit) => Verdict::Fails {
                    named: names.then_some(unit).into_iter().collect(),
                    reason: "Malformed database".to_owned(),
                },
            })
        });
        let found = found.unwrap();
        assert_eq!(found.hopeless, None);
        let held: BTreeSet<_> = found.held.keys().cloned().collect();
        assert_eq!(
            last,
            Some((held, true)),
            "the set that is published was loaded"
        );
        let numbers = found.held.keys().map(|unit| unit.as_str().parse().unwrap());
        (numbers.collect(), found.loads)
    }

    #[test]
    fn a_set_that_loads_is_loaded_once() {
        assert_eq!(search(50, &[], true), (vec![], 1));
        assert_eq!(search(0, &[], false), (vec![], 1));
    }

    #[test]
    fn a_unit_that_the_loader_names_costs_one_more_load() {
        assert_eq!(search(6000, &[17], true), (vec![17], 2));
        assert_eq!(
            search(6000, &[17, 4000, 4001], true),
            (vec![17, 4000, 4001], 4)
        );
    }

    #[test]
    fn a_unit_that_nobody_names_is_found_by_halves() {
        for units in 1..=16 {
            for bad in 0..units {
                let (held, loads) = search(units, &[bad], false);
                assert_eq!(held, [bad], "of {units}");
                assert!(loads <= LOADS + LOADS_PER_CULPRIT, "{loads} loads");
            }
        }
    }

    #[test]
    fn the_number_of_loads_is_bounded_and_what_is_left_loads() {
        for units in [2, 3, 8, 17, 50, 6000] {
            for bad in [
                vec![0],
                vec![0, 1],
                vec![units - 1],
                vec![0, units / 2, units - 1],
            ] {
                let mut bad = bad;
                bad.dedup();
                let (held, loads) = search(units, &bad, false);
                assert!(bad.iter().all(|it| held.contains(it)), "{held:?}");
                let culprits = u32::try_from(bad.len()).unwrap();
                let limit = LOADS + LOADS_PER_CULPRIT * culprits;
                assert!(loads <= limit, "{units} units, {bad:?}: {loads} loads");
            }
        }
    }

    #[test]
    fn a_set_that_fails_for_a_unit_that_is_published_is_hopeless() {
        let fails = |named: &[&str]| Verdict::Fails {
            named: named.iter().map(|name| UnitName::new(*name)).collect(),
            reason: "Malformed database".to_owned(),
        };
        let found = find(vec![UnitName::new("a")], |_| Ok::<_, ()>(fails(&["old"])));
        let found = found.unwrap();
        assert!(found.hopeless.is_some());
        let found = find(vec![UnitName::new("a")], |_| Ok::<_, ()>(fails(&[])));
        assert!(found.unwrap().hopeless.is_some());
    }
}
