//! Decides which files of the mirror are one unit: published or held back together.
//!
//! The official databases are one unit, because they belong together. Every other container is a unit
//! with its signature file, and every loose file is one. `[mirror.units]` joins loose files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use clamcast_proto::DatabaseName;
use clamcast_proto::names::DatabaseKind;
use serde::{Deserialize, Serialize};

/// The bases of Talos's databases.
pub const OFFICIAL: [&str; 3] = ["main", "daily", "bytecode"];

/// Whether this is the base of an official database, in whatever case.
pub fn is_official(base: &str) -> bool {
    OFFICIAL
        .iter()
        .any(|official| official.eq_ignore_ascii_case(base))
}

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

    /// The unit of Talos's databases.
    pub fn official() -> Self {
        Self::new(OFFICIAL_UNIT)
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
    /// The names of the joined units, which no other unit may have.
    names: BTreeSet<String>,
}

/// Longest name of a unit in the configuration, in bytes.
const UNIT_NAME_BYTES_MAX: usize = 64;

/// What is wrong with `[mirror.units]`.
#[derive(Debug, thiserror::Error)]
pub enum UnitsError {
    /// A name that commands and tables cannot use.
    #[error(
        "`{name}` is no name of a unit: expected letters, digits, `.`, `_` and `-`, at most \
         {UNIT_NAME_BYTES_MAX} bytes, not `{OFFICIAL_UNIT}`, and not the name of a database"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A container.
    #[error("{file} is a container, which is a unit by itself; a unit joins loose files")]
    Container {
        /// Its name.
        file: DatabaseName,
    },
    /// A file in two units.
    #[error("{file} is in the units `{one}` and `{other}`")]
    Twice {
        /// Its name.
        file: DatabaseName,
        /// A unit.
        one: UnitName,
        /// Another one.
        other: UnitName,
    },
}

impl Units {
    /// Loose files that the configuration joins, by unit.
    pub fn joining(
        units: impl IntoIterator<Item = (String, Vec<DatabaseName>)>,
    ) -> Result<Self, UnitsError> {
        let mut joined = BTreeMap::new();
        let mut names = BTreeSet::new();
        for (name, files) in units {
            let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            let database = name.parse::<DatabaseName>();
            let is_database = database.is_ok_and(|it| it.has_known_extension());
            if name.is_empty()
                || name.len() > UNIT_NAME_BYTES_MAX
                || name.starts_with('-')
                || !name.bytes().all(is_usual)
                || name == OFFICIAL_UNIT
                || is_database
            {
                return Err(UnitsError::Name { name });
            }
            names.insert(name.clone());
            let unit = UnitName(name);
            for file in files {
                if file.kind() != DatabaseKind::Loose {
                    return Err(UnitsError::Container { file });
                }
                match joined.insert(file.clone(), unit.clone()) {
                    Some(one) if one != unit => {
                        let other = unit;
                        return Err(UnitsError::Twice { file, one, other });
                    }
                    Some(_) | None => {}
                }
            }
        }
        Ok(Self { joined, names })
    }

    /// Groups items by the unit of their file.
    pub fn group<T, C: Default + Extend<T>>(
        &self,
        items: impl IntoIterator<Item = T>,
        name: impl Fn(&T) -> &DatabaseName,
    ) -> BTreeMap<UnitName, C> {
        let mut groups: BTreeMap<UnitName, C> = BTreeMap::new();
        for item in items {
            let group = groups.entry(self.of(name(&item))).or_default();
            group.extend([item]);
        }
        groups
    }

    /// The unit that an operator means, by its name or by that of a file in it.
    pub fn named(&self, text: &str) -> UnitName {
        match text.parse() {
            Ok(file) => self.of(&file),
            Err(_) => UnitName::new(text),
        }
    }

    /// The unit of a file.
    pub fn of(&self, name: &DatabaseName) -> UnitName {
        if let Some(unit) = self.joined.get(name) {
            return unit.clone();
        }
        let base = match name.kind() {
            DatabaseKind::Loose => return UnitName::new(name.as_str()),
            DatabaseKind::Cvd | DatabaseKind::Cld | DatabaseKind::Cud | DatabaseKind::Sign => {
                name.database_base()
            }
        };
        if is_official(base) {
            return UnitName::official();
        }
        // Such a name is taken.
        if base == OFFICIAL_UNIT || self.names.contains(base) {
            return UnitName(format!("{base}.cvd"));
        }
        UnitName::new(base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_databases_are_one_unit_and_every_other_file_has_its_own() {
        let units = joining("feed", "feed.ndb feed.ign2").unwrap();
        for (name, unit) in [
            ("daily.cld", "official"),
            ("main.cvd", "official"),
            ("bytecode.cud", "official"),
            ("daily-27001.cvd.sign", "official"),
            ("alpha.cvd", "alpha"),
            ("DAILY.CVD", "official"),
            ("official.cud", "official.cvd"),
            ("feed.cud", "feed.cvd"),
            ("alpha-beta.cld", "alpha-beta"),
            ("alpha-beta-7.cvd.sign", "alpha-beta"),
            ("daily.ndb", "daily.ndb"),
            ("local.ign2", "local.ign2"),
            ("feed.ndb", "feed"),
            ("feed.ign2", "feed"),
        ] {
            assert_eq!(units.of(&name.parse().unwrap()).as_str(), unit, "{name}");
            assert_eq!(units.named(name).as_str(), unit, "{name}");
        }
        for unit in ["official", "alpha", "feed"] {
            assert_eq!(units.named(unit).as_str(), unit);
        }
    }

    fn joining(unit: &str, files: &str) -> Result<Units, UnitsError> {
        let files = files.split(' ').map(|name| name.parse().unwrap());
        Units::joining([(unit.to_owned(), files.collect())])
    }

    #[test]
    fn only_loose_files_are_joined_and_none_twice() {
        for (unit, files) in [
            ("official", "a.ndb"),
            ("a b", "a.ndb"),
            ("", "a.ndb"),
            ("-a", "a.ndb"),
            ("b.ndb", "a.ndb"),
            ("a", "a.ndb daily.cld"),
            ("a", "a.cud"),
        ] {
            assert!(joining(unit, files).is_err(), "{unit}: {files}");
        }
        let file: DatabaseName = "a.ndb".parse().unwrap();
        let twice = ["one", "two"].map(|unit| (unit.to_owned(), vec![file.clone()]));
        let error = Units::joining(twice).unwrap_err().to_string();
        assert_eq!(error, "a.ndb is in the units `one` and `two`");
    }
}
