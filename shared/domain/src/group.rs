//! Groups of messages that are worked on together. Each member is open until it is settled with an outcome: a step may
//! settle some of them early, and the others go on, each with what was found for it. The outcomes come in the order of the
//! members ([`Group`]). Where one member spoils the work for all, it goes on in [`Parts`].

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

/// A group that is worked on as a whole, or in parts where one member spoils it for all: such a part is halved until that
/// member stands alone. Parts come in the order of the members.
#[derive(Debug)]
pub struct Parts<'a, T> {
    /// The last one is next.
    left: Vec<&'a [T]>,
}

impl<'a, T> Parts<'a, T> {
    /// All of it as one part.
    #[must_use]
    pub fn new(group: &'a [T]) -> Self {
        Self { left: vec![group] }
    }

    /// The next part, which is not empty; `None` at the end.
    pub fn take(&mut self) -> Option<&'a [T]> {
        self.left.pop().filter(|part| !part.is_empty())
    }

    /// Puts a part back as its two halves.
    pub fn halve(&mut self, part: &'a [T]) {
        let (first, second) = part.split_at(part.len() / 2);
        self.left.extend([second, first].into_iter().filter(|half| !half.is_empty()));
    }

    /// Puts a part back as it is.
    pub fn put_back(&mut self, part: &'a [T]) {
        self.left.push(part);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whoever_spoils_a_part_stands_alone_in_the_end_and_the_others_are_done_in_order(spoilers: Vec<bool>) {
            let mut parts = Parts::new(&spoilers);
            let (mut done, mut alone, mut tries) = (Vec::new(), 0, 0);
            while let Some(part) = parts.take() {
                tries += 1;
                if tries == 1 {
                    parts.put_back(part);
                } else if part.len() == 1 || !part.contains(&true) {
                    alone += usize::from(part == [true]);
                    done.extend_from_slice(part);
                } else {
                    parts.halve(part);
                }
            }
            prop_assert_eq!(alone, spoilers.iter().filter(|spoils| **spoils).count());
            prop_assert_eq!(&done, &spoilers);
        }
    }

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
