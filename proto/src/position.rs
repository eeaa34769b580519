//! The order of generations.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// Numbers the reigns of a manifest key. A stolen key is answered with a higher epoch in the
/// root-signed key set, which also frees a fleet whose numbers the thief ran up.
#[derive(
    Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Default,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Numbers one published capture within an epoch. Zero is not a generation, so "nothing yet" is
/// `Option<Generation>`, not a magic value.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Generation(NonZeroU64);

impl Generation {
    /// The first generation of an epoch.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// The generation with this number; `None` for zero.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// The number.
    pub fn number(self) -> u64 {
        self.0.get()
    }

    /// The next one; `None` at the end of the numbers, which only a thief reaches.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a generation stands in the fleet's history: by epoch, then by number. No agent ever goes
/// to a lower position.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Position {
    /// The key set's epoch.
    pub epoch: Epoch,
    /// The number within it.
    pub generation: Generation,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.generation)
    }
}

/// A position that may be missing, as the keys `epoch` and `generation`, either both numbers or both
/// `null`. For fields that are flattened.
pub mod or_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Epoch, Generation, Position};

    #[derive(Deserialize, Serialize)]
    struct Keys {
        epoch: Option<Epoch>,
        generation: Option<Generation>,
    }

    /// Writes the two keys.
    pub fn serialize<S: Serializer>(
        position: &Option<Position>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let keys = Keys {
            epoch: position.map(|position| position.epoch),
            generation: position.map(|position| position.generation),
        };
        keys.serialize(serializer)
    }

    /// Reads them.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Position>, D::Error> {
        let Keys { epoch, generation } = Keys::deserialize(deserializer)?;
        let keys = epoch.zip(generation);
        Ok(keys.map(|(epoch, generation)| Position { epoch, generation }))
    }
}
