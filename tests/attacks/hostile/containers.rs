//! Spoilt wrappings that are no archives: GGUF files, multipart bodies, pickles and names.

use crate::hostile::adapters::{Kind, Sent};
use crate::hostile::server::shape;
use crate::hostile::spoilt::{Spoilt, pick};
use polylora::shape::{Projection, Site};
use support::adapters::Noise;
use support::gguf::{Meta, gguf, head};

const GGUF: &[&str] = &["invalid_gguf"];

fn file(bytes: Vec<u8>) -> Sent {
    Sent::Parts(vec![("adapter.gguf".into(), bytes)])
}

/// The two tensors of one module of layer 0.
fn pair(noise: &mut Noise) -> [(&'static str, Vec<u64>, Vec<f32>); 2] {
    let (inputs, outputs) = shape().site_dims(Site::Layer(0, Projection::V));
    let a = noise.floats(2 * inputs, 0.3);
    let b = noise.floats(2 * outputs, 0.3);
    [
        ("blk.0.attn_v.weight.lora_a", vec![inputs as u64, 2], a),
        ("blk.0.attn_v.weight.lora_b", vec![2, outputs as u64], b),
    ]
}

fn good(noise: &mut Noise) -> Vec<u8> {
    gguf(&head("llama"), &pair(noise))
}

/// A multipart body with nothing checked.
fn multipart(noise: &mut Noise, text: &str) -> (Sent, &'static [&'static str]) {
    let kinds = [
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=y",
        "Multipart/Form-Data;boundary=\"x",
    ];
    let codes: &[&str] = &["incomplete_body", "missing_file", "upload_too_large", "duplicate_file"];
    let kind = *pick(noise, &kinds);
    (Sent::Body(kind, text.as_bytes().to_vec()), codes)
}

pub const KINDS: &[Kind] = &[
    ("a GGUF file cut short", |n| {
        let bytes = good(n);
        let cut = if n.below(4) == 0 { 4 + n.below(28) } else { 4 + n.below(bytes.len() - 68) };
        (file(bytes[..cut].to_vec()), GGUF)
    }),
    ("a GGUF file whose counts lie", |n| {
        let mut bytes = good(n);
        // version, tensors, keys, length of the first key
        let at = *pick(n, &[4, 8, 16, 24]);
        let lies = [u64::MAX, 1 << 63, 1 << 32, 1 << 20, 0xffff_ff07];
        let width = if at == 4 { 4 } else { 8 };
        bytes[at..at + width].copy_from_slice(&pick(n, &lies).to_le_bytes()[..width]);
        (file(bytes), GGUF)
    }),
    ("a GGUF file for something else", |n| {
        let mut meta = head("llama");
        let (codes, at): (&[&str], _) = match n.below(5) {
            0 => (&["architecture_mismatch"], Some((0, Meta::Text("qwen2")))),
            1 => (&["invalid_gguf"], Some((1, Meta::Text("model")))),
            2 => (&["invalid_gguf"], Some((2, Meta::Text("control_vector")))),
            3 => (&["invalid_gguf"], Some((3, Meta::F32(f32::NAN)))),
            _ => (&["unsupported_config_field"], None),
        };
        match at {
            Some((i, value)) => meta[i].1 = value,
            None => meta.push(("adapter.alora.invocation_tokens", Meta::U32s(vec![1]))),
        }
        (file(gguf(&meta, &pair(n))), codes)
    }),
    ("GGUF tensors that do not fit", |n| {
        let mut tensors = pair(n).to_vec();
        let codes: &[&str] = match n.below(7) {
            0 => {
                tensors[0].1.reverse();
                &["shape_mismatch"]
            }
            1 => {
                tensors[1].0 = "blk.0.attn_v.weight.lora_c";
                &["unknown_tensor"]
            }
            2 => {
                tensors[0].0 = "blk.99.attn_v.weight.lora_a";
                &["layer_out_of_range"]
            }
            3 => {
                tensors.push(tensors[0].clone());
                &["duplicate_tensor"]
            }
            4 => {
                tensors.remove(n.below(2));
                &["missing_factor"]
            }
            5 => {
                tensors.clear();
                &["empty_adapter"]
            }
            _ => {
                let at = n.below(tensors[0].2.len());
                tensors[0].2[at] = f32::NAN;
                &["non_finite_values"]
            }
        };
        (file(gguf(&head("llama"), &tensors)), codes)
    }),
    ("a GGUF file damaged", |n| {
        let mut bytes = good(n);
        for _ in 0..1 + n.below(6) {
            let at = 4 + n.below(bytes.len() - 4);
            bytes[at] ^= 1 << n.below(8);
        }
        (file(bytes), &[])
    }),
    ("both formats at once", |n| {
        let mut parts = Spoilt::new(n).parts();
        parts.push(("adapter.gguf".into(), good(n)));
        if n.below(2) == 0 {
            parts.remove(0);
        }
        (Sent::Parts(parts), &["ambiguous_adapter"])
    }),
    ("a pickle", |n| {
        let mut parts = Spoilt::new(n).parts();
        parts[1].0 = (*pick(n, &["adapter_model.bin", "x.pt", "model.pth", "m.ckpt"])).into();
        parts[1].1 = b"\x80\x02cposix\nsystem\n".to_vec();
        (Sent::Parts(parts), &["pickle_not_allowed"])
    }),
    ("half of the files, or none that count", |n| {
        let mut parts = Spoilt::new(n).parts();
        match n.below(3) {
            0 => parts.truncate(1),
            1 => drop(parts.remove(0)),
            _ => parts.iter_mut().for_each(|p| p.0.insert(0, 'x')),
        }
        (Sent::Parts(parts), &["missing_file"])
    }),
    ("names that are paths in multipart", |n| {
        let mut parts = Spoilt::new(n).parts();
        let names = ["../../polylora.db", "/etc/cron.d/x", "..", "a\0b", "adapter_config.json/.."];
        parts[1].0 = (*pick(n, &names)).into();
        (Sent::Parts(parts), &["missing_file", "incomplete_body"])
    }),
    ("multipart that breaks off", |n| {
        let head = "Content-Disposition: form-data; name=\"f\"; filename=\"adapter_config.json\"";
        let large = "y".repeat(2 << 20);
        let texts = [
            "--x".to_owned(),
            "--x\r\n".to_owned(),
            format!("--x\r\n{head}"),
            format!("--x\r\n{head}\r\n\r\n{{}}"),
            format!("--x\r\n{head}\r\n\r\n{large}"),
            format!("--x\r\n{}: a\r\n\r\n", "h".repeat(100_000)),
            format!("--x\r\n{head}\r\n\r\n{{}}\r\n--x--"),
            "\0\0\0\0".to_owned(),
            String::new(),
        ];
        let text = pick(n, &texts).clone();
        multipart(n, &text)
    }),
    ("a body of the wrong kind", |n| {
        let kinds = ["application/json", "text/plain", "application/x-www-form-urlencoded"];
        let kind = *pick(n, &kinds);
        (Sent::Body(kind, b"{}".to_vec()), &["unsupported_media_type"])
    }),
    ("a name that is none", |n| {
        let long = "a".repeat(129 + n.below(2000));
        let names = [
            "tiny",
            "base",
            "..%2F..%2Fetc",
            "%2e%2e%2fx",
            "a%00b",
            "a%0d%0ab",
            "s%C3%A4l",
            "a:b",
            "a@1",
            "-a",
            ".a",
            "_a",
            "%20",
            "%F0%9F%9A%B2",
            "BASE",
            "None",
            "a%252fb",
            "a%5Cb",
            &long,
            "%FF%FE",
        ];
        (Sent::Path((*pick(n, &names)).to_owned()), &["invalid_name", "unknown_route"])
    }),
];
