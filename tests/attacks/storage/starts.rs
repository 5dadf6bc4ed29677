//! Starts on what is lost, old, full or read-only.

use super::books::{Books, Change, World};
use super::disk::Fault;
use reqwest::StatusCode;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::live::{BASE, hello};

/// Adapters' directories below `dir`.
fn blobs(dir: &Path) -> usize {
    let list = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.path()).collect()
    };
    let (kept, aside) = (dir.join("adapters/sha256"), dir.join("orphans"));
    list(&kept).iter().map(|prefix| list(prefix).len()).sum::<usize>() + list(&aside).len()
}

/// The catalogue and its log.
fn catalogue(data: &Path) -> [PathBuf; 3] {
    ["polylora.db", "polylora.db-wal", "polylora.db-shm"].map(|name| data.join(name))
}

/// Five adapters, then what `harm` does to the files of the stopped server, and a start: as many
/// files as before, and the log says `said`. Again after a change and another start.
async fn lost(harm: impl FnOnce(&Path, &Path), said: &str) {
    let mut books = Books::new(1, &[]).await;
    books.stop();
    let data = books.data();
    let copy = data.with_file_name("copy.db");
    std::fs::copy(data.join("polylora.db"), &copy).expect("a copy");
    books.start();
    for (i, name) in ["b", "c", "d"].iter().enumerate() {
        let change = Change::Put((*name).to_owned(), 2 + i);
        assert_eq!(books.try_one(&change).await, Some(true));
    }
    books.stop();
    assert_eq!(blobs(&data), 5);
    harm(&data, &copy);
    let log = data.with_file_name("log");
    books.log = Some(log.clone());
    books.start();
    assert_eq!(blobs(&data), 5, "no blob is lost");
    let text = std::fs::read_to_string(log).expect("a log");
    assert!(text.contains(said), "{text}");
    // What is sent again is served again, of the same content.
    books.world.adapters = books.seen().await.adapters;
    assert_eq!(books.try_one(&Change::Put("d".into(), 4)).await, Some(true));
    let answer = books.live().chat(hello("d", 1));
    assert_eq!(answer.await.status, 401, "it wants a key");
    books.stop();
    books.start();
    assert_eq!(blobs(&data), 5, "nor by the next start");
}

#[tokio::test]
async fn no_blob_is_lost_with_a_catalogue_that_was_deleted() {
    let harm = |data: &Path, _: &Path| {
        for file in catalogue(data) {
            let _ = std::fs::remove_file(file);
        }
    };
    lost(harm, "polylora.db names no adapter, but adapters/ holds some").await;
}

#[tokio::test]
async fn no_blob_is_lost_with_a_catalogue_that_was_emptied() {
    let harm = |data: &Path, _: &Path| std::fs::write(data.join("polylora.db"), "").expect("empty");
    lost(harm, "polylora.db names no adapter, but adapters/ holds some").await;
}

#[tokio::test]
async fn no_blob_is_lost_with_an_older_copy_of_the_catalogue() {
    let harm = |data: &Path, copy: &Path| {
        for file in catalogue(data) {
            let _ = std::fs::remove_file(file);
        }
        std::fs::copy(copy, data.join("polylora.db")).expect("put back");
    };
    lost(harm, "files that are newer than polylora.db").await;
}

/// A start on a disk that takes nothing serves what is there, refuses changes and says so; with
/// room again it goes on as ever. `full`: it may find out by the first change only.
async fn serves_what_is_there(books: &mut Books, full: bool, heal: impl FnOnce(&Books)) {
    books.start();
    assert_eq!(books.seen().await, books.world);
    if full {
        assert_eq!(books.try_one(&Change::Put("new".into(), 3)).await, Some(false));
    }
    let ready = books.live().get("/ready").await;
    assert_eq!((ready.status, &ready.json()["storage"]), (200, &"read_only".into()));
    let page = books.get("/metrics").await;
    assert!(page.lines().any(|l| l == "polylora_storage_read_only 1"), "{page}");
    for model in [BASE, "a0", "a1"] {
        assert_eq!(books.chat_with(model).await, StatusCode::OK, "{model}");
    }
    for change in [
        Change::Put("new".into(), 3),
        Change::MakeKey,
        Change::Delete("a0".into()),
        Change::Merge("m".into()),
    ] {
        assert_eq!(books.try_one(&change).await, Some(false), "{change:?}");
    }
    heal(books);
    books.writable().await;
    for change in [Change::Put("new".into(), 3), Change::MakeKey, Change::Merge("m".into())] {
        assert_eq!(books.try_one(&change).await, Some(true), "{change:?}");
    }
    books.get("/v1/usage").await;
    books.kill().await;
    books.start();
    books.compare(None).await;
}

#[tokio::test]
async fn a_start_on_a_disk_that_takes_nothing_serves_what_is_there() {
    for fault in [Fault::Full, Fault::ReadOnly] {
        for clean in [true, false] {
            eprintln!("{fault:?} after {}", if clean { "an end" } else { "a kill" });
            let mut books = Books::new(7, &[]).await;
            let key = books.world.keys.first().expect("a key").clone();
            assert_eq!(books.try_one(&Change::Revoke(key)).await, Some(true));
            if clean {
                books.stop();
            } else {
                books.kill().await;
            }
            books.disk.fail(fault, "", None);
            serves_what_is_there(&mut books, false, |books| books.disk.heal()).await;
        }
    }
}

#[tokio::test]
async fn a_start_on_a_new_directory_that_takes_nothing_serves_the_base() {
    let mut books = Books::new(7, &[]).await;
    books.stop();
    std::fs::remove_dir_all(books.data()).expect("removed");
    std::fs::create_dir(books.data()).expect("made");
    books.disk.fail(Fault::Full, "", None);
    books.start();
    assert_eq!(books.seen().await, World::default());
    assert_eq!(books.chat().await, StatusCode::OK);
    assert_eq!(books.try_one(&Change::Put("a".into(), 1)).await, Some(false));
    books.disk.heal();
    books.writable().await;
    assert_eq!(books.try_one(&Change::Put("a".into(), 1)).await, Some(true));
}

/// A file system of its own at `place`, gone with the value.
struct Mount(PathBuf);

impl Mount {
    /// `None` where this process may not mount.
    fn new(place: &Path, size: &str) -> Option<Self> {
        mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], place)
            .then(|| Self(place.to_owned()))
    }

    fn again(&self, how: &str) {
        assert!(mount(&["-o", &format!("remount,{how}")], &self.0), "{how}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(how: &[&str], place: &Path) -> bool {
    let done = Command::new("mount").args(how).arg(place).output();
    done.is_ok_and(|done| done.status.success())
}

/// The same on real file systems: a small one that is full to the last byte, and a read-only one.
#[tokio::test]
async fn a_start_on_a_real_disk_that_takes_nothing_serves_what_is_there() {
    for clean in [true, false] {
        for how in ["full", "ro"] {
            let mut books = Books::new(7, &[]).await;
            books.stop();
            let data = books.data();
            let copy = data.with_file_name("before");
            std::fs::rename(&data, &copy).expect("moved");
            std::fs::create_dir(&data).expect("made");
            let Some(disk) = Mount::new(&data, "8m") else {
                eprintln!("SKIPPED, not passed: a mount needs root");
                return;
            };
            let from = format!("{}/.", copy.display());
            let copied = Command::new("cp").arg("-a").arg(from).arg(&data).status();
            assert!(copied.expect("cp").success());
            books.start();
            let key = books.world.keys.first().expect("a key").clone();
            assert_eq!(books.try_one(&Change::Revoke(key)).await, Some(true));
            if clean {
                books.stop();
            } else {
                books.kill().await;
            }
            eprintln!("{how} after {}", if clean { "an end" } else { "a kill" });
            let filler = data.join("filler");
            match how {
                "full" => fill(&filler),
                how => disk.again(how),
            }
            serves_what_is_there(&mut books, how == "full", |_| match how {
                "full" => std::fs::remove_file(&filler).expect("room"),
                _ => disk.again("rw"),
            })
            .await;
            books.stop();
        }
    }
}

/// To the last byte.
fn fill(file: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(file).expect("a file");
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}
