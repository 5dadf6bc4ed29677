//! Archives that mean harm: paths, links, devices, bombs, lies and damage.

use crate::hostile::adapters::{Kind, Sent};
use crate::hostile::spoilt::{Spoilt, pick};
use std::io::{Cursor, Write};
use support::adapters::Noise;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const INVALID: &[&str] = &["invalid_archive"];
const OUTSIDE: &[&str] = &["archive_path_not_allowed"];
const LINK: &[&str] = &["archive_link_not_allowed"];
const LARGE: &[&str] = &["upload_too_large"];
/// A cut archive may still give whole files, or none.
const CUT: &[&str] = &["invalid_archive", "missing_file", "invalid_safetensors"];

fn body(bytes: Vec<u8>) -> Sent {
    Sent::Body("application/octet-stream", bytes)
}

/// One tar entry with nothing checked.
fn entry(path: &[u8], kind: u8, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let raw = header.as_mut_bytes();
    let length = path.len().min(100);
    raw[..length].copy_from_slice(&path[..length]);
    raw[156] = kind;
    if kind == b'1' || kind == b'2' {
        raw[157..168].copy_from_slice(b"/etc/passwd");
    }
    header.set_cksum();
    let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
    [&header.as_bytes()[..], content, &padding].concat()
}

fn tar_of(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = entries.concat();
    tar.extend([0; 1024]);
    tar
}

fn good_tar(noise: &mut Noise) -> Vec<u8> {
    let parts = Spoilt::new(noise).parts();
    let entries: Vec<_> = parts.iter().map(|(n, c)| entry(n.as_bytes(), b'0', c)).collect();
    tar_of(&entries)
}

fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (path, content) in entries {
        zip.start_file(*path, options).expect("an entry");
        zip.write_all(content).expect("its content");
    }
    zip.finish().expect("a zip").into_inner()
}

fn good_zip(noise: &mut Noise) -> Vec<u8> {
    let parts = Spoilt::new(noise).parts();
    let entries: Vec<_> = parts.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect();
    zip_of(&entries)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).expect("compressed");
    gzip.finish().expect("a gzip")
}

/// A PAX record: its own length in decimal, a space, `key=value`, a newline.
fn pax(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while length.to_string().len() + rest.len() != length {
        length = length.to_string().len() + rest.len();
    }
    format!("{length}{rest}").into_bytes()
}

pub const KINDS: &[Kind] = &[
    ("a tar whose paths lead out", |n| {
        let paths = [
            "../adapter_config.json",
            "/adapter_config.json",
            "a/../../adapter_config.json",
            "a\\..\\adapter_config.json",
            "C:\\adapter_config.json",
            "/dev/shm/adapter_model.safetensors",
        ];
        (body(tar_of(&[entry(pick(n, &paths).as_bytes(), b'0', b"{}")])), OUTSIDE)
    }),
    ("a tar whose long names lead out", |n| {
        let path = format!("{}../adapter_config.json", "a/".repeat(n.below(60)));
        let path = format!("../{path}");
        let (kind, record) = match n.below(2) {
            0 => (b'x', pax("path", &path)),
            _ => (b'L', [path.as_bytes(), b"\0"].concat()),
        };
        let entries = [entry(b"long", kind, &record), entry(b"a", b'0', b"{}")];
        (body(tar_of(&entries)), OUTSIDE)
    }),
    ("a tar of links and devices", |n| {
        let kind = *pick(n, b"123467SVMN?");
        let name = *pick(n, &[CONFIG, TENSORS, "x"]);
        let codes: &[&str] = match kind {
            // A contiguous file is a file.
            b'7' => &["archive_link_not_allowed", "invalid_adapter_config", "missing_file"],
            _ => &["archive_link_not_allowed", "invalid_archive"],
        };
        (body(tar_of(&[entry(name.as_bytes(), kind, b"")])), codes)
    }),
    ("a tar of too many entries", |n| {
        let kind = if n.below(2) == 0 { b'0' } else { b'5' };
        let entries: Vec<_> = (0..1001 + n.below(50)).map(|_| entry(b"x", kind, b"")).collect();
        (body(tar_of(&entries)), INVALID)
    }),
    ("a tar with a name of megabytes", |n| {
        let name = vec![b'a'; (64 << 10) + 1 + n.below(100_000)];
        let kind = *pick(n, b"LKxg");
        let entries = [entry(b"long", kind, &name), entry(b"a", b'0', b"{}")];
        (body(tar_of(&entries)), INVALID)
    }),
    ("a tar whose sizes lie", |n| {
        let mut tar = good_tar(n);
        let sizes: [&[u8]; 5] =
            [b"77777777777\0", b"00000000000\0", b"99999999999\0", b"-1         \0", &[0xff; 12]];
        let size = *pick(n, &sizes);
        tar[124..136].copy_from_slice(size);
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes().copy_from_slice(&tar[..512]);
        header.set_cksum();
        tar[..512].copy_from_slice(header.as_bytes());
        let codes: &[&str] =
            &["invalid_archive", "invalid_adapter_config", "missing_file", "upload_too_large"];
        (body(tar), codes)
    }),
    ("a tar cut short", |n| {
        let tar = good_tar(n);
        let end = tar.len() - 1024;
        let cut = if n.below(2) == 0 { 512 * n.below(end / 512) } else { n.below(end) };
        (body(tar[..cut].to_vec()), CUT)
    }),
    ("a tar with a checksum that is wrong", |n| {
        let mut tar = good_tar(n);
        tar[n.below(100)] ^= 0x55;
        (body(tar), &["invalid_archive", "missing_file"])
    }),
    ("files twice, or in two places", |n| {
        let twice =
            tar_of(&[entry(CONFIG.as_bytes(), b'0', b"{}"), entry(CONFIG.as_bytes(), b'0', b"{}")]);
        let places =
            zip_of(&[("a/adapter_config.json", b"{}"), ("b/adapter_model.safetensors", b"")]);
        let bytes = if n.below(2) == 0 { twice } else { places };
        (body(bytes), &["duplicate_file", "ambiguous_upload"])
    }),
    ("a zip whose paths lead out", |n| {
        let paths = ["../adapter_config.json", "/adapter_config.json", "a/../../x", "a\\x"];
        (body(zip_of(&[(*pick(n, &paths), b"{}")])), OUTSIDE)
    }),
    ("a zip with a link", |n| {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default();
        let target = *pick(n, &["/etc/passwd", "../../polylora.db", "adapter_config.json"]);
        zip.add_symlink(*pick(n, &[CONFIG, TENSORS]), target, options).expect("a link");
        (body(zip.finish().expect("a zip").into_inner()), LINK)
    }),
    ("a zip that is small and large", |n| {
        let zeros = vec![0; (1 << 20) + n.below(16 << 20)];
        (body(zip_of(&[(TENSORS, &zeros)])), LARGE)
    }),
    ("a zip of many files", |n| {
        let names: Vec<String> = (0..1001 + n.below(100)).map(|i| i.to_string()).collect();
        let entries: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
        (body(zip_of(&entries)), INVALID)
    }),
    ("a zip damaged", |n| {
        let mut zip = good_zip(n);
        match n.below(3) {
            0 => zip.truncate(2 + n.below(zip.len() - 2)),
            // Counts and offsets at the end.
            1 => {
                let end = zip.len() - 22;
                zip[end + 8 + n.below(12)] ^= 1 << n.below(8);
            }
            _ => {
                for _ in 0..8 {
                    let at = 2 + n.below(zip.len() - 2);
                    zip[at] ^= 1 << n.below(8);
                }
            }
        }
        (body(zip), &[])
    }),
    ("a zip in a zip, or a gzip in a gzip", |n| {
        let bytes = match n.below(2) {
            0 => zip_of(&[("adapter.zip", &good_zip(n))]),
            _ => gzip(&gzip(&good_tar(n))),
        };
        (body(bytes), &["missing_file", "invalid_archive"])
    }),
    ("a gzip that is small and large", |n| {
        let zeros = vec![0; (1 << 20) + n.below(16 << 20)];
        let tar = tar_of(&[entry(TENSORS.as_bytes(), b'0', &zeros)]);
        (body(gzip(&tar)), LARGE)
    }),
    ("a gzip damaged", |n| {
        let mut gzip = gzip(&good_tar(n));
        if n.below(2) == 0 {
            gzip.truncate(2 + n.below(gzip.len() - 2));
        } else {
            let at = 2 + n.below(gzip.len() - 2);
            gzip[at] ^= 1 << n.below(8);
        }
        (body(gzip), &[])
    }),
    ("what is no archive", |n| {
        let mut bytes = vec![0; n.below(3000)];
        bytes.iter_mut().for_each(|b| *b = n.below(256) as u8);
        (body(bytes), INVALID)
    }),
];
