//! A directory of four databases, written by the program of commit 5e45a10, becomes one of two:
//! nothing is lost, whenever the move is killed and whatever the disk does.
//!
//! The directory is `tests/golden/data-5e45a10`; its README says what is in it and how it was made.

use super::disk::{Disk, Fault};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use support::live::{Live, form, hello, whole};
use tempfile::TempDir;

/// Pages that must say the same after the move.
const PAGES: [&str; 7] = [
    "/v1/adapters",
    "/v1/aliases",
    "/v1/keys",
    "/v1/merges",
    "/v1/limits/a",
    "/v1/usage",
    "/v1/audit?limit=1000",
];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data-5e45a10")
}

fn expected(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("expected.json")).expect("it is kept");
    serde_json::from_str(&text).expect("JSON")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let (path, name) = entry.map(|e| (e.path(), e.file_name())).expect("an entry");
        match path.is_dir() {
            true => copy(&path, &to.join(name)),
            false => drop(std::fs::copy(&path, to.join(name)).expect("copied")),
        }
    }
}

async fn open(file: &Path) -> SqlitePool {
    let options = SqliteConnectOptions::new().filename(file);
    SqlitePool::connect_with(options).await.expect("a database")
}

async fn change(file: &Path, statements: &'static str) {
    let pool = open(file).await;
    sqlx::raw_sql(statements).execute(&pool).await.expect("changed");
    pool.close().await;
}

/// The old directory as a killed server leaves it: a last commit of each file is in its log.
async fn killed(to: &Path) {
    let before = tempfile::tempdir().expect("a directory");
    copy(&golden().join("data"), before.path());
    let mut pools = Vec::new();
    for (file, statement) in [
        (
            "access.db",
            "UPDATE keys SET label = label || ', later'; UPDATE sqlite_sequence SET seq = 500;",
        ),
        ("jobs.db", "UPDATE jobs SET restarts = 7; UPDATE sqlite_sequence SET seq = 70;"),
        ("polylora.db", "UPDATE aliases SET updated = updated + 1"),
    ] {
        let pool = open(&before.path().join(file)).await;
        sqlx::raw_sql(statement).execute(&pool).await.expect("changed");
        pools.push(pool);
    }
    copy(before.path(), to);
    for pool in pools {
        pool.close().await;
    }
    assert!(std::fs::metadata(to.join("access.db-wal")).expect("a log").len() > 0);
}

/// Every row of each table, column for column as `like` has them.
type Rows = BTreeMap<String, (Vec<String>, Vec<String>)>;

async fn rows(file: &Path, like: Option<&Rows>) -> Rows {
    let pool = open(file).await;
    let tables = "SELECT name FROM sqlite_schema WHERE type = 'table'";
    let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&pool).await.expect("tables");
    let mut all = Rows::new();
    for table in tables.into_iter().filter(|t| like.is_none_or(|like| like.contains_key(t))) {
        let columns = match like {
            Some(like) => like[&table].0.clone(),
            None => {
                let names = "SELECT name FROM pragma_table_info(?)";
                sqlx::query_scalar(names).bind(&table).fetch_all(&pool).await.expect("columns")
            }
        };
        let quoted: Vec<String> = columns.iter().map(|c| format!("quote(\"{c}\")")).collect();
        let select = format!("SELECT {} FROM {table} ORDER BY 1", quoted.join(" || ',' || "));
        let rows = sqlx::query_scalar(sqlx::AssertSqlSafe(select));
        all.insert(table, (columns, rows.fetch_all(&pool).await.expect("rows")));
    }
    pool.close().await;
    all
}

/// What the three files of an old directory hold, as one.
async fn held(data: &Path) -> Rows {
    let mut all = Rows::new();
    for file in ["polylora.db", "access.db", "jobs.db"] {
        for (table, (columns, rows)) in rows(&data.join(file), None).await {
            all.entry(table).or_insert((columns, Vec::new())).1.extend(rows);
        }
    }
    for (_, rows) in all.values_mut() {
        rows.sort();
    }
    all
}

/// `polylora key list` on a directory that no server has.
fn list(data: &Path, environment: &[(&str, String)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polylora"));
    command.args(["key", "list", "--data-dir"]).arg(data);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.output().expect("the program starts")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// The directory is what the old one was, in two files, and the old names stand for nothing.
async fn check_moved(data: &Path, before: &Rows, when: &str) {
    let again = list(data, &[]);
    assert!(again.status.success(), "{when}: {}", said(&again));
    assert_eq!(String::from_utf8_lossy(&again.stdout).matches(", later").count(), 3, "{when}");
    assert_eq!(&rows(&data.join("polylora.db"), Some(before)).await, before, "{when}");
    assert!(!data.join("jobs.db").exists(), "{when}");
    // What programs before look at first, and refuse.
    let guard = open(&data.join("access.db")).await;
    let format: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&guard).await.unwrap();
    guard.close().await;
    assert_eq!(format, 1000, "{when}");
    for kept in ["access.db.migrated", "jobs.db.migrated"] {
        assert!(data.join(kept).exists(), "{when}: {kept}");
    }
}

/// Lets the move fail after 0, 1, 2 … calls that change the disk, until it gets through, and looks
/// at each half of it with a sound disk.
async fn cut_everywhere(fault: Fault, step: usize) {
    let image = tempfile::tempdir().expect("a directory");
    killed(image.path()).await;
    let sound = tempfile::tempdir().expect("a directory");
    copy(image.path(), sound.path());
    let before = held(sound.path()).await;
    for calls in (0..).step_by(step) {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path().join("data");
        copy(image.path(), &data);
        let disk = Disk::new(&data);
        disk.fail_after(fault, calls);
        let cut = list(&data, &disk.environment());
        let when = format!("{fault:?} after {calls} calls");
        match (fault, cut.status.success()) {
            (_, true) => {}
            (Fault::Kill, false) => {
                assert_eq!(cut.status.signal(), Some(9), "{when}: {}", said(&cut))
            }
            (_, false) => assert_eq!(said(&cut).lines().count(), 1, "{when}: {}", said(&cut)),
        }
        check_moved(&data, &before, &when).await;
        if cut.status.success() && (fault == Fault::Kill || disk.failed() == 0) {
            println!("{when}: through");
            let least = if fault == Fault::Kill { 50 } else { 10 };
            assert!(calls >= least, "the move changes the disk more often than that");
            return;
        }
    }
}

#[tokio::test]
async fn a_move_that_is_killed_anywhere_is_done_or_not_and_goes_on() {
    cut_everywhere(Fault::Kill, 1).await;
}

#[tokio::test]
async fn a_move_on_a_disk_that_fails_anywhere_is_done_or_not_and_goes_on() {
    for fault in Fault::ALL {
        cut_everywhere(fault, 5).await;
    }
}

/// A directory for a server: the model, and the data.
fn home(dir: &Path) -> TempDir {
    let home = Live::home();
    copy(&dir.join("data"), &home.path().join("data"));
    home
}

/// Whether `new` says all that `old` said; what comes and goes with a process is left out.
fn says(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => old.iter().all(|(name, value)| {
            ["progress", "resident", "resident_bytes", "leases", "last_used"]
                .contains(&name.as_str())
                || new.get(name).is_some_and(|new| says(value, new))
        }),
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| says(old, new))
        }
        (old, new) => old == new,
    }
}

async fn page(live: &Live, key: &str, path: &str) -> Value {
    let answer = whole(live.request(Method::GET, path).bearer_auth(key)).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text);
    answer.json()
}

async fn chat(live: &Live, key: &str, model: &str) -> u16 {
    let ask = live.request(Method::POST, "/v1/chat/completions").bearer_auth(key);
    whole(ask.json(&hello(model, 4))).await.status
}

/// Everything that was answered about the directory is answered again, by two starts.
async fn served(dir: &Path) {
    let expected = expected(dir);
    let secret = |name: &str| expected["secrets"][name].as_str().expect("a secret").to_owned();
    let (operator, acme, revoked) = (secret("operator"), secret("acme"), secret("revoked"));
    let mut live = Live::start_in(home(dir), &[], Stdio::inherit());
    for start in 1..=2 {
        for path in PAGES {
            let (old, new) = (&expected["pages"][path], page(&live, &operator, path).await);
            // The second start has what the first one was asked.
            if start == 1 || !path.contains("usage") {
                assert!(says(old, &new), "start {start}, {path}:\n{old:#}\nand now\n{new:#}");
            }
        }
        let merge = expected["pages"]["/v1/merges"]["data"][0]["id"].as_str().expect("an id");
        let report = page(&live, &operator, &format!("/v1/merges/{merge}/report")).await;
        assert!(says(&expected["report"], &report), "{report:#}");
        for model in ["tiny", "a", "a@1", "a@2", "b", "m", "prod"] {
            assert_eq!(chat(&live, &operator, model).await, 200, "{model}");
        }
        assert_eq!(chat(&live, &acme, "a").await, 200);
        assert_eq!(chat(&live, &revoked, "a").await, 401);
        live = live.crash_and_restart(&[]);
    }
    // Numbers go on: of versions, audit records and jobs.
    let put = live.request(Method::PUT, "/v1/adapters/a").bearer_auth(&operator);
    let put = whole(put.multipart(form(&live.adapter_files(9, 0.3)))).await;
    assert_eq!((put.status, &put.json()["version"]), (200, &json!(3)));
    let newest = |audit: &Value| audit["data"][0]["id"].as_u64().expect("a number");
    let audit = page(&live, &operator, PAGES[6]).await;
    assert_eq!(newest(&audit), newest(&expected["pages"][PAGES[6]]) + 1);
}

#[tokio::test]
async fn a_second_start_moves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    killed(dir.path()).await;
    assert!(list(dir.path(), &[]).status.success());
    let files = || {
        let entries = std::fs::read_dir(dir.path()).expect("entries").flatten();
        let file = |e: std::fs::DirEntry| (e.file_name(), std::fs::read(e.path()).ok());
        let mut all: Vec<_> = entries.map(file).collect();
        // Its log comes and goes.
        all.retain(|(name, _)| !name.to_string_lossy().starts_with("polylora.db"));
        all.sort();
        all
    };
    let (before, held) = (files(), rows(&dir.path().join("polylora.db"), None).await);
    assert!(list(dir.path(), &[]).status.success());
    assert_eq!(rows(&dir.path().join("polylora.db"), None).await, held);
    assert_eq!(files(), before);
}

#[tokio::test]
async fn files_that_do_not_belong_together_are_refused_with_a_line() {
    let old = golden().join("data/polylora.db");
    let refused = |data: &Path, line: &str| {
        let refused = list(data, &[]);
        assert_eq!((refused.status.code(), said(&refused)), (Some(1), format!("error: {line}")));
    };
    let newer = "PRAGMA user_version = 99";
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path();
    copy(&golden().join("data"), data);
    change(&data.join("access.db"), newer).await;
    refused(data, "access.db has format 99; this program knows 3");
    std::fs::copy(golden().join("data/access.db"), data.join("access.db")).expect("put back");
    assert!(list(data, &[]).status.success(), "moved");
    // A copy from before the move, put back into the directory after it.
    let moved = data.join("moved.db");
    std::fs::rename(data.join("polylora.db"), &moved).expect("renamed");
    std::fs::copy(&old, data.join("polylora.db")).expect("put back");
    refused(data, "polylora.db has format 2, and the access.db that belongs to it is not there");
    std::fs::rename(&moved, data.join("polylora.db")).expect("renamed");
    change(&data.join("polylora.db"), newer).await;
    refused(data, "polylora.db has format 99; this program knows 12");
}

/// A server must not take a directory for one without keys because it cannot move them.
#[tokio::test]
async fn keys_that_cannot_be_moved_are_not_forgotten() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    copy(&golden().join("data"), &data);
    for file in ["polylora.db", "jobs.db"] {
        std::fs::remove_file(data.join(file)).expect("only keys were ever made");
    }
    let disk = Disk::new(&data);
    disk.fail(Fault::Full, "", None);
    let refused = list(&data, &disk.environment());
    let line = "error: polylora.db has format 0 and cannot be brought to 12: nothing is written";
    assert_eq!((refused.status.code(), said(&refused)), (Some(1), line.to_owned()));
    let moved = list(&data, &[]);
    let keys = String::from_utf8_lossy(&moved.stdout).lines().count();
    assert_eq!(keys, 3, "{}", said(&moved));
}

#[tokio::test]
async fn everything_of_a_directory_before_is_served() {
    served(&golden()).await;
}

/// The same of one that is written now; by another program and to another place, if the variables
/// say so. That is how the old one was made, see its README.
#[tokio::test]
async fn everything_of_a_directory_written_now_is_served() {
    let own = tempfile::tempdir().expect("a directory");
    let to = std::env::var("POLYLORA_GOLDEN").map_or(own.path().to_owned(), PathBuf::from);
    write(&to).await;
    served(&to).await;
}

/// A directory with something of everything in it, and what is answered about it.
async fn write(to: &Path) {
    let flags = ["--api-key", "configured"];
    let live = Live::start(&flags);
    let send = async |method: Method, path: &str, body: Value| {
        let answer = whole(live.request(method, path).bearer_auth("configured").json(&body)).await;
        assert!((200..300).contains(&answer.status), "{path}: {}", answer.text);
        answer.json()
    };
    let make = async |body: Value| {
        let made = send(Method::POST, "/v1/keys", body).await;
        (
            made["key"]["id"].as_str().unwrap().to_owned(),
            made["secret"].as_str().unwrap().to_owned(),
        )
    };
    let scopes = json!(["admin", "inference"]);
    let (_, operator) = make(json!({"label": "ops", "scopes": scopes})).await;
    let limits = json!({"requests_per_minute": 600, "tokens_per_day": 100_000});
    let (_, acme) = make(json!({"label": "shop", "scopes": ["inference"], "tenant": "acme",
                                "adapters": ["a", "m"], "limits": limits}))
    .await;
    let (id, revoked) = make(json!({"label": "gone", "scopes": ["inference"]})).await;
    send(Method::DELETE, &format!("/v1/keys/{id}"), Value::Null).await;
    for (name, seed) in [("a", 1), ("a", 2), ("b", 3), ("gone", 4)] {
        let put = live.request(Method::PUT, &format!("/v1/adapters/{name}"));
        let put = put.bearer_auth("configured").multipart(form(&live.adapter_files(seed, 0.3)));
        assert!([200, 201].contains(&whole(put).await.status), "{name}");
    }
    send(Method::DELETE, "/v1/adapters/gone", Value::Null).await;
    send(Method::PUT, "/v1/aliases/prod", json!({"weights": {"a@1": 9, "b@1": 1}})).await;
    send(Method::PUT, "/v1/limits/a", json!({"tokens_per_minute": 90_000})).await;
    let order = json!({"name": "m", "sources": [{"model": "a"}, {"model": "b"}]});
    let merge = send(Method::POST, "/v1/merges", order).await["id"].as_str().unwrap().to_owned();
    live.until("the merge is done", async || {
        page(&live, "configured", "/v1/merges").await["data"][0]["state"] == "done"
    })
    .await;
    for (key, model) in [(&operator, "tiny"), (&operator, "prod"), (&acme, "a"), (&acme, "m")] {
        assert_eq!(chat(&live, key, model).await, 200, "{model}");
    }
    let mut pages = json!({});
    for path in PAGES {
        pages[path] = page(&live, "configured", path).await;
    }
    let report = page(&live, "configured", &format!("/v1/merges/{merge}/report")).await;
    let secrets = json!({"operator": operator, "acme": acme, "revoked": revoked});
    let text = json!({"secrets": secrets, "pages": pages, "report": report});
    let dir = live.stop();
    let _ = std::fs::remove_dir_all(to.join("data"));
    copy(&dir.path().join("data"), &to.join("data"));
    std::fs::write(to.join("expected.json"), format!("{text:#}\n")).expect("written");
}
