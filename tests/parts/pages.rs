//! The page book and its hashes, one promise at a time.
//!
//! The thing to know: what sequences do to the book is in `scheduler` and `simulate`.

use polylora::adapters::Digest;
use polylora::engine::pages::{PAGE, Pages, page_hash, seed};

const BASE: Digest = Digest([9; 32]);

/// Tokens `first`, `first + 1` …
fn tokens(first: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| first + i).collect()
}

#[test]
fn identities_and_prefixes_differ_in_every_part() {
    let (a, b) = (Digest([1; 32]), Digest([2; 32]));
    let zero = Digest([0; 32]);
    let seeds = [
        seed(&a, None, 1.0, ""),
        seed(&b, None, 1.0, ""),
        seed(&a, Some(&zero), 1.0, ""),
        seed(&a, Some(&b), 1.0, ""),
        seed(&a, Some(&b), 0.5, ""),
        seed(&a, Some(&b), 1.0, "acme"),
        seed(&a, None, 1.0, "acme"),
    ];
    let tokens: Vec<u32> = (0..16).collect();
    let mut swapped = tokens.clone();
    swapped.swap(3, 4);
    let mut all = seeds.to_vec();
    all.extend(seeds.map(|seed| page_hash(seed, &tokens)));
    all.extend(seeds.map(|seed| page_hash(seed, &swapped)));
    for (i, hash) in all.iter().enumerate() {
        assert!(!all[..i].contains(hash), "{i}");
    }
}

#[test]
fn free_prefixes_are_forgotten_longest_unused_first_and_from_their_ends() {
    let mut book = Pages::new(4, true);
    let chain = |first: u32| {
        let start = seed(&BASE, None, 1.0, "");
        let one = page_hash(start, &tokens(first, PAGE));
        [one, page_hash(one, &tokens(first + 16, PAGE))]
    };
    let (old, new) = (chain(0), chain(100));
    for hashes in [old, new] {
        let mut pages: Vec<u32> = hashes.iter().map(|_| book.take().unwrap()).collect();
        for (&page, &hash) in pages.iter().zip(&hashes) {
            book.register(page, hash);
        }
        book.release(&mut pages);
    }
    assert_eq!(book.free(), 4);
    let found = |book: &Pages| [old[0], old[1], new[0], new[1]].map(|h| book.find(h).is_some());
    let mut taken = vec![];
    for left in [
        [true, false, true, true],
        [false, false, true, true],
        [false, false, true, false],
        [false; 4],
    ] {
        taken.push(book.take().unwrap());
        assert_eq!(found(&book), left);
    }
    assert_eq!(book.take(), None);
    book.check([&taken[..]].into_iter());
}

#[test]
fn forgotten_prefixes_are_found_by_nobody_and_held_pages_stay() {
    let mut book = Pages::new(3, true);
    let hashes: Vec<_> =
        (0..2).map(|n| page_hash(seed(&BASE, None, 1.0, ""), &tokens(100 * n, PAGE))).collect();
    let mut freed = vec![book.take().expect("a page")];
    let held = vec![book.take().expect("a page")];
    book.register(freed[0], hashes[0]);
    book.register(held[0], hashes[1]);
    book.release(&mut freed);
    book.forget_prefixes();
    assert!(hashes.iter().all(|hash| book.find(*hash).is_none()));
    book.check([&held[..]].into_iter());
    // The holder computes on, and what comes later is found again.
    let more = book.take().expect("a page");
    book.register(more, hashes[0]);
    assert_eq!(book.find(hashes[0]), Some(more));
    book.check([&held[..], &[more]].into_iter());
    book.release(&mut vec![more]);
    book.release(&mut held.clone());
    assert_eq!(book.free(), 3);
}
