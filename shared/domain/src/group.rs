//! Groups of messages that are worked on together. Each member is open until it is settled with an outcome: a step may
//! settle some of them early, and the others go on, each with what was found for it. The outcomes come in the order of the
//! members.

/// Members on their way to an outcome.
#[derive(Debug)]
pub struct Group<T, O>(Vec<Member<T, O>>);

#[derive(Debug)]
enum Member<T, O> {
    Open(T),
    Settled(O),
}

impl<T, O> Group<T, O> {
    /// All of them open.
    pub fn new(members: impl IntoIterator<Item = T>) -> Self {
        Self(members.into_iter().map(Member::Open).collect())
    }

    /// Takes each open member a step further, or settles it.
    #[must_use]
    pub fn step<U>(self, mut step: impl FnMut(T) -> Result<U, O>) -> Group<U, O> {
        let members = self.0.into_iter().map(|member| match member {
            Member::Open(member) => step(member).map_or_else(Member::Settled, Member::Open),
            Member::Settled(outcome) => Member::Settled(outcome),
        });
        Group(members.collect())
    }

    /// The open members, for work on all of them at once.
    pub fn open(&self) -> impl Iterator<Item = &T> {
        self.0.iter().filter_map(|member| match member {
            Member::Open(member) => Some(member),
            Member::Settled(_) => None,
        })
    }

    /// Gives each open member what the work on [`Self::open`] found for it, in that order. One that the work has forgotten is
    /// settled with `forgotten`.
    #[must_use]
    pub fn with<U>(self, found: impl IntoIterator<Item = U>, forgotten: impl Fn(T) -> O) -> Group<(T, U), O> {
        let mut found = found.into_iter();
        self.step(|member| match found.next() {
            Some(found) => Ok((member, found)),
            None => Err(forgotten(member)),
        })
    }

    /// Settles all that are open, and returns the outcomes.
    pub fn settle(self, mut last: impl FnMut(T) -> O) -> Vec<O> {
        self.0
            .into_iter()
            .map(|member| match member {
                Member::Open(member) => last(member),
                Member::Settled(outcome) => outcome,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_member_has_its_own_outcome_whoever_settles_it(members: Vec<u32>, forgets in 0_usize..4) {
            let group = Group::new(members.iter().copied()).step(|one| if one % 3 == 0 { Err(one) } else { Ok(one) });
            let mut found: Vec<u32> = group.open().map(|one| one.wrapping_mul(2) % 7).collect();
            let kept = found.len().saturating_sub(forgets);
            found.truncate(kept);
            let outcomes = group.with(found, |_| u32::MAX).settle(|(one, found)| {
                assert_eq!(found, one.wrapping_mul(2) % 7);
                one
            });
            prop_assert_eq!(outcomes.len(), members.len());
            let mut open = 0;
            for (member, outcome) in members.iter().zip(outcomes) {
                open += usize::from(member % 3 != 0);
                let is_forgotten = member % 3 != 0 && open > kept;
                prop_assert_eq!(outcome, if is_forgotten { u32::MAX } else { *member });
            }
        }
    }
}
