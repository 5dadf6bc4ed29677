//! GGUF files made in test code, from the format's description.

/// A GGUF value.
pub enum Meta {
    Text(&'static str),
    F32(f32),
    U32s(Vec<u32>),
}

/// A GGUF v3 file: metadata, then f32 tensors with dimensions fastest first, aligned to 32.
pub fn gguf(metadata: &[(&str, Meta)], tensors: &[(&str, Vec<u64>, Vec<f32>)]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let text = |out: &mut Vec<u8>, s: &str| {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    };
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Meta::Text(s) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, s);
            }
            Meta::F32(v) => {
                out.extend(6u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Meta::U32s(vs) => {
                out.extend(9u32.to_le_bytes());
                out.extend(4u32.to_le_bytes());
                out.extend((vs.len() as u64).to_le_bytes());
                vs.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
        }
    }
    let mut data = Vec::new();
    for (name, dims, values) in tensors {
        text(&mut out, name);
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(0u32.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        values.iter().for_each(|v| data.extend(v.to_le_bytes()));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

/// What every adapter file says first: alpha 4.
pub fn head(arch: &'static str) -> Vec<(&'static str, Meta)> {
    vec![
        ("general.architecture", Meta::Text(arch)),
        ("general.type", Meta::Text("adapter")),
        ("adapter.type", Meta::Text("lora")),
        ("adapter.lora.alpha", Meta::F32(4.0)),
    ]
}
