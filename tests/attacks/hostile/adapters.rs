//! Malformed adapters: each number gives one, and what it must be refused as.
//!
//! Owns the table of kinds. Never sends anything. `containers` has the kinds that lie in the
//! wrapping, `bundles` those beside the factors.

use crate::hostile::server::shape;
use crate::hostile::spoilt::{Spoilt, pick};
use crate::hostile::{archives, bundles, containers};
use serde_json::{Value, json};
use support::adapters::Noise;

/// An upload.
pub struct Case {
    pub what: String,
    pub sent: Sent,
    /// The codes it may be refused with; empty: any documented one, or it may be taken.
    pub codes: &'static [&'static str],
}

pub enum Sent {
    /// Multipart, (file name, content)
    Parts(Vec<(String, Vec<u8>)>),
    /// (content type, body)
    Body(&'static str, Vec<u8>),
    /// A good body to this name in the path.
    Path(String),
}

pub type Kind = (&'static str, fn(&mut Noise) -> (Sent, &'static [&'static str]));

pub fn case(i: usize) -> Case {
    let tables = [KINDS, archives::KINDS, containers::KINDS, bundles::KINDS];
    let kinds: Vec<&Kind> = tables.into_iter().flatten().collect();
    let (what, make) = kinds[i % kinds.len()];
    let (sent, codes) = make(&mut Noise(0xbad + i as u64));
    Case { what: (*what).to_owned(), sent, codes }
}

const FILE: &[&str] = &["invalid_safetensors"];
const CONFIG: &[&str] = &["invalid_adapter_config"];

/// PEFT's other methods.
const TYPES: [&str; 38] = [
    "ADALORA",
    "ADAMSS",
    "ADAPTION_PROMPT",
    "ARROW",
    "BOFT",
    "BONE",
    "C3A",
    "CARTRIDGE",
    "CPT",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LILY",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "MULTITASK_PROMPT_TUNING",
    "OFT",
    "OSF",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "PSOFT",
    "PVERA",
    "P_TUNING",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
];

/// (field, value, code)
fn refused_field(noise: &mut Noise) -> (&'static str, Value, &'static [&'static str]) {
    const SET: &[&str] = &["unsupported_config_field"];
    const RANK: &[&str] = &["rank_out_of_range"];
    const BASE: &[&str] = &["base_weights_changed"];
    let fields = [
        ("target_parameters", json!(["experts"]), SET),
        ("trainable_token_indices", json!({"embed_tokens": [1]}), SET),
        ("layer_replication", json!([[0, 1]]), SET),
        ("alora_invocation_tokens", json!([1]), SET),
        ("use_qalora", json!(true), SET),
        ("use_bdlora", json!(true), SET),
        ("kasa_config", json!({"a": 1}), SET),
        ("velora_config", json!({"a": 1}), SET),
        ("loftq_config", json!({"bits": 4}), SET),
        ("fan_in_fan_out", json!(true), SET),
        ("from_next_year", json!("x"), SET),
        ("init_lora_weights", json!("pissa"), BASE),
        ("init_lora_weights", json!("olora"), BASE),
        ("init_lora_weights", json!({"a": []}), BASE),
        ("r", json!(0), RANK),
        ("r", json!(-1), RANK),
        ("r", json!(513), RANK),
        ("r", json!(1e30), RANK),
        ("r", json!(u64::MAX), RANK),
        ("r", json!("2"), RANK),
        ("rank_pattern", json!({"q_proj": 0}), RANK),
        ("rank_pattern", json!([1]), CONFIG),
        ("rank_pattern", json!({"(": 2}), CONFIG),
        ("alpha_pattern", json!({"(a+)+$": "x"}), CONFIG),
        ("lora_alpha", json!("4"), CONFIG),
        ("lora_alpha", json!(1e300), CONFIG),
        ("bias", json!("some"), CONFIG),
        ("use_dora", json!("yes"), CONFIG),
        ("target_modules", json!([]), CONFIG),
        ("target_modules", json!([1]), CONFIG),
        ("target_modules", json!("["), CONFIG),
        ("target_modules", json!("x".repeat(5000)), CONFIG),
        ("target_modules", json!(["q_proj", "down_proj", "w"]), &["target_not_found"]),
        ("target_modules", json!("nothing"), &["unknown_tensor"]),
        ("layers_to_transform", json!("all"), CONFIG),
        ("layers_to_transform", json!([-1]), CONFIG),
        ("modules_to_save", json!(["lm_head"]), &["unsupported_modules_to_save"]),
        ("modules_to_save", json!(["../norm"]), &["unsupported_modules_to_save"]),
        ("use_dora", json!(true), &["missing_factor"]),
        ("lora_bias", json!(true), &["missing_factor"]),
        ("peft_type", json!(["LORA"]), CONFIG),
        ("peft_type", json!("lora"), &["unsupported_peft_type"]),
    ];
    pick(noise, &fields).clone()
}

/// Spoilt contents of good wrappings.
const KINDS: &[Kind] = &[
    ("tensors cut short", |n| {
        let good = Spoilt::new(n);
        let file = good.safetensors();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
        let ends = good.entries.iter().map(|e| header + e.end as usize);
        let mut cuts: Vec<usize> = ends.filter(|&e| e < file.len()).collect();
        cuts.extend([0, 1, 7, 8, 9, header - 1, header, header + 1, file.len() - 1]);
        cuts.push(n.below(file.len()));
        let cut = *pick(n, &cuts);
        (good.with_tensors(file[..cut].to_vec()), FILE)
    }),
    ("config cut short", |n| {
        let good = Spoilt::new(n);
        let text = good.config.to_string();
        let cut = n.below(text.len());
        (good.with_config(&text.as_bytes()[..cut]), CONFIG)
    }),
    ("a header length that lies", |n| {
        let mut bad = Spoilt::new(n);
        let true_length = u64::from_le_bytes(bad.safetensors()[..8].try_into().expect("8 bytes"));
        let lies =
            [0, 1, true_length - 1, true_length + 1, 1 << 24, 1 << 40, u64::MAX, u64::MAX - 7];
        bad.header_length = Some(*pick(n, &lies));
        (bad.sent(), FILE)
    }),
    ("a value that is not finite", |n| {
        let mut bad = Spoilt::new(n);
        let at = n.below(bad.data.len() / 4) * 4;
        let value = *pick(n, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN]);
        bad.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
        (bad.sent(), &["non_finite_values"])
    }),
    ("a shape beyond reason", |n| {
        let mut bad = Spoilt::new(n);
        let shapes: [&[u64]; 6] = [
            &[u64::MAX, 2],
            &[1 << 62, 4],
            &[1 << 32, 1 << 32],
            &[1, 1, 1, 1, 1, 1, 1, 1, 1],
            &[1 << 40],
            &[],
        ];
        bad.any(n).shape = pick(n, &shapes).to_vec();
        (bad.sent(), FILE)
    }),
    ("offsets that lie", |n| {
        let mut bad = Spoilt::new(n);
        let lie = n.below(6);
        let other = bad.entries[n.below(2)].begin;
        let e = bad.any(n);
        let length = e.end - e.begin;
        match lie {
            0 => (e.begin, e.end) = (e.begin + 1, e.end + 1),
            1 => (e.begin, e.end) = (e.end, e.begin),
            2 => (e.begin, e.end) = (u64::MAX - length, u64::MAX),
            3 => (e.begin, e.end) = (other + 4, other + 4 + length),
            4 => e.end += 4,
            _ => (e.begin, e.end) = (1 << 40, (1 << 40) + length),
        }
        (bad.sent(), FILE)
    }),
    ("data that belongs to nobody", |n| {
        let mut bad = Spoilt::new(n);
        bad.data.extend(vec![0; 1 + n.below(64)]);
        (bad.sent(), FILE)
    }),
    ("a name twice", |n| {
        let mut bad = Spoilt::new(n);
        let (from, to) = (n.below(4), 4 + n.below(4));
        bad.entries[to].name = bad.entries[from].name.clone();
        (bad.sent(), &["duplicate_tensor"])
    }),
    ("two names for one module", |n| {
        let mut bad = Spoilt::new(n);
        let first = bad.entries[0].clone();
        let name = first.name.replace("base_model.model.model.", "base_model.model.");
        let values = vec![0.5; (first.shape[0] * first.shape[1]) as usize];
        bad.push(&name, &[first.shape[0] as usize, first.shape[1] as usize], &values);
        (bad.sent(), &["duplicate_tensor"])
    }),
    ("a dtype that is not served", |n| {
        let mut bad = Spoilt::new(n);
        let types = ["F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "f32", "", "F32\u{0}", "🚲"];
        bad.any(n).dtype = (*pick(n, &types)).to_owned();
        (bad.sent(), &["unsupported_dtype"])
    }),
    ("a dtype of another size", |n| {
        let mut bad = Spoilt::new(n);
        bad.any(n).dtype = (*pick(n, &["F16", "BF16"])).to_owned();
        (bad.sent(), FILE)
    }),
    ("a header that is no map of tensors", |n| {
        let mut bad = Spoilt::new(n);
        let deep = format!("{{\"a\":{}", "[".repeat(200_000));
        let headers = [
            "[]",
            "null",
            "{",
            "{\"x\":1}",
            "{\"x\":{}}",
            "{\"x\":{\"dtype\":\"F32\"}}",
            "{}{}",
            &deep,
            "{\"x\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
            "{\"x\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}",
            "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"more\":1}}",
            "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}",
            "{\"x\":{\"dtype\":\"F32\",\"shape\":[1e400],\"data_offsets\":[0,4]}}",
        ];
        bad.header = Some((*pick(n, &headers)).to_owned());
        (bad.sent(), FILE)
    }),
    ("a header that is not UTF-8", |n| {
        let good = Spoilt::new(n);
        let mut file = good.safetensors();
        file[8 + 3 + n.below(20)] = 0xff;
        (good.with_tensors(file), FILE)
    }),
    ("a PEFT type that is not LoRA", |n| {
        let mut bad = Spoilt::new(n);
        bad.config["peft_type"] = (*pick(n, &TYPES)).into();
        (bad.sent(), &["unsupported_peft_type"])
    }),
    ("a field that is not served", |n| {
        let mut bad = Spoilt::new(n);
        let (field, value, codes) = refused_field(n);
        bad.config[field] = value;
        (bad.sent(), codes)
    }),
    ("a field twice", |n| {
        let bad = Spoilt::new(n);
        let text = bad.config.to_string();
        let twice = [
            "{\"r\":4,",
            "{\"peft_type\":\"VERA\",",
            "{\"rank_pattern\":{\"q\":1,\"q\":2},",
            "{\"target_modules\":\"all-linear\",",
        ];
        let first = *pick(n, &twice);
        let text = text.replacen('{', first, 1);
        (bad.with_config(text), CONFIG)
    }),
    ("a config that is no object", |n| {
        let deep = "[".repeat(100_000);
        let nested = format!("{{\"peft_type\":\"LORA\",\"eva_config\":{}1", "{\"a\":".repeat(300));
        let texts: [&[u8]; 10] = [
            b"",
            b"null",
            b"[]",
            b"\"LORA\"",
            b"{}",
            &[0xff, 0xfe, b'{', 0, b'}', 0],
            b"\xef\xbb\xbf{\"peft_type\":\"LORA\"}",
            b"{\"a\":\"\xff\"}",
            deep.as_bytes(),
            nested.as_bytes(),
        ];
        let text = pick(n, &texts).to_vec();
        (Spoilt::new(n).with_config(text), CONFIG)
    }),
    ("a config that is too large", |n| {
        let mut bad = Spoilt::new(n);
        let filler: String = "x".repeat(100 + n.below(1000));
        bad.config["x"] = vec![filler; 9000].into();
        (bad.sent(), &["unsupported_config_field", "upload_too_large"])
    }),
    ("names of no module", |n| {
        let mut bad = Spoilt::new(n);
        let tricks = [
            "base_model.model.model.layers.0.self_attn.ｑ_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj\u{200b}.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q\u{0308}_proj.lora_A.weight",
            "\u{202e}thgiew.A_arol.jorp_q",
            "../../../etc/passwd.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\u{0}",
            "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.+0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.18446744073709551616.mlp.down_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.experts.lora_A.weight",
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
            "",
            ".",
            "lora_A.weight",
            ".lora_A.weight",
            "🚲",
        ];
        let long = "a.".repeat(40_000);
        bad.any(n).name = if n.below(9) == 0 { long } else { (*pick(n, &tricks)).to_owned() };
        (bad.sent(), &["unknown_tensor", "missing_factor", "duplicate_tensor"])
    }),
    ("a layer that the model lacks", |n| {
        let mut bad = Spoilt::new(n);
        let layer = pick(n, &["9", "4096", "18446744073709551615"]);
        let e = bad.any(n);
        let (head, tail) = e.name.split_once("layers.").expect("a layer");
        let (_, tail) = tail.split_once('.').expect("a module");
        e.name = format!("{head}layers.{layer}.{tail}");
        (bad.sent(), &["layer_out_of_range"])
    }),
    ("half a pair", |n| {
        let mut bad = Spoilt::new(n);
        let gone = n.below(bad.entries.len());
        let e = bad.entries.remove(gone);
        let length = e.end - e.begin;
        bad.data.drain(e.begin as usize..e.end as usize);
        for other in bad.entries.iter_mut().filter(|o| o.begin >= e.end) {
            (other.begin, other.end) = (other.begin - length, other.end - length);
        }
        (bad.sent(), &["missing_factor"])
    }),
    ("a shape turned or of another rank", |n| {
        let mut bad = Spoilt::new(n);
        if n.below(3) == 0 {
            bad.config["r"] = json!(3 + n.below(500));
        } else {
            let e = bad.any(n);
            match n.below(3) {
                0 => e.shape.reverse(),
                1 => e.shape.push(1),
                _ => e.shape = vec![e.shape.iter().product()],
            }
        }
        (bad.sent(), &["shape_mismatch"])
    }),
    ("a weight of the base", |n| {
        let mut bad = Spoilt::new(n);
        let hidden = shape().hidden;
        let names = [
            "model.layers.0.self_attn.q_proj.base_layer.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "model.norm.weight",
        ];
        let name = format!("base_model.model.{}", pick(n, &names));
        bad.push(&name, &[hidden], &vec![1.0; hidden]);
        (bad.sent(), &["unknown_tensor", "shape_mismatch"])
    }),
    ("factors whose product is infinite", |n| {
        let mut bad = Spoilt::new(n);
        for value in bad.data.as_chunks_mut::<4>().0 {
            *value = 3e38f32.to_le_bytes();
        }
        (bad.sent(), &["non_finite_logits"])
    }),
    ("no tensors at all", |n| {
        let mut bad = Spoilt::new(n);
        (bad.entries, bad.data) = (Vec::new(), Vec::new());
        (bad.sent(), &["target_not_found"])
    }),
    ("damage anywhere", |n| {
        let good = Spoilt::new(n);
        let mut parts = good.parts();
        for _ in 0..1 + n.below(8) {
            let part = n.below(2);
            let at = n.below(parts[part].1.len());
            parts[part].1[at] ^= 1 << n.below(8);
        }
        (Sent::Parts(parts), &[])
    }),
];
