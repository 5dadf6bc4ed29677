//! Which entries are the largest, also among equals.
//!
//! Owns one selection. Never changes a value. The thing to know: factors stored in bf16 have many
//! entries of the same magnitude, so a threshold cuts through equals, and which of them stay moves
//! logprobs by hundredths. PEFT leaves that to the partition of its CPU library (`topk` over
//! `nth_element`: median of three, then quickselect). The same partition is made here, so that
//! pruned merges equal PEFT's entry for entry and do not depend on anything but the input.

/// An entry's magnitude and where it lies.
type Entry = (f32, u32);

/// A range this short is sorted instead of divided.
const SHORT: usize = 3;

/// Marks the `count` entries of largest magnitude. At most 2³² entries.
pub fn largest(tensor: &[f32], count: usize) -> Vec<bool> {
    let n = tensor.len();
    if count >= n {
        return vec![true; n];
    }
    let mut marks = vec![false; n];
    if count == 0 {
        return marks;
    }
    let mut entries: Vec<Entry> =
        tensor.iter().enumerate().map(|(i, v)| (v.abs(), i as u32)).collect();
    if count * 64 <= n {
        // There PEFT's library sorts with a heap; equals at so sparse a cut go by index.
        entries.sort_unstable_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
    } else {
        divide(&mut entries, count - 1);
    }
    entries[..count].iter().for_each(|(_, i)| marks[*i as usize] = true);
    marks
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
