//! Which entries are the largest, also among equals.
//!
//! Owns one selection. Never changes a value. The thing to know: factors stored in bf16 have many
//! entries of the same magnitude, so a threshold cuts through equals, and which of them stay moves
//! logprobs by hundredths. PEFT leaves that to the partition of its CPU library (`topk` over
//! `nth_element`: median of three, then quickselect). The same partition is made here wherever the
//! cut goes through equals, so that pruned merges equal PEFT's entry for entry and do not depend on
//! anything but the input. Also of a large product: sums of products of bf16 are often equal.

/// An entry's magnitude and where it lies.
type Entry = (f32, u32);

/// A range this short is sorted instead of divided.
const SHORT: usize = 3;

/// Marks the `count` entries of largest magnitude. At most 2³² entries.
pub fn largest(tensor: &[f32], count: usize) -> Vec<bool> {
    let n = tensor.len();
    if count == 0 || count >= n {
        return vec![count > 0; n];
    }
    let cut = Cut::of(tensor, count);
    // Of few entries PEFT's library sorts all with a heap; there, too, equals go by index.
    if cut.kept == cut.equals || count * 64 <= n {
        let mut left = cut.kept;
        let marked = |v: &f32| {
            let first = bits(v) == cut.least && left > 0;
            left -= usize::from(first);
            first || bits(v) > cut.least
        };
        return tensor.iter().map(marked).collect();
    }
    let mut marks = vec![false; n];
    let mut entries: Vec<Entry> =
        tensor.iter().enumerate().map(|(i, v)| (v.abs(), i as u32)).collect();
    divide(&mut entries, count - 1);
    entries[..count].iter().for_each(|(_, i)| marks[*i as usize] = true);
    marks
}

/// Rises with the magnitude.
fn bits(v: &f32) -> u32 {
    v.abs().to_bits()
}

/// Where the largest entries end.
struct Cut {
    /// The smallest magnitude among them, as bits.
    least: u32,
    /// Entries of that magnitude, and how many of these belong to the largest.
    equals: usize,
    kept: usize,
}

impl Cut {
    /// Counts by the upper half of the bits, then by the lower half.
    fn of(tensor: &[f32], count: usize) -> Self {
        let (mut high, mut low) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        tensor.iter().for_each(|v| high[bits(v) as usize >> 16] += 1);
        let (upper, left) = Self::place(&high, count);
        let there = tensor.iter().map(bits).filter(|b| *b as usize >> 16 == upper);
        there.for_each(|b| low[b as usize & 0xffff] += 1);
        let (lower, kept) = Self::place(&low, left);
        Self { least: ((upper << 16) | lower) as u32, equals: low[lower], kept }
    }

    /// The cell in which the `count`-th from above lies, and its place in there. From 1.
    fn place(cells: &[usize], count: usize) -> (usize, usize) {
        let mut left = count;
        for (cell, held) in cells.iter().enumerate().rev() {
            if left <= *held {
                return (cell, left);
            }
            left -= held;
        }
        unreachable!("there are more entries than are marked")
    }
}

fn before(x: Entry, y: Entry) -> bool {
    x.0 > y.0
}

/// Puts the entry of place `nth` there, larger ones before and smaller ones after it.
fn divide(entries: &mut [Entry], nth: usize) {
    let (mut first, mut last) = (0, entries.len());
    let mut rounds = 2 * last.ilog2();
    while last - first > SHORT {
        if rounds == 0 {
            // Halves that never get smaller; sorting ends it whatever the values are.
            let by = |x: &Entry, y: &Entry| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1));
            return entries[first..last].sort_unstable_by(by);
        }
        rounds -= 1;
        let cut = first + partition(&mut entries[first..last]);
        if cut <= nth { first = cut } else { last = cut }
    }
    for i in first + 1..last {
        let mut at = i;
        while at > first && before(entries[at], entries[at - 1]) {
            entries.swap(at, at - 1);
            at -= 1;
        }
    }
}

/// Divides by the median of three and returns where the second half begins. At least four entries.
fn partition(entries: &mut [Entry]) -> usize {
    let n = entries.len();
    let (a, b, c) = (1, n / 2, n - 1);
    let precedes = |x: usize, y: usize| before(entries[x], entries[y]);
    let median = match (precedes(a, b), precedes(b, c), precedes(a, c)) {
        (true, true, _) => b,
        (true, false, true) => c,
        (true, false, false) => a,
        (false, _, true) => a,
        (false, true, false) => c,
        (false, false, false) => b,
    };
    entries.swap(0, median);
    let pivot = entries[0];
    let (mut low, mut high) = (1, n);
    loop {
        while before(entries[low], pivot) {
            low += 1;
        }
        high -= 1;
        while before(pivot, entries[high]) {
            high -= 1;
        }
        if low >= high {
            return low;
        }
        entries.swap(low, high);
        low += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn as_many_as_asked_are_marked_and_none_that_is_smaller_than_another() {
        let mut stream = Stream::new(&[1]);
        for kinds in [2.0, 50.0, 1e6] {
            let one = |_| ((stream.unit() - 0.5) * kinds).round() as f32 * 1e-3;
            let tensor: Vec<f32> = (0..5000).map(one).collect();
            for count in [0, 1, 60, 2500, 4999, 5000, 6000] {
                let marks = largest(&tensor, count);
                let of = |kept: bool| {
                    let all = tensor.iter().zip(&marks).filter(move |(_, m)| **m == kept);
                    all.map(|(v, _)| v.abs())
                };
                assert_eq!(of(true).count(), count.min(5000));
                let least = of(true).fold(f32::INFINITY, f32::min);
                assert!(of(false).all(|v| v <= least), "{kinds} {count}");
                let mut sorted = tensor.iter().map(bits).collect::<Vec<_>>();
                sorted.sort_unstable();
                if (1..5000).contains(&count) {
                    assert_eq!(Cut::of(&tensor, count).least, sorted[5000 - count]);
                }
            }
        }
    }
}
