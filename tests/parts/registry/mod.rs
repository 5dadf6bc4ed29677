//! The registry against a bank that only keeps books: publishing, leasing, replacing, evicting,
//! deleting, restarting.

mod crowds;
mod disk;
mod moves;
mod room;

use polylora::adapters::bank::{Bank, BankCommand, BankSender, Probe, Slot};
use polylora::adapters::registry::{Registry, RegistryOptions};
use polylora::adapters::version::{Entry, Publish, Removal, State};
use polylora::adapters::{BaseRows, Digest};
use polylora::database::Storage;
use polylora::error::{Error, Kind};
use polylora_kernels::Dtype;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use support::files::{Files, base_bias, base_rows, tiny};
use support::live::PATIENCE;

/// A thread that answers `BankCommand`s as the engine does, and notes what it saw.
struct FakeEngine {
    sender: mpsc::SyncSender<BankCommand>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    installs: AtomicUsize,
    removes: AtomicUsize,
    probes: AtomicUsize,
    /// Rows of the base that were read: DoRA's norms need each row once per preparation.
    rows_read: AtomicUsize,
    /// Slots now taken, and by what.
    slots: Mutex<HashMap<Slot, Digest>>,
    /// What the probe reports instead of 1.0, by number of the probe.
    changes: Mutex<Vec<f32>>,
    refuse_installs: AtomicBool,
}

impl FakeEngine {
    fn start(slots_max: usize) -> Self {
        let (sender, commands) = mpsc::sync_channel(64);
        let seen = Arc::new(Seen::default());
        let noted = seen.clone();
        std::thread::spawn(move || {
            let mut bank = Bank::new(slots_max);
            for command in commands {
                answer(command, &mut bank, &noted);
            }
        });
        Self { sender, seen }
    }

    fn bank(&self) -> BankSender {
        let sender = self.sender.clone();
        Arc::new(move |command| sender.send(command).map_err(|_| Error::fault("engine gone")))
    }
}

fn answer(command: BankCommand, bank: &mut Bank, seen: &Seen) {
    let full = || Error::new(Kind::Capacity, "insufficient_capacity", "every slot is taken");
    match command {
        BankCommand::Install { prepared, probe, reply } => {
            if seen.refuse_installs.load(Ordering::SeqCst) {
                let _ = reply.send(Err(Error::fault("refused by the test")));
                return;
            }
            let digest = prepared.digest;
            let outcome = bank.install(*prepared).map_err(|_| full()).map(|slot| {
                let twice = seen.slots.lock().unwrap().insert(slot, digest);
                assert!(twice.is_none(), "a taken slot was installed over");
                seen.installs.fetch_add(1, Ordering::SeqCst);
                let change = probe.then(|| {
                    seen.probes.fetch_add(1, Ordering::SeqCst);
                    let mut changes = seen.changes.lock().unwrap();
                    let logit_change_max = if changes.is_empty() { 1.0 } else { changes.remove(0) };
                    Probe { logit_change_max }
                });
                (slot, change)
            });
            let _ = reply.send(outcome);
        }
        BankCommand::Remove { slot, digest, reply } => {
            assert_eq!(bank.digest(slot), Some(digest), "removed what is not there");
            bank.remove(slot);
            seen.slots.lock().unwrap().remove(&slot);
            seen.removes.fetch_add(1, Ordering::SeqCst);
            let _ = reply.send(Ok(()));
        }
    }
}

/// A registry on a directory, and the engine behind it.
struct Fixture {
    registry: Registry,
    seen: Arc<Seen>,
    dir: tempfile::TempDir,
}

fn options(dir: &Path) -> RegistryOptions {
    RegistryOptions {
        text: support::files::base_text(),
        storage: Storage::of(dir),
        base_name: "tiny-base".into(),
        base_digest: Digest([7; 32]),
        shape: Arc::new(tiny()),
        factors: Dtype::F32.into(),
        resident_bytes_max: 1 << 30,
        residents_max: 1000,
        load_wait_max: Duration::ZERO,
        load_patience: Duration::ZERO,
        upload_bytes_max: 1 << 20,
        versions_kept: 3,
        adapters_max: 1000,
        other_bytes: Arc::new(|_| 0),
        metrics: Arc::default(),
    }
}

async fn open(o: RegistryOptions, slots: usize) -> Result<(Registry, Arc<Seen>), Error> {
    open_with(o, slots, base_rows(&tiny())).await
}

async fn open_with(
    o: RegistryOptions,
    slots: usize,
    rows: BaseRows,
) -> Result<(Registry, Arc<Seen>), Error> {
    let shape = tiny();
    let engine = FakeEngine::start(slots);
    let bank = engine.bank();
    let seen = engine.seen.clone();
    let counted: BaseRows = Arc::new(move |site, row, out| {
        seen.rows_read.fetch_add(1, Ordering::SeqCst);
        rows(site, row, out);
    });
    let registry = Registry::open(o, counted, base_bias(&shape), bank).await?;
    Ok((registry, engine.seen))
}

impl Fixture {
    async fn new() -> Self {
        Self::with(1000, |_| {}).await
    }

    async fn with(slots: usize, change: impl FnOnce(&mut RegistryOptions)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut o = options(dir.path());
        o.residents_max = slots;
        change(&mut o);
        let (registry, seen) = open(o, slots).await.unwrap();
        Self { registry, seen, dir }
    }

    async fn put(&self, name: &str, seed: u64) -> Entry {
        publish(&self.registry, name, seed, false).await.unwrap()
    }

    /// Stops and opens again on the same directory.
    async fn restarted(self) -> Self {
        let Self { registry, dir, .. } = self;
        drop(registry);
        let (registry, seen) = reopened(dir.path()).await;
        Self { registry, seen, dir }
    }

    fn counts(&self) -> (usize, usize, usize) {
        let count = |c: &AtomicUsize| c.load(Ordering::SeqCst);
        (
            count(&self.seen.installs),
            count(&self.seen.removes),
            self.seen.slots.lock().unwrap().len(),
        )
    }

    fn blobs(&self) -> usize {
        let prefixes = std::fs::read_dir(self.dir.path().join("adapters/sha256")).unwrap();
        prefixes.map(|p| std::fs::read_dir(p.unwrap().path()).unwrap().count()).sum()
    }

    fn staged(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("staging")).unwrap().count()
    }

    fn state(&self, name: &str) -> Vec<(u64, State, bool, usize)> {
        let entries = self.registry.versions(name);
        entries.iter().map(|e| (e.version.number, e.state, e.current, e.leases)).collect()
    }
}

/// The lock goes with the last task of the registry before, a moment after its drop.
async fn reopened(dir: &Path) -> (Registry, Arc<Seen>) {
    for _ in 0..200 {
        match open(options(dir), 1000).await {
            Ok(opened) => return opened,
            Err(e) => assert_eq!(e.code, "data_dir_locked"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the data directory stayed locked");
}

async fn publish(r: &Registry, name: &str, seed: u64, force: bool) -> Result<Entry, Error> {
    let staging = r.stage(name)?;
    Files::plain(seed).write(&staging.dir);
    r.publish(staging, Publish { force, ..Publish::default() }).await
}

/// Waits until something that happens in the background is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "it never came to this: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn code_of(r: &Registry, model: &str) -> (&'static str, Kind) {
    let error = r.acquire(model).await.map(drop).unwrap_err();
    (error.code, error.kind)
}

#[tokio::test]
async fn a_published_adapter_is_stored_probed_and_leased() {
    let fixture = Fixture::new().await;
    let entry = fixture.put("sql", 100).await;
    assert_eq!(
        (entry.version.id().as_str(), entry.state, entry.current),
        ("sql@1", State::Ready, true)
    );
    assert!(entry.resident);
    assert_eq!(entry.version.logit_change_max, 1.0);
    assert_eq!(entry.version.summary.sites, 4);
    assert_eq!(fixture.registry.residency().0, entry.version.resident_bytes);
    assert!(entry.version.resident_bytes > 0 && entry.version.file_bytes > 0);
    assert_eq!((fixture.blobs(), fixture.staged()), (1, 0));
    assert_eq!(fixture.seen.probes.load(Ordering::SeqCst), 1);
    let lease = fixture.registry.acquire("sql").await.unwrap();
    let slots = fixture.seen.slots.lock().unwrap().clone();
    assert_eq!(slots[&lease.slot()], lease.version().digest);
    let again = fixture.registry.acquire("sql@1").await.unwrap();
    assert_eq!(again.slot(), lease.slot());
    let clone = again.clone();
    assert_eq!(fixture.state("sql")[0].3, 2);
    drop((again, clone, lease));
    assert_eq!(fixture.state("sql")[0].3, 0);
    for unknown in ["sql@2", "sql@0", "sql@01", "sql@+1", "sql@", "sq", "", "@1", "tiny-base"] {
        assert_eq!(code_of(&fixture.registry, unknown).await, ("model_not_found", Kind::NotFound));
    }
}

#[tokio::test]
async fn replaced_adapter_keeps_serving_until_its_last_lease() {
    let fixture = Fixture::new().await;
    let first = fixture.put("sql", 1).await;
    let lease = fixture.registry.acquire("sql").await.unwrap();
    fixture.put("sql", 2).await;
    let new = fixture.registry.acquire("sql").await.unwrap();
    assert_eq!((lease.version().number, new.version().number), (1, 2));
    assert_ne!(lease.slot(), new.slot());
    let states = [(1, State::Draining, false, 1), (2, State::Ready, true, 1)];
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(fixture.state("sql"), states);
    assert_eq!(fixture.counts(), (2, 0, 2), "a leased version stays in its slot");
    assert_eq!(fixture.registry.residency().0, 2 * first.version.resident_bytes);
    drop(lease);
    until("the old version left", || fixture.counts() == (2, 1, 1)).await;
    let settled = [(1, State::Ready, false, 0), (2, State::Ready, true, 1)];
    until("it has drained", || fixture.state("sql") == settled).await;
    assert_eq!(fixture.registry.residency().0, first.version.resident_bytes);
    // It stays on disk, and can be asked for by number.
    let old = fixture.registry.acquire("sql@1").await.unwrap();
    assert_eq!(old.version().digest, first.version.digest);
    assert_eq!(fixture.counts(), (3, 1, 2));
}

#[tokio::test]
async fn an_unused_version_leaves_as_soon_as_it_is_replaced() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    fixture.put("sql", 2).await;
    until("the old version left", || fixture.counts() == (2, 1, 1)).await;
}

#[tokio::test]
async fn only_the_newest_versions_are_kept() {
    let fixture = Fixture::with(1000, |o| o.versions_kept = 2).await;
    fixture.put("sql", 1).await;
    let lease = fixture.registry.acquire("sql").await.unwrap();
    for seed in 2..6 {
        fixture.put("sql", seed).await;
    }
    let numbers = || fixture.state("sql").iter().map(|s| s.0).collect::<Vec<_>>();
    // 1 is leased, so it outlives 2 and 3.
    until("old ones went", || numbers() == [1, 4, 5] && fixture.blobs() == 3).await;
    drop(lease);
    until("the leased one went", || numbers() == [4, 5] && fixture.blobs() == 2).await;
    let fixture = fixture.restarted().await;
    assert_eq!(fixture.state("sql").len(), 2);
}

#[tokio::test]
async fn the_same_content_again_is_the_same_version() {
    let fixture = Fixture::new().await;
    let first = fixture.put("sql", 1).await;
    let again = fixture.put("sql", 1).await;
    assert_eq!(first.version, again.version);
    assert_eq!((fixture.counts().0, fixture.blobs(), fixture.staged()), (1, 1, 0));
    fixture.put("sql", 2).await;
    // Content of an older version is a new publication.
    assert_eq!(fixture.put("sql", 1).await.version.number, 3);
}

#[tokio::test]
async fn an_adapter_without_effect_is_shown_and_not_served_unless_forced() {
    for change in [0.0, f32::NAN] {
        let fixture = Fixture::new().await;
        fixture.seen.changes.lock().unwrap().push(change);
        let entry = fixture.put("flat", 1).await;
        assert_eq!((entry.state, entry.current), (State::Ineffective, true));
        let refused = ("adapter_ineffective", Kind::Conflict);
        assert_eq!(code_of(&fixture.registry, "flat").await, refused);
        assert_eq!(code_of(&fixture.registry, "flat@1").await, refused);
        until("it left the bank", || fixture.counts() == (1, 1, 0)).await;
        let fixture = fixture.restarted().await;
        assert_eq!(fixture.state("flat"), [(1, State::Ineffective, true, 0)]);
        assert_eq!(code_of(&fixture.registry, "flat").await, refused);
        let forced = publish(&fixture.registry, "flat", 1, true).await.unwrap();
        assert_eq!((forced.version.number, forced.state), (1, State::Ready));
        fixture.registry.acquire("flat").await.unwrap();
        let fixture = fixture.restarted().await;
        fixture.registry.acquire("flat").await.unwrap();
    }
}

#[tokio::test]
async fn an_adapter_without_effect_never_takes_the_name_from_one_that_works() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    fixture.seen.changes.lock().unwrap().push(0.0);
    let flat = fixture.put("sql", 2).await;
    assert_eq!((flat.version.number, flat.state, flat.current), (2, State::Ineffective, false));
    assert_eq!(fixture.registry.acquire("sql").await.unwrap().version().number, 1);
    // Uploading it again changes nothing; forcing it moves the name.
    assert_eq!(fixture.put("sql", 2).await.version.number, 2);
    let forced = publish(&fixture.registry, "sql", 2, true).await.unwrap();
    assert_eq!((forced.version.number, forced.current), (2, true));
    assert_eq!(fixture.registry.acquire("sql").await.unwrap().version().number, 2);
}

#[tokio::test]
async fn a_deleted_name_is_gone_at_once_and_its_memory_after_the_last_lease() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    fixture.put("sql", 2).await;
    let lease = fixture.registry.acquire("sql").await.unwrap();
    let removed = fixture.registry.delete("sql", Removal::default()).await.unwrap();
    assert_eq!((removed.entries.len(), removed.gone, removed.cut), (2, false, 0));
    assert_eq!(removed.entries[1].leases, 1);
    assert_eq!(code_of(&fixture.registry, "sql").await.0, "model_not_found");
    assert_eq!(code_of(&fixture.registry, "sql@2").await.0, "model_not_found");
    assert!(fixture.registry.versions("sql").is_empty() && fixture.registry.list().is_empty());
    let gone = fixture.registry.delete("sql", Removal::default()).await.unwrap_err();
    assert_eq!((gone.code, gone.kind), ("model_not_found", Kind::NotFound));
    until("the unused version's files went", || fixture.blobs() == 1).await;
    assert_eq!(fixture.counts().2, 1);
    drop(lease);
    until("all is free", || {
        fixture.blobs() == 0 && fixture.counts().2 == 0 && fixture.registry.residency().0 == 0
    })
    .await;
    // A number is never used twice.
    assert_eq!(fixture.put("sql", 1).await.version.number, 3);
    let fixture = fixture.restarted().await;
    fixture.registry.delete("sql", Removal::default()).await.unwrap();
    let fixture = fixture.restarted().await;
    assert_eq!(fixture.put("sql", 1).await.version.number, 4);
}

/// Bytes in the bank of one adapter from `Files::plain`.
async fn plain_bytes() -> u64 {
    Fixture::new().await.put("x", 1).await.version.resident_bytes
}

#[tokio::test]
async fn the_least_recently_used_adapter_makes_room() {
    let one = plain_bytes().await;
    let fixture = Fixture::with(1000, |o| o.resident_bytes_max = 2 * one + one / 2).await;
    fixture.put("a", 1).await;
    fixture.put("b", 2).await;
    drop(fixture.registry.acquire("b").await.unwrap());
    drop(fixture.registry.acquire("a").await.unwrap());
    fixture.put("c", 3).await;
    let resident = |name: &str| fixture.registry.versions(name)[0].resident;
    assert_eq!((resident("a"), resident("b"), resident("c")), (true, false, true));
    let b = fixture.registry.acquire("b").await.unwrap();
    assert!(fixture.registry.residency().0 <= 2 * one + one / 2);
    // What is leased is not evicted: with two leased there is no room, and the error says how much.
    let c = fixture.registry.acquire("c").await.unwrap();
    let error = fixture.registry.acquire("a").await.map(drop).unwrap_err();
    assert_eq!((error.code, error.kind), ("insufficient_capacity", Kind::Capacity));
    assert!(error.message.contains(&one.to_string()), "{error}");
    assert!(error.message.contains(&(one / 2).to_string()), "{error}");
    let error = publish(&fixture.registry, "d", 4, false).await.unwrap_err();
    assert_eq!(error.code, "insufficient_capacity");
    assert!(fixture.registry.versions("d").is_empty());
    assert_eq!((fixture.blobs(), fixture.staged()), (3, 0));
    drop((b, c));
    fixture.registry.acquire("a").await.unwrap();
    assert_eq!(fixture.registry.stats().evictions, 3);
}
