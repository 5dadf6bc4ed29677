//! Disks that are full, broken or read-only for a while: what was answered as done is there after
//! a kill, what was refused is not, and serving goes on.
//!
//! The disk is a library before libc in the server, see `disk.rs`; the judge is a book of what was
//! answered, see `books.rs`. Six random schedules run, in a soak 200; `POLYLORA_ONLY` repeats one
//! of them, and `POLYLORA_PROGRAM` names another build of the program to judge.

mod books;
mod disk;
mod moved;
mod starts;

use books::{Books, Change};
use disk::Fault;
use reqwest::StatusCode;

/// What a change is of, and is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Access,
    Catalogue,
    Jobs,
    Usage,
}

impl Of {
    fn database(self) -> &'static str {
        match self {
            Self::Usage => "usage.db",
            _ => "polylora.db",
        }
    }

    /// What can be done again and again.
    fn change(self, round: usize) -> Change {
        match (self, round % 2) {
            (Self::Access, _) => Change::MakeKey,
            (Self::Jobs, _) => Change::Merge(format!("m{round}")),
            // A new content each time, or the alias anew.
            (_, 0) => Change::Put(format!("b{round}"), round % 6),
            (_, _) => Change::Alias("alias".into(), "a0@1".into()),
        }
    }
}

/// k commits of one database fail in a row; then there is room again.
async fn commits_fail(of: Of, k: i64) {
    let flags: &[&str] = if of == Of::Usage { &["--usage-sync", "true"] } else { &[] };
    let mut books = Books::new(k as u64, flags).await;
    books.disk.fail(Fault::Full, of.database(), Some(k));
    for round in 0..40 {
        if books.disk.failed() == k as u64 {
            break;
        }
        if of == Of::Usage {
            // It is answered when its record is on disk, or refused.
            if books.chat().await != StatusCode::OK {
                books.writable().await;
            }
        } else if books.try_one(&of.change(round)).await == Some(false) {
            books.writable().await;
        }
    }
    assert_eq!(books.disk.failed(), k as u64, "{of:?}");
    books.writable().await;
    for round in 100..103 {
        for of in [Of::Access, Of::Catalogue, Of::Jobs] {
            let change = of.change(round);
            assert_eq!(books.try_one(&change).await, Some(true), "{of:?}: {change:?}");
        }
        assert_eq!(books.chat().await, StatusCode::OK);
    }
    let key = books.world.keys.first().expect("a key").clone();
    assert_eq!(books.try_one(&Change::Revoke(key)).await, Some(true));
    assert_eq!(books.try_one(&Change::Delete("a1".into())).await, Some(true));
    // Every answer has its record: the page waits for their commit.
    books.get("/v1/usage").await;
    books.kill().await;
    books.start();
    books.compare(None).await;
}

#[tokio::test]
async fn keys_and_audit_are_on_disk_after_commits_that_failed() {
    for k in 1..=5 {
        commits_fail(Of::Access, k).await;
    }
}

#[tokio::test]
async fn the_catalogue_is_on_disk_after_commits_that_failed() {
    for k in 1..=5 {
        commits_fail(Of::Catalogue, k).await;
    }
}

#[tokio::test]
async fn merges_are_on_disk_after_commits_that_failed() {
    for k in 1..=5 {
        commits_fail(Of::Jobs, k).await;
    }
}

#[tokio::test]
async fn usage_is_on_disk_after_commits_that_failed() {
    for k in 1..=5 {
        commits_fail(Of::Usage, k).await;
    }
}

/// What a fault may strike: all of the directory, or one thing in it.
const PLACES: [&str; 8] =
    ["", "", "polylora.db", "polylora.db", "usage.db", "/adapters/", "/staging/", "/files/"];

/// Faults, changes and kills in some order.
async fn schedule(seed: u64) -> Books {
    let mut books = Books::new(seed, &[]).await;
    for _ in 0..30 {
        match books.below(12) {
            0 | 1 => {
                let fault = Fault::ALL[books.below(4)];
                // A disk that is read-only is so all over.
                let everywhere = fault == Fault::ReadOnly;
                let place = if everywhere { "" } else { PLACES[books.below(PLACES.len())] };
                let times = (books.below(2) == 0).then(|| 1 + books.below(3) as i64);
                books.disk.fail(fault, place, times.filter(|_| !everywhere));
            }
            2 => books.disk.heal(),
            3 => {
                let change = books.choose();
                let cut = books.kill_during(&change).await;
                books.start();
                books.compare(cut.then_some(&change)).await;
            }
            4 => {
                books.disk.heal();
                books.writable().await;
            }
            5 | 6 => assert_eq!(books.chat().await, StatusCode::OK),
            _ => {
                let change = books.choose();
                books.try_one(&change).await;
            }
        }
    }
    books.disk.heal();
    books.writable().await;
    for _ in 0..5 {
        let change = books.choose();
        assert_eq!(books.try_one(&change).await, Some(true), "{change:?}");
        assert_eq!(books.chat().await, StatusCode::OK);
    }
    books.get("/v1/usage").await;
    books.kill().await;
    books.start();
    books.compare(None).await;
    books
}

#[tokio::test]
async fn books_agree_after_any_schedule_of_faults_and_kills() {
    let seeds = support::soak::cases(6, 200);
    let rounds = seeds.len();
    let mut tally = std::collections::BTreeMap::new();
    for seed in seeds {
        eprintln!("schedule {seed}");
        for (what, n) in schedule(seed as u64).await.tally {
            *tally.entry(what).or_insert(0) += n;
        }
    }
    eprintln!("{rounds} schedules: {tally:?}");
    assert!(rounds < 5 || tally.contains_key("507"), "no fault was met: {tally:?}");
}
