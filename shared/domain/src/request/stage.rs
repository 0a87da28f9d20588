//! The stages of work in slices: one table for all that depends on the kind of work. The queue of each stands in the
//! broker's topology.

use super::calendar::Lane;
use crate::names::names;

/// What is done with a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Profiles are erased.
    Erasure,
    /// A result file is compiled.
    Compilation,
}
names!(Stage, "stage", Erasure = "erasure", Compilation = "compilation");

impl Stage {
    /// The work that the batches of a lane are released for.
    #[must_use]
    pub const fn of(lane: Lane) -> Self {
        match lane {
            Lane::Erasure | Lane::Expedited => Self::Erasure,
            Lane::Access => Self::Compilation,
        }
    }

    /// How many requests one slice holds at most, of `usual`: a result file is of one request.
    #[must_use]
    pub const fn requests_per_slice(self, usual: usize) -> usize {
        match self {
            Self::Erasure => usual,
            Self::Compilation => 1,
        }
    }
}
