//! Adapters of many megabytes: their work on several threads.
//!
//! Owns from where on more than one thread is worth it, and the order of results. Never knows what
//! the work is. The thing to know: a small adapter costs no thread, so loads beside serving stay as
//! they were.

use crate::error::Result;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

/// Files of so many bytes are large: they take about a fifth of a second on one thread.
const LARGE: u64 = 64 << 20;

/// Hashes files of so many bytes while they are read, or before if they are small. Errors: that of
/// `hash` first, for nothing else is to be said about files that are not what they should be.
pub fn beside<A: Send, B>(
    bytes: u64,
    hash: impl FnOnce() -> Result<A> + Send,
    read: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    if bytes < LARGE {
        return Ok((hash()?, read()?));
    }
    thread::scope(|scope| {
        let hash = scope.spawn(hash);
        let read = read();
        let hash = hash.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok((hash, read?))
    })
}

/// The results of `work` over `items` of so many bytes in all, in their order: on the calling
/// thread, and on one for each further core if they are large. Errors: that of the first item that
/// has one; later items may then not be begun.
pub fn each<T: Sync, R: Send>(
    bytes: u64,
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if bytes < LARGE {
        return items.iter().map(work).collect();
    }
    let results: Vec<Mutex<Option<Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let some = || {
        while let Some(item) = Some(next.fetch_add(1, Relaxed)).filter(|i| *i < items.len()) {
            let result = work(&items[item]);
            if result.is_err() {
                next.fetch_max(items.len(), Relaxed);
            }
            *results[item].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    thread::scope(|scope| {
        for _ in 1..thread::available_parallelism().map_or(1, usize::from) {
            // Without it the others do its part.
            if Builder::new().spawn_scoped(scope, some).is_err() {
                break;
            }
        }
        some();
    });
    // Items are begun in order, so an error comes before whatever was not begun.
    let done =
        results.into_iter().map_while(|r| r.into_inner().unwrap_or_else(PoisonError::into_inner));
    done.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_and_errors_come_in_order_large_or_not() {
        let items: Vec<usize> = (0..1000).collect();
        for bytes in [0, LARGE] {
            let doubled = each(bytes, &items, |i| Ok(2 * i)).expect("no error");
            assert_eq!(doubled, items.iter().map(|i| 2 * i).collect::<Vec<_>>());
            let begun = AtomicUsize::new(0);
            let failed = each(bytes, &items, |i| {
                begun.fetch_add(1, Relaxed);
                if *i >= 300 { Err(Error::fault(i.to_string())) } else { Ok(()) }
            });
            assert_eq!(failed.expect_err("planted").message, "300");
            assert!(begun.into_inner() < 1000);
            let (hash, read) = (|| Err::<(), _>(Error::fault("hash")), || Ok(1));
            assert_eq!(beside(bytes, hash, read).expect_err("planted").message, "hash");
            let (hash, read) =
                (|| Err::<(), _>(Error::fault("hash")), || Err::<(), _>(Error::fault("read")));
            assert_eq!(beside(bytes, hash, read).expect_err("planted").message, "hash");
            assert_eq!(beside(bytes, || Ok(1), || Ok(2)).expect("no error"), (1, 2));
        }
    }
}
