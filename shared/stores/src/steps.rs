//! How much one step takes on: half as much after one that was too much for the server, and twice as much again once
//! several in a row were not.

/// Halvings at most; the largest limit is then a few bytes or one row.
const MOST_HALVINGS: u32 = 20;
/// Steps that must go well before the next one takes on more: one that is too much costs as long as a statement may take.
const BEFORE_GROWING: u32 = 8;

/// The share of its limits that the next step takes on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StepSize {
    halvings: u32,
    went_well: u32,
}

impl StepSize {
    /// What is left of a limit, at least one.
    pub(super) const fn of(self, limit: usize) -> usize {
        let left = limit >> self.halvings;
        if left == 0 { 1 } else { left }
    }

    /// The same for a limit of the database's.
    pub(super) fn of_i64(self, limit: i64) -> i64 {
        (limit >> self.halvings).max(1)
    }

    /// The step went well.
    pub(super) const fn grow(&mut self) {
        self.went_well += 1;
        if self.went_well >= BEFORE_GROWING {
            self.went_well = 0;
            self.halvings = self.halvings.saturating_sub(1);
        }
    }

    /// The step was too much; `false` if nothing smaller is left.
    pub(super) const fn shrink(&mut self) -> bool {
        self.went_well = 0;
        if self.halvings == MOST_HALVINGS {
            return false;
        }
        self.halvings += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_halves_at_once_and_doubles_after_several() {
        let mut size = StepSize::default();
        assert_eq!((size.of(500), size.of_i64(10_000)), (500, 10_000));
        assert!(size.shrink() && size.shrink());
        assert_eq!((size.of(500), size.of_i64(10_000)), (125, 2_500));
        for _ in 1..BEFORE_GROWING {
            size.grow();
        }
        assert_eq!(size.of(500), 125);
        size.grow();
        assert_eq!(size.of(500), 250);
        assert!(size.shrink());
        assert_eq!(size.of(500), 125);
    }

    #[test]
    fn it_ends_at_one() {
        let mut size = StepSize::default();
        let steps = (0..100).take_while(|_| size.shrink()).count();
        assert_eq!((steps, size.of(500), size.of_i64(1 << 20)), (20, 1, 1));
    }
}
