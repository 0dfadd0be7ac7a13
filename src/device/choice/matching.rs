//! Ranks to devices, each of which some ranks see.

/// Gives every rank that sees a device one that no other rank has: the first of its list that is
/// free, where that can be. `lists` holds what each rank sees; the answer is in the same order,
/// `None` for a rank that sees nothing.
///
/// # Errors
/// Ranks that together see fewer devices than they are.
pub fn one_each(lists: &[Vec<String>]) -> Result<Vec<Option<String>>, Vec<usize>> {
    let mut taken: Vec<Option<String>> = vec![None; lists.len()];
    for rank in 0..lists.len() {
        let free = |device: &&String| !taken.contains(&Some((*device).clone()));
        if let Some(device) = lists[rank].iter().find(free) {
            taken[rank] = Some(device.clone());
        } else if !lists[rank].is_empty() {
            let mut asked = vec![rank];
            if !make_room(lists, &mut taken, rank, &mut asked) {
                asked.sort_unstable();
                return Err(asked);
            }
        }
    }
    Ok(taken)
}

/// An augmenting path: lets the holder of a device that `rank` sees move to another one. `asked`
/// are the ranks on the way; where there is no path, they are too many for what they see.
fn make_room(
    lists: &[Vec<String>],
    taken: &mut Vec<Option<String>>,
    rank: usize,
    asked: &mut Vec<usize>,
) -> bool {
    for device in &lists[rank] {
        let wanted = Some(device.clone());
        let holder = taken.iter().position(|held| *held == wanted);
        let free = match holder {
            None => true,
            Some(holder) if asked.contains(&holder) => false,
            Some(holder) => {
                asked.push(holder);
                make_room(lists, taken, holder, asked)
            }
        };
        if free {
            taken[rank] = wanted;
            return true;
        }
    }
    false
}

/// Gives every rank that sees a device the one that the fewest others have.
pub fn evenly(lists: &[Vec<String>]) -> Vec<Option<String>> {
    let mut taken: Vec<Option<String>> = Vec::with_capacity(lists.len());
    for list in lists {
        let users =
            |device: &&String| taken.iter().filter(|held| held.as_ref() == Some(*device)).count();
        let device = list.iter().min_by_key(users).cloned();
        taken.push(device);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lists(text: &str) -> Vec<Vec<String>> {
        let list = |text: &str| text.chars().map(String::from).collect();
        text.split(' ').map(list).collect()
    }

    fn shown(taken: &[Option<String>]) -> String {
        taken.iter().map(|device| device.as_deref().unwrap_or("-")).collect()
    }

    /// A letter is a device, a word what a rank sees.
    #[test]
    fn each_has_its_own_where_that_can_be() {
        for (seen, expected) in [
            ("a", "a"),
            ("abcd abcd abcd abcd", "abcd"),
            ("abcd abcd", "ab"),
            ("a b c", "abc"),
            ("ab a", "ba"),
            ("abc ab a", "cba"),
            ("ba ab", "ba"),
            ("ab  b", "a-b"),
        ] {
            assert_eq!(shown(&one_each(&lists(seen)).unwrap()), expected, "{seen}");
        }
    }

    #[test]
    fn those_that_crowd_are_named() {
        for (seen, crowded) in [
            ("a a", &[0, 1][..]),
            ("ab ab ab", &[0, 1, 2]),
            ("c ab ab ab", &[1, 2, 3]),
            ("a b b c", &[1, 2]),
        ] {
            assert_eq!(one_each(&lists(seen)).unwrap_err(), crowded, "{seen}");
        }
    }

    #[test]
    fn sharing_is_even() {
        assert_eq!(shown(&evenly(&lists("ab ab ab ab"))), "abab");
        assert_eq!(shown(&evenly(&lists("a a b  ab"))), "aab-b");
    }

    fn seen() -> impl Strategy<Value = Vec<Vec<String>>> {
        let device = prop::sample::select(vec!["a", "b", "c", "d", "e"]);
        let list = prop::collection::btree_set(device, 0..5)
            .prop_map(|set| set.into_iter().map(str::to_owned).collect::<Vec<_>>());
        prop::collection::vec(list, 0..7)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        /// A way is found, or there is none: the crowded ranks see fewer devices than they are.
        #[test]
        fn no_two_share_if_that_can_be(seen in seen()) {
            match one_each(&seen) {
                Ok(taken) => {
                    for (list, device) in seen.iter().zip(&taken) {
                        prop_assert_eq!(list.is_empty(), device.is_none());
                        prop_assert!(device.iter().all(|device| list.contains(device)));
                    }
                    let mut held: Vec<_> = taken.iter().flatten().collect();
                    held.sort();
                    held.dedup();
                    prop_assert_eq!(held.len(), taken.iter().flatten().count());
                }
                Err(crowded) => {
                    let mut devices: Vec<_> = crowded.iter().flat_map(|&rank| &seen[rank]).collect();
                    devices.sort();
                    devices.dedup();
                    prop_assert!(devices.len() < crowded.len(), "{:?}", crowded);
                }
            }
        }

        /// Where all see the same, no device has two ranks more than another.
        #[test]
        fn shares_differ_by_one_at_most(ranks in 1usize..20, devices in 1usize..9) {
            let all: Vec<String> = (0..devices).map(|device| device.to_string()).collect();
            let taken = evenly(&vec![all.clone(); ranks]);
            let users = |d: &String| taken.iter().filter(|held| held.as_ref() == Some(d)).count();
            let counts: Vec<usize> = all.iter().map(users).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
        }
    }
}
