//! What an error means for the work at hand: every error type answers with one of three.
//!
//! **Invariant** (DESIGN rule 9): every error knows which of the three it is.

/// What to do with work that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The same work can succeed later: a server is away, a lock was taken, a disk is full.
    Transient,
    /// The same work fails again until somebody changes something: configuration, permissions, a bug.
    Permanent,
    /// This very item is what fails; its neighbours do not.
    Poison,
}
