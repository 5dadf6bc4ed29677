//! The page book: which pages of KV memory are free, who holds the others, and which hold a prefix
//! worth finding again.
//!
//! Integers only: never touches KV memory, a clock or a tensor. The thing to know: a free page may
//! still be cached; it is forgotten only when it is taken for something else, the longest unused
//! first.

use crate::adapters::Digest;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;

/// Tokens of one page: L.
pub const PAGE: usize = 16;

const NONE: u32 = u32::MAX;

/// What a full page holds: SHA-256, truncated, over the hash of the page before it (or the seed)
/// and its own tokens. Equal hashes mean equal identity and equal tokens from position 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash([u8; 16]);

/// Where a chain of page hashes starts: the identity whose keys and values these are.
pub type Seed = PageHash;

/// The identity of KV pages. `adapter` is `None` for the base model; `scale` is the request's
/// factor on the adapter.
pub fn seed(base: &Digest, adapter: Option<&Digest>, scale: f32, tenant: &str) -> Seed {
    // Every field but the last has a fixed width, so no two identities spell the same bytes.
    let mut sha = Sha256::new();
    sha.update(b"polylora kv 1");
    sha.update(base.0);
    sha.update([u8::from(adapter.is_some())]);
    sha.update(adapter.map_or([0; 32], |d| d.0));
    sha.update(scale.to_bits().to_le_bytes());
    sha.update(tenant.as_bytes());
    truncated(sha)
}

/// The hash of the full page that follows `before` and holds `tokens` `[PAGE]`.
pub fn page_hash(before: PageHash, tokens: &[u32]) -> PageHash {
    assert_eq!(tokens.len(), PAGE, "only full pages have a hash");
    let mut bytes = [0; PAGE * 4];
    for (slot, token) in bytes.chunks_exact_mut(4).zip(tokens) {
        slot.copy_from_slice(&token.to_le_bytes());
    }
    truncated(Sha256::new().chain_update(before.0).chain_update(bytes))
}

fn truncated(sha: Sha256) -> PageHash {
    let full = sha.finalize();
    let mut short = [0; 16];
    short.copy_from_slice(&full[..16]);
    PageHash(short)
}

/// Pages needed for the keys and values of `tokens` tokens.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

#[derive(Clone, Copy)]
struct Page {
    holders: u32,
    /// Set while the prefix map points here.
    hash: Option<PageHash>,
    /// Neighbours in the free list; meaningless while the page is held.
    before: u32,
    after: u32,
}

/// The book of all pages. The free list runs from the page to take next to the one to keep longest.
pub struct Pages {
    book: Vec<Page>,
    first: u32,
    last: u32,
    free: usize,
    prefixes: Option<HashMap<PageHash, u32>>,
}

impl Pages {
    /// A book of `pages` free pages; without `prefix_cache` nothing is ever found again.
    pub fn new(pages: usize, prefix_cache: bool) -> Self {
        assert!(pages < NONE as usize, "page numbers are u32");
        let page = Page { holders: 0, hash: None, before: NONE, after: NONE };
        let mut book = Self {
            book: vec![page; pages],
            first: NONE,
            last: NONE,
            free: 0,
            // Twice the entries there can be: a map at most half full cleans up its tombstones in
            // place, so that it never allocates again.
            prefixes: prefix_cache.then(|| HashMap::with_capacity(2 * pages + 2)),
        };
        for page in 0..pages as u32 {
            book.link_last(page);
        }
        book
    }

    /// Pages that can be taken now: held by nobody, cached or not.
    pub fn free(&self) -> usize {
        self.free
    }
    /// Pages held by sequences.
    pub fn used(&self) -> usize {
        self.book.len() - self.free
    }
    pub fn total(&self) -> usize {
        self.book.len()
    }
    /// Whether prefixes are kept at all.
    pub fn caches(&self) -> bool {
        self.prefixes.is_some()
    }
    /// Sequences that hold `page`.
    pub fn holders(&self, page: u32) -> u32 {
        self.book[page as usize].holders
    }
    /// The page that holds the prefix `hash` ends, held or free.
    pub fn find(&self, hash: PageHash) -> Option<u32> {
        self.prefixes.as_ref()?.get(&hash).copied()
    }

    /// A page of one's own; what was cached in it is forgotten. `None` when every page is held.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.first;
        if page == NONE {
            return None;
        }
        self.unlink(page);
        let entry = &mut self.book[page as usize];
        entry.holders = 1;
        if let Some(hash) = entry.hash.take() {
            let forgotten = self.prefixes.as_mut().and_then(|map| map.remove(&hash));
            assert_eq!(forgotten, Some(page), "a cached page is in the prefix map");
        }
        Some(page)
    }

    /// One more holder of a page that [`find`](Self::find) returned.
    pub fn share(&mut self, page: u32) {
        let entry = &self.book[page as usize];
        assert!(entry.hash.is_some(), "only registered pages are shared");
        if entry.holders == 0 {
            self.unlink(page);
        }
        self.book[page as usize].holders += 1;
    }

    /// One holder less of each page, the deepest first: the start of a prefix is of use to more
    /// sequences than its end.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            let entry = &mut self.book[page as usize];
            assert!(entry.holders > 0, "page {page} released more often than held");
            entry.holders -= 1;
            if entry.holders == 0 {
                if entry.hash.is_some() { self.link_last(page) } else { self.link_first(page) }
            }
        }
    }

    /// Makes a full page findable. Only for a page whose keys and values HAVE BEEN computed:
    /// whoever finds it reads it. Where two sequences computed the same prefix at once, the first
    /// page stays the one to find.
    pub fn register(&mut self, page: u32, hash: PageHash) {
        let entry = &mut self.book[page as usize];
        assert!(entry.holders > 0, "page {page} registered while nobody holds it");
        let Some(prefixes) = &mut self.prefixes else {
            return;
        };
        match entry.hash {
            Some(known) => assert_eq!(known, hash, "page {page} was rewritten while shared"),
            None if prefixes.contains_key(&hash) => {}
            None => {
                entry.hash = Some(hash);
                prefixes.insert(hash, page);
            }
        }
    }

    /// Forgets every prefix. Pages that are held stay with their holders, and are not found again.
    pub fn forget_prefixes(&mut self) {
        for entry in &mut self.book {
            entry.hash = None;
        }
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.clear();
        }
    }

    /// Asserts that the book agrees with those who hold pages: free + used = all, holders counted
    /// one by one, no page twice in a sequence, and the prefix map exact both ways. Allocates; for
    /// idle moments and tests.
    pub fn check<'a>(&self, holders: impl Iterator<Item = &'a [u32]>) {
        let mut counted = vec![0_u32; self.book.len()];
        let mut seen_by = vec![usize::MAX; self.book.len()];
        for (holder, pages) in holders.enumerate() {
            for &page in pages {
                let seen = &mut seen_by[page as usize];
                assert_ne!(*seen, holder, "page {page} is twice in one sequence");
                *seen = holder;
                counted[page as usize] += 1;
            }
        }
        for (page, (entry, counted)) in self.book.iter().zip(counted).enumerate() {
            assert_eq!(entry.holders, counted, "holders of page {page}");
            if let Some(hash) = entry.hash {
                assert_eq!(self.find(hash), Some(page as u32), "page {page} is cached but lost");
            }
        }
        let cached = self.book.iter().filter(|p| p.hash.is_some()).count();
        assert_eq!(cached, self.prefixes.as_ref().map_or(0, HashMap::len), "prefix map");

        let (mut free, mut before, mut page) = (0, NONE, self.first);
        while page != NONE {
            let entry = &self.book[page as usize];
            assert_eq!(entry.holders, 0, "page {page} is free and held");
            assert_eq!(entry.before, before, "free list at page {page}");
            free += 1;
            assert!(free <= self.free, "the free list is longer than its count");
            (before, page) = (page, entry.after);
        }
        assert_eq!((free, before), (self.free, self.last), "free list");
        let held = self.book.iter().filter(|p| p.holders > 0).count();
        assert_eq!(free + held, self.book.len(), "free + used = all");
    }

    fn link_first(&mut self, page: u32) {
        self.link(page, NONE, self.first);
    }

    fn link_last(&mut self, page: u32) {
        self.link(page, self.last, NONE);
    }

    fn link(&mut self, page: u32, before: u32, after: u32) {
        let entry = &mut self.book[page as usize];
        (entry.before, entry.after) = (before, after);
        self.join(before, page);
        self.join(page, after);
        self.free += 1;
    }

    fn unlink(&mut self, page: u32) {
        let Page { before, after, .. } = self.book[page as usize];
        self.join(before, after);
        self.free -= 1;
    }

    /// Makes `before` and `after` neighbours; `NONE` is the end of the list on that side.
    fn join(&mut self, before: u32, after: u32) {
        match before {
            NONE => self.first = after,
            page => self.book[page as usize].after = after,
        }
        match after {
            NONE => self.last = before,
            page => self.book[page as usize].before = before,
        }
    }
}
