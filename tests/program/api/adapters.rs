//! Uploads in every wrapping, versions, removal, and archives that mean harm.

use polylora::shape::Projection;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use std::io::{Cursor, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use support::live::{Answer, BASE, Live, form, hello, whole};
use support::soak::{rounds, soak};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

async fn put(live: &Live, name: &str, body: Vec<u8>) -> Answer {
    let request = live.request(Method::PUT, &format!("/v1/adapters/{name}"));
    whole(request.header("content-type", "application/octet-stream").body(body)).await
}

fn read(dir: &Path, name: &str) -> Vec<u8> {
    std::fs::read(dir.join(name)).expect("a file")
}

/// A tar of entries (path, content).
fn tar(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // Written by hand: the builder itself refuses paths that lead out.
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, &content[..]).expect("an entry");
    }
    tar.into_inner().expect("a tar")
}

fn zip(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let deflated = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Deflated);
    for (path, content) in entries {
        zip.start_file(*path, deflated).expect("an entry");
        zip.write_all(content).expect("its content");
    }
    zip.finish().expect("a zip").into_inner()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).expect("compressed");
    gzip.finish().expect("a gzip")
}

#[tokio::test]
async fn every_wrapping_gives_the_same_adapter() {
    let live = Live::start(&[]);
    let dir = live.adapter_files(1, 0.3);
    let files = || vec![(CONFIG, read(&dir, CONFIG)), (WEIGHTS, read(&dir, WEIGHTS))];
    let nested = || -> Vec<(&str, Vec<u8>)> {
        vec![
            ("sql/adapter_config.json", read(&dir, CONFIG)),
            ("sql/adapter_model.safetensors", read(&dir, WEIGHTS)),
            ("sql/README.md", b"# sql".to_vec()),
            ("sql/checkpoint-5/adapter_model.safetensors", b"older".to_vec()),
        ]
    };
    let first = live.upload("sql", 1).await;
    assert_eq!(first.status, 201, "{}", first.text);
    assert_eq!(first.json()["result"], "created");
    let digest = first.json()["digest"].clone();
    let wrappings =
        [tar(&files()), zip(&files()), gzip(&tar(&files())), tar(&nested()), zip(&nested())];
    for (i, body) in wrappings.into_iter().enumerate() {
        let again = put(&live, "sql", body).await;
        assert_eq!(again.status, 200, "wrapping {i}: {}", again.text);
        let body = again.json();
        assert_eq!((&body["result"], &body["digest"]), (&"unchanged".into(), &digest), "{i}");
        let ignored = body["ignored_files"].as_array().unwrap().len();
        assert_eq!(ignored, if i < 3 { 0 } else { 2 }, "{body}");
    }
    // A part's own name says what it is, whatever the file was called on the sender's disk.
    let renamed = files().into_iter().fold(Form::new(), |form, (name, bytes)| {
        form.part(name, Part::bytes(bytes).file_name("checkpoint-500.bin"))
    });
    let request = live.request(Method::PUT, "/v1/adapters/sql");
    let renamed = whole(request.multipart(renamed)).await;
    assert_eq!(renamed.json()["result"], "unchanged", "{}", renamed.text);
    let archive = Part::bytes(zip(&files())).file_name("sql.zip");
    let request = live.request(Method::PUT, "/v1/adapters/sql");
    let wrapped = whole(request.multipart(Form::new().part("file", archive))).await;
    assert_eq!(wrapped.json()["result"], "unchanged", "{}", wrapped.text);
}

#[tokio::test]
async fn a_name_moves_to_its_new_version_and_old_ones_stay_for_who_asks() {
    let live = Live::start(&[]);
    assert_eq!(live.upload("sql", 1).await.status, 201);
    let second = live.upload("sql", 2).await;
    assert_eq!((second.status, &second.json()["result"]), (200, &"updated".into()));
    assert_eq!(second.json()["version"], 2);
    let by = async |model: &str| {
        live.chat(hello(model, 4)).await.header("x-polylora-adapter").to_owned()
    };
    assert_eq!(by("sql").await, "sql@2");
    assert_eq!(by("sql@1").await, "sql@1");
    let shown = live.get("/v1/adapters/sql").await.json();
    assert_eq!(shown["current"], 2);
    let versions = shown["versions"].as_array().unwrap();
    assert_eq!(versions.len(), 2);
    assert_eq!(versions[1]["current"], true);
    assert_eq!(versions[1]["rank_max"], 4);
    assert!(versions[1]["probe"]["logit_change_max"].as_f64().unwrap() > 0.0);
    let list = live.get("/v1/adapters").await.json();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert!(list["resident_bytes"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_deleted_name_is_gone_at_once() {
    let live = Live::start(&[]);
    live.upload("sql", 1).await;
    let gone = whole(live.request(Method::DELETE, "/v1/adapters/sql")).await;
    assert_eq!((gone.status, &gone.json()["deleted"]), (200, &true.into()));
    assert_eq!(gone.json()["versions"][0]["id"], "sql@1");
    for model in ["sql", "sql@1", "tiny:sql"] {
        assert_eq!(live.chat(hello(model, 1)).await.error(), "404 model_not_found model");
    }
    let again = whole(live.request(Method::DELETE, "/v1/adapters/sql")).await;
    assert_eq!(again.error(), "404 adapter_not_found name");
    assert_eq!(live.get("/v1/adapters/sql").await.error(), "404 adapter_not_found name");
}

#[tokio::test]
async fn an_adapter_without_effect_is_kept_and_not_served_unless_forced() {
    let live = Live::start(&[]);
    let dir = live.adapter_files(1, 0.0);
    let request = live.request(Method::PUT, "/v1/adapters/idle").multipart(form(&dir));
    let put = whole(request).await;
    assert_eq!((put.status, &put.json()["state"]), (201, &"ineffective".into()), "{}", put.text);
    assert_eq!(put.json()["probe"]["logit_change_max"], 0.0);
    let refused = live.chat(hello("idle", 1)).await.error();
    assert!(refused.contains("adapter_ineffective"), "{refused}");
    let models = live.get("/v1/models").await.json();
    assert_eq!(models["data"].as_array().unwrap().len(), 1, "not listed as a model");
    let request = live.request(Method::PUT, "/v1/adapters/idle?force=true").multipart(form(&dir));
    let forced = whole(request).await;
    assert_eq!(forced.json()["state"], "ready", "{}", forced.text);
    assert_eq!(live.chat(hello("idle", 1)).await.status, 200);
}

/// Each upload is refused as said, and nothing of it stays.
async fn check(live: &Live, cases: Vec<(&str, Vec<u8>, &str)>) {
    for (what, body, expected) in cases {
        let answer = put(live, "bad", body).await;
        assert!(answer.error().starts_with(expected), "{what}: {}", answer.text);
    }
    assert_eq!(live.get("/v1/adapters").await.json()["data"], serde_json::json!([]));
}

#[tokio::test]
async fn uploads_that_are_not_an_adapter_are_refused_by_what_is_wrong() {
    let live = Live::start(&[]);
    let dir = live.adapter_files(1, 0.3);
    let config = || (CONFIG, read(&dir, CONFIG));
    let pickle = ("adapter_model.bin", vec![0x80]);
    let cut_tar = tar(&[config()])[..600].to_vec();
    let cut_zip = zip(&[config()])[..60].to_vec();
    let cases = vec![
        ("config alone", tar(&[config()]), "422 missing_file"),
        ("weights alone", zip(&[(WEIGHTS, read(&dir, WEIGHTS))]), "422 missing_file"),
        ("a pickle", tar(&[config(), pickle]), "422 pickle_not_allowed"),
        ("noise", b"hello".to_vec(), "400 invalid_archive"),
        ("nothing", Vec::new(), "400 invalid_archive"),
        ("a cut tar", cut_tar, "400 invalid_archive"),
        ("a cut zip", cut_zip, "400 invalid_archive"),
        ("twice", tar(&[config(), config()]), "400 duplicate_file"),
    ];
    check(&live, cases).await;
    let json = live.request(Method::PUT, "/v1/adapters/bad").json(&1);
    let json = whole(json).await;
    assert_eq!(json.error(), "415 unsupported_media_type -");
    assert!(json.text.contains("Content-Type: application/octet-stream"), "{}", json.text);
    let query = live.request(Method::PUT, "/v1/adapters/bad?force=maybe");
    let query = whole(query.multipart(form(&dir))).await;
    assert_eq!(query.error(), "400 invalid_value force");
}

#[tokio::test]
async fn archives_that_mean_harm_are_refused_and_counted() {
    let live = Live::start(&["--upload-bytes-max", "1MiB"]);
    let dir = live.adapter_files(1, 0.3);
    let (config, weights) = (read(&dir, CONFIG), read(&dir, WEIGHTS));
    let zeros = vec![0u8; 8 << 20];
    let at = |path: &'static str| (path, config.clone());
    let two = [at("a/adapter_config.json"), ("b/adapter_model.safetensors", weights)];
    let bomb = zip(&[at(CONFIG), (WEIGHTS, zeros.clone())]);
    let outside = "400 archive_path_not_allowed";
    let cases = vec![
        ("out of a tar", tar(&[at("../adapter_config.json")]), outside),
        ("from the root", tar(&[at("/adapter_config.json")]), outside),
        ("out of a zip", zip(&[at("a/../../adapter_config.json")]), outside),
        ("two directories", tar(&two), "400 ambiguous_upload"),
        ("a zip bomb", bomb, "413 upload_too_large"),
        ("a gzip bomb", gzip(&tar(&[(WEIGHTS, zeros)])), "413 upload_too_large"),
        ("too large", vec![0; 2 << 20], "413 upload_too_large"),
    ];
    check(&live, cases).await;
    let refused = "polylora_adapters_refused_total{code=\"upload_too_large\"}";
    assert_eq!(live.metric(refused).await, 3.0);
}

#[tokio::test]
async fn links_in_archives_are_refused() {
    let live = Live::start(&[]);
    let mut link = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    link.append_link(&mut header, CONFIG, "/etc/passwd").expect("a link");
    let answer = put(&live, "bad", link.into_inner().unwrap()).await;
    assert_eq!(answer.error(), "400 archive_link_not_allowed -");
    let mut link = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    link.add_symlink(CONFIG, "/etc/passwd", options).expect("a link");
    let answer = put(&live, "bad", link.finish().unwrap().into_inner()).await;
    assert_eq!(answer.error(), "400 archive_link_not_allowed -");
}

#[tokio::test]
async fn names_that_mean_something_else_are_refused() {
    let live = Live::start(&[]);
    let long = "a".repeat(129);
    for name in [BASE, "base", "a%2Fb", "..%2Fx", "a:b", "a@1", "%20", "s%C3%A4l", &long] {
        let answer = live.upload(name, 1).await;
        assert_eq!(answer.error(), "400 invalid_name name", "{name}");
    }
}

#[tokio::test]
async fn the_smallest_steps_still_probe_an_upload() {
    let live = Live::start(&["--sequences-max", "1", "--rows-max", "1"]);
    assert_eq!(live.upload("small", 1).await.status, 201);
    assert_eq!(live.chat(hello("small", 3)).await.status, 200);
}

/// The middle one of the times of some uploads.
fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}

/// In a soak 5,000 of them: the metrics page under 1 MB, the list under 100 ms, and the 1,000th
/// upload (rank 16) takes at most 1.2 times what the 10th did; medians of their neighbourhoods.
#[tokio::test]
async fn thousands_of_adapters_fit_the_pages() {
    let live = Live::start(&["--adapter-bytes-max", "4GiB", "--resident-max", "8192"]);
    let names: Vec<String> = (0..rounds(60, 5_000)).map(|i| format!("customer-{i:05}")).collect();
    let mut puts = Vec::new();
    let targets = [Projection::Q, Projection::Down];
    for (seed, name) in names.iter().enumerate() {
        let dir = live.adapter_of(16, &targets, seed as u64, 0.3);
        let uploaded = live.request(Method::PUT, &format!("/v1/adapters/{name}"));
        let upload = uploaded.multipart(form(&dir));
        let begun = Instant::now();
        assert_eq!(whole(upload).await.status, 201, "{name}");
        puts.push(begun.elapsed());
        std::fs::remove_dir_all(dir).unwrap();
    }
    let around = |n: usize| puts.get(n - 5..n + 6).map(median);
    for n in [10, 50, 100, 500, 1000, 2000, 4990] {
        if let Some(time) = around(n) {
            eprintln!("upload {n}: {time:?}");
        }
    }
    for name in names.iter().take(200) {
        assert_eq!(live.chat(hello(name, 2)).await.status, 200);
    }
    let page = live.get("/metrics").await.text;
    let loaded = page.matches("vllm:lora_adapter_loaded{").count();
    assert_eq!(loaded, names.len(), "all are resident");
    let mut times = Vec::new();
    for _ in 0..10 {
        let begun = Instant::now();
        let list = live.get("/v1/adapters").await;
        times.push(begun.elapsed());
        assert_eq!(list.json()["data"].as_array().map(Vec::len), Some(names.len()));
    }
    times.sort();
    eprintln!("{} adapters: /metrics {} bytes, list {times:?}", names.len(), page.len());
    assert!(page.len() < 1_000_000, "{} bytes", page.len());
    if soak() {
        assert!(times[5] < Duration::from_millis(100), "{times:?}");
        let (early, late) = (around(10).expect("a time"), around(1000).expect("a time"));
        assert!(late.as_secs_f64() <= 1.2 * early.as_secs_f64(), "{early:?}, then {late:?}");
    }
}
