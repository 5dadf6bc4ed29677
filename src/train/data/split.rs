//! A file's lines in two: those that are learnt, and those that are held out to measure by.
//!
//! Owns which line goes where. Never reads one. The thing to know: that depends on the seed and on
//! what a line says, so equal lines go together and their order makes no difference.

use super::digests::Digest;
use super::reading::{Counts, Dataset};
use crate::random::Stream;
use std::collections::HashSet;

impl Dataset {
    /// What is learnt, and a `share` of the different lines, at least one. `None`: there are not
    /// two different lines.
    pub fn hold_out(self, share: f64, seed: u64) -> Option<(Self, Self)> {
        let all = self.digests.len();
        if all < 2 {
            return None;
        }
        let count = ((share * all as f64).round() as usize).clamp(1, all - 1);
        let mut order = self.digests.clone();
        order.sort_by_cached_key(|digest| (drawn(seed, *digest), *digest));
        let held: HashSet<Digest> = order.into_iter().take(count).collect();
        let part = |held_out: bool| -> Self {
            let is = |digest: &Digest| held.contains(digest) == held_out;
            let lines: Vec<_> = self.lines.iter().filter(|(_, d)| is(d)).copied().collect();
            let numbers: HashSet<u64> = lines.iter().map(|(number, _)| *number).collect();
            let digests: Vec<_> = self.digests.iter().filter(|d| is(d)).copied().collect();
            Self {
                kind: self.kind,
                examples: self.examples.part(|line| numbers.contains(&line)),
                counts: Counts {
                    lines: lines.len() as u64,
                    duplicates: (lines.len() - digests.len()) as u64,
                    ..if held_out { Counts::default() } else { self.counts }
                },
                digests,
                lines,
            }
        };
        Some((part(false), part(true)))
    }
}

fn drawn(seed: u64, digest: Digest) -> u64 {
    let word = u128::from_le_bytes(digest);
    Stream::new(&[seed, word as u64, (word >> 64) as u64]).next()
}

#[cfg(test)]
mod tests {
    use super::super::digests::{digest, distinct};
    use super::super::examples::Examples;
    use super::super::form::Kind;
    use super::*;
    use std::collections::BTreeSet;

    /// A line of two examples each, as a chat that was split.
    fn of(lines: &[&str]) -> Dataset {
        let (mut examples, mut all) = (Examples::default(), Vec::new());
        for (number, line) in (1..).zip(lines) {
            for id in [1, 2] {
                examples.add_of(number, &[id, line.len() as u32], &[0.0, 1.0]);
            }
            all.push((number, digest(line)));
        }
        let mut digests = all.iter().map(|(_, digest)| *digest).collect();
        let duplicates = distinct(&mut digests);
        let counts = Counts { lines: lines.len() as u64, duplicates, ..Counts::default() };
        Dataset { kind: Kind::Supervised, examples, counts, digests, lines: all }
    }

    #[test]
    fn equal_lines_go_together_and_the_seed_decides() {
        let texts: Vec<String> = (0..40).map(|n| format!("{n}")).collect();
        let mut lines: Vec<&str> = texts.iter().map(String::as_str).collect();
        lines.extend(["7", "9", "11", "7"]);
        let held = |lines: &[&str], seed| -> BTreeSet<Digest> {
            let (learnt, held) = of(lines).hold_out(0.25, seed).expect("two parts");
            assert_eq!((learnt.digests.len(), held.digests.len()), (30, 10));
            assert_eq!(learnt.examples.len() + held.examples.len(), 88, "nothing is lost");
            assert_eq!(held.examples.len(), 2 * held.lines.len(), "both examples of a line");
            let both: Vec<_> =
                learnt.lines.iter().filter(|(_, d)| held.digests.contains(d)).collect();
            assert!(both.is_empty(), "an equal line is on the other side: {both:?}");
            assert_eq!(learnt.counts.duplicates + held.counts.duplicates, 4);
            held.digests.into_iter().collect()
        };
        let first = held(&lines, 1);
        assert_ne!(first, held(&lines, 2));
        lines.reverse();
        assert_eq!(first, held(&lines, 1), "in another order");
    }

    #[test]
    fn each_part_has_a_line() {
        for share in [0.0001, 0.9999] {
            let (learnt, held) = of(&["a", "b", "a"]).hold_out(share, 0).expect("two parts");
            assert_eq!((learnt.digests.len(), held.digests.len()), (1, 1));
        }
        assert!(of(&["a", "a"]).hold_out(0.5, 0).is_none());
    }
}
