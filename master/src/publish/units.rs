//! Units: the files of the mirror that are published or held back together.
//!
//! The official databases are one unit, because they belong together. Every other container is a unit
//! with its signature file, and every loose file is one. `[mirror.units]` joins loose files.
//!
//! Pure: names come in, names come out.

use std::collections::BTreeMap;
use std::fmt;

use clamcast_proto::DatabaseName;
use clamcast_proto::names::DatabaseKind;
use serde::{Deserialize, Serialize};

/// The bases of Talos's databases.
pub const OFFICIAL: [&str; 3] = ["main", "daily", "bytecode"];

/// The name of the unit of the official databases.
pub const OFFICIAL_UNIT: &str = "official";

/// The name of a unit: `official`, the base of another container, the name of a loose file, or a name
/// from `[mirror.units]`.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct UnitName(String);

impl UnitName {
    /// The unit of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the unit of Talos's databases.
    pub fn is_official(&self) -> bool {
        self.0 == OFFICIAL_UNIT
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Which unit a file belongs to.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Units {
    joined: BTreeMap<DatabaseName, UnitName>,
}

impl Units {
    /// Files that the configuration joins, by unit.
    pub fn joining(units: impl IntoIterator<Item = (UnitName, Vec<DatabaseName>)>) -> Self {
        let units = units.into_iter();
        let joined =
            units.flat_map(|(unit, files)| files.into_iter().map(move |it| (it, unit.clone())));
        Self {
            joined: joined.collect(),
        }
    }

    /// The unit of a file.
    pub fn of(&self, name: &DatabaseName) -> UnitName {
        if let Some(unit) = self.joined.get(name) {
            return unit.clone();
        }
        let base = match name.kind() {
            DatabaseKind::Loose => return UnitName::new(name.as_str()),
            DatabaseKind::Cvd | DatabaseKind::Cld | DatabaseKind::Cud => name.base(),
            // `daily-27001.cvd.sign`
            DatabaseKind::Sign => {
                let parts = name.base().rsplit_once('-');
                parts.map_or(name.base(), |(base, _version)| base)
            }
        };
        match OFFICIAL.contains(&base) {
            true => UnitName::new(OFFICIAL_UNIT),
            false => UnitName::new(base),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_databases_are_one_unit_and_every_other_file_has_its_own() {
        let feed = ["feed.ndb", "feed.ign2"].map(|name| name.parse().unwrap());
        let units = Units::joining([(UnitName::new("feed"), feed.to_vec())]);
        for (name, unit) in [
            ("daily.cld", "official"),
            ("main.cvd", "official"),
            ("bytecode.cud", "official"),
            ("daily-27001.cvd.sign", "official"),
            ("alpha.cvd", "alpha"),
            ("alpha-beta.cld", "alpha-beta"),
            ("alpha-beta-7.cvd.sign", "alpha-beta"),
            ("daily.ndb", "daily.ndb"),
            ("local.ign2", "local.ign2"),
            ("feed.ndb", "feed"),
            ("feed.ign2", "feed"),
        ] {
            assert_eq!(units.of(&name.parse().unwrap()).as_str(), unit, "{name}");
        }
    }
}
