//! Adapter formats: what is read, what it multiplies with, and what is refused under which code.

mod bundles;
mod modules;
mod refusals;
mod scales;

use polylora::adapters::bank::Prepared;
use polylora::adapters::format::{Summary, check, prepare};
use polylora::error::{Error, Kind};
use polylora::shape::{ModelShape, Norm, Projection, Rope, RopeScaling, Site};
use polylora_kernels::{
    Act, Delta, Device, Dtype, Linear, LoraScratch, Matrix, Memory, Plane, Resident, Residents,
    Segments, Vector, embed, linear,
};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use support::files::{Files, base_bias, base_rows, site_seed, tiny, values};
use support::gguf::{gguf, head};

/// Merges objects; for configs made of a base and a change.
fn with(base: &Value, change: Value) -> Value {
    let mut map: Map<String, Value> = base.as_object().unwrap().clone();
    map.extend(change.as_object().unwrap().clone());
    Value::Object(map)
}

/// The demo model, for which the golden adapters were made.
fn smollm2() -> ModelShape {
    ModelShape {
        layers: 30,
        hidden: 576,
        ffn: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49152,
        context: 8192,
        rope: Rope { theta: 100_000.0, scaling: RopeScaling::None },
        windows: vec![None; 30],
        attention_scale: 0.125,
        ..tiny()
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn golden(name: &str) -> PathBuf {
    root().join("tests/golden/adapters").join(name)
}

fn prepared(dir: &Path, shape: &ModelShape) -> Result<(Summary, Prepared), Error> {
    prepare(dir, shape, Dtype::F32, &base_rows(shape), &base_bias(shape))
}

fn load(files: &Files, shape: &ModelShape) -> Result<(Summary, Prepared), Error> {
    let dir = tempfile::tempdir().unwrap();
    files.write(dir.path());
    let summary = check(dir.path(), shape)?;
    let (again, prepared) = prepared(dir.path(), shape)?;
    assert_eq!(summary, again);
    Ok((summary, prepared))
}

/// The code with which the tiny model refuses the files; the message must name `needle`.
fn refusal(files: &Files, needle: &str) -> &'static str {
    let error = load(files, &tiny()).map(|(s, _)| s).expect_err(needle);
    assert_eq!(error.kind, Kind::Unprocessable, "{error}");
    assert!(error.message.contains(needle), "{needle:?} is not in {:?}", error.message);
    error.code
}

fn site(prepared: &Prepared, shape: &ModelShape, l: usize, p: Projection) -> Option<usize> {
    let index = shape.site_index(Site::Layer(l, p));
    prepared.resident.deltas[index].as_ref().map(Delta::rank)
}

/// What the delta makes of x over a base weight `[O, I]`.
fn applied(delta: Delta, weight: &[f32], x: &[f32]) -> Vec<f32> {
    let (inputs, outputs) = (delta.inputs(), delta.outputs());
    let (device, memory) = (Device::cpu(1), &Memory::Cpu);
    let matrix = Matrix::from_f32(memory, Dtype::F32, outputs, inputs, weight).unwrap();
    let mut act = Act::new(memory, Dtype::F32, 1, inputs).unwrap();
    act.write(0, x).unwrap();
    let mut y = Plane::new(memory, 1, outputs).unwrap();
    let mut outs = [Linear { weight: &matrix, bias: None, site: 0, y: &mut y }];
    let mut scratch = LoraScratch::new(memory, 1, 512).unwrap();
    let resident = Resident { deltas: vec![Some(delta)], ..Resident::default() };
    on_a_row(resident, |segments| linear(&device, &act, 1, &mut outs, segments, &mut scratch));
    y.read(&device, 1).unwrap().to_vec()
}

/// Calls `op` with a row that the resident alone changes.
fn on_a_row(resident: Resident, op: impl FnOnce(Segments<'_>)) {
    let mut residents = Residents::new(1);
    let slot = residents.install(resident).map_err(|_| "full").unwrap();
    op(Segments { indptr: &[0, 1], mixes: &[slot.into()], residents: &residents });
}

/// gain ∘ (W x + scale · B A x) + bias in f64, with the sum W + scale·B·A written out.
struct Dense<'a> {
    weight: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
    scale: f64,
    magnitude: Option<&'a [f32]>,
}

impl Dense<'_> {
    fn apply(&self, x: &[f32]) -> Vec<f64> {
        let inputs = x.len();
        let rank = self.a.len() / inputs;
        let outputs = self.weight.len() / inputs;
        let mut y = Vec::new();
        for o in 0..outputs {
            let row: Vec<f64> = (0..inputs)
                .map(|i| {
                    let product: f64 = (0..rank)
                        .map(|r| {
                            f64::from(self.b[o * rank + r]) * f64::from(self.a[r * inputs + i])
                        })
                        .sum();
                    f64::from(self.weight[o * inputs + i]) + self.scale * product
                })
                .collect();
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            let gain = self.magnitude.map_or(1.0, |m| f64::from(m[o]) / norm);
            y.push(gain * row.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>());
        }
        y
    }
}

fn assert_near(got: &[f32], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len());
    for (i, (g, w)) in got.iter().zip(wanted).enumerate() {
        assert!((f64::from(*g) - w).abs() <= tolerance, "index {i}: {g} is not {w}");
    }
}

/// Takes a site's delta out.
fn delta_of(prepared: &mut Prepared, shape: &ModelShape, at: Site) -> Delta {
    prepared.resident.deltas[shape.site_index(at)].take().unwrap()
}

const Q0: Site = Site::Layer(0, Projection::Q);

// What real PEFT wrote.

#[test]
fn golden_adapters_are_read_whole() {
    let shape = smollm2();
    let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let adapters = root().join("adapters");
    let cases: [(PathBuf, &str, usize, usize, Vec<&str>); 8] = [
        (adapters.join("pirate"), "lora", 8, 120, all[..4].to_vec()),
        (adapters.join("ticket-json"), "lora", 8, 210, all.to_vec()),
        (adapters.join("sql"), "dora", 4, 210, all.to_vec()),
        (golden("blurb"), "lora", 16, 90, vec!["q_proj", "v_proj", "down_proj"]),
        (golden("lora-regex"), "lora", 4, 33, vec!["q_proj", "o_proj", "up_proj"]),
        (golden("lora-layers"), "lora", 4, 9, vec!["q_proj", "v_proj", "down_proj"]),
        (golden("lora-embed"), "lora", 2, 31, vec!["q_proj", "embed_tokens"]),
        (golden("lora-bias"), "lora", 4, 20, vec!["q_proj", "v_proj"]),
    ];
    for (dir, method, rank_max, sites, targets) in cases {
        let summary = check(&dir, &shape).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let found = (summary.method.as_str(), summary.rank_max, summary.sites);
        assert_eq!(found, (method, rank_max, sites), "{}", dir.display());
        assert_eq!(summary.targets, targets);
        assert_eq!(summary.base_model.as_deref(), Some("base"));
    }
}

#[test]
fn a_gguf_adapter_means_the_same_as_the_peft_adapter_it_was_made_from() {
    // Written with the gguf package, rows of q and k permuted as llama.cpp's converter does.
    let shape = smollm2();
    let dir = tempfile::tempdir().unwrap();
    let file = golden("pirate-2-layers.gguf");
    std::fs::copy(file, dir.path().join("anything.gguf")).unwrap();
    let (summary, mut from_gguf) = prepared(dir.path(), &shape).unwrap();
    assert_eq!((summary.method.as_str(), summary.sites, summary.rank_max), ("gguf-lora", 8, 8));
    let (_, mut from_peft) = prepared(&root().join("adapters/pirate"), &shape).unwrap();
    for l in [0, 29] {
        for p in [Projection::Q, Projection::K, Projection::V, Projection::O] {
            let at = Site::Layer(l, p);
            let [a, b] = [&mut from_gguf, &mut from_peft].map(|from| delta_of(from, &shape, at));
            let x = values(7, a.inputs());
            let zero = vec![0.0; a.inputs() * a.outputs()];
            let y = applied(a, &zero, &x);
            assert!(y.iter().any(|v| v.abs() > 1e-3));
            assert_eq!(y, applied(b, &zero, &x), "layer {l} {p:?}");
        }
    }
}

// What the factors become.

#[test]
fn a_delta_is_scale_times_b_times_a() {
    let shape = tiny();
    let mut files = Files::plain(3);
    let (_, mut prepared) = load(&files, &shape).unwrap();
    assert!(site(&prepared, &shape, 0, Projection::K).is_none());
    assert_eq!(site(&prepared, &shape, 1, Projection::V), Some(2));
    let delta = delta_of(&mut prepared, &shape, Q0);
    let weight = values(site_seed(Q0), 64);
    let dense = Dense {
        weight: &weight,
        a: &files.get("layers.0.self_attn.q_proj.lora_A").2.clone(),
        b: &files.get("layers.0.self_attn.q_proj.lora_B").2.clone(),
        scale: 2.0,
        magnitude: None,
    };
    let x = values(5, 8);
    assert_near(&applied(delta, &weight, &x), &dense.apply(&x), 1e-5);
}

#[test]
fn dora_gains_are_the_magnitude_over_the_norm_of_the_whole_row() {
    let shape = tiny();
    let mut files = Files::dora(3);
    files.set("use_rslora", json!(true));
    let (summary, mut prepared) = load(&files, &shape).unwrap();
    assert_eq!(summary.method, "dora");
    for at in [Q0, Site::Layer(1, Projection::V)] {
        let Site::Layer(l, p) = at else { unreachable!() };
        let (inputs, outputs) = shape.site_dims(at);
        let module = format!("layers.{l}.{}", p.module());
        let weight = values(site_seed(at), inputs * outputs);
        let dense = Dense {
            weight: &weight,
            a: &files.get(&format!("{module}.lora_A")).2.clone(),
            b: &files.get(&format!("{module}.lora_B")).2.clone(),
            scale: 4.0 / 2f64.sqrt(),
            magnitude: Some(&files.get(&format!("{module}.lora_magnitude")).2.clone()),
        };
        let x = values(5, 8);
        let delta = delta_of(&mut prepared, &shape, at);
        assert_near(&applied(delta, &weight, &x), &dense.apply(&x), 1e-5);
    }
}

#[test]
fn biases_of_the_factors_are_scaled_and_trained_ones_replace_the_bases() {
    let shape = ModelShape { qkv_bias: true, ..tiny() };
    let mut files = Files::plain(3);
    files.set("bias", json!("all")).set("lora_bias", json!(true));
    for l in 0..2 {
        for (name, n) in [("q_proj", 8), ("v_proj", 4)] {
            let module = format!("model.layers.{l}.self_attn.{name}");
            files.push(&format!("{module}.lora_B.bias"), &[n], vec![0.25; n]);
        }
    }
    files.push("model.layers.0.self_attn.q_proj.base_layer.bias", &[8], vec![3.0; 8]);
    files.push("model.layers.1.self_attn.k_proj.bias", &[4], vec![5.0; 4]);
    let (_, mut prepared) = load(&files, &shape).unwrap();
    assert_eq!(site(&prepared, &shape, 1, Projection::K), Some(0));
    let mut at_zero = |at: Site| {
        let delta = delta_of(&mut prepared, &shape, at);
        let zeros = vec![0.0; delta.inputs() * delta.outputs()];
        applied(delta, &zeros, &[0.0; 8])
    };
    let base = base_bias(&shape);
    let wanted = |at, new: f64, scaled: f64| -> Vec<f64> {
        let base = base(at).unwrap();
        base.iter().map(|b| new - f64::from(*b) + scaled).collect()
    };
    // 2 · 0.25 from lora_B.bias; the kernel adds the base's own bias on top.
    assert_near(&at_zero(Q0), &wanted(Q0, 3.0, 0.5), 1e-6);
    let k1 = Site::Layer(1, Projection::K);
    assert_near(&at_zero(k1), &wanted(k1, 5.0, 0.0), 1e-6);
    assert_near(&at_zero(Site::Layer(0, Projection::V)), &[0.5; 4], 1e-6);
}

#[test]
fn norms_in_modules_to_save_replace_and_fold_gemmas_one() {
    for (norm_plus_one, wanted) in [(false, 0.75), (true, 1.75)] {
        let shape = ModelShape { norm_plus_one, ..tiny() };
        let mut files = Files::plain(3);
        files.set("modules_to_save", json!(["model.norm", "input_layernorm"]));
        files.push("model.norm.weight", &[8], vec![0.75; 8]);
        files.push("model.layers.0.input_layernorm.weight", &[8], vec![0.5; 8]);
        let (summary, prepared) = load(&files, &shape).unwrap();
        assert_eq!(summary.targets, ["q_proj", "v_proj", "input_layernorm", "norm"]);
        let norms = &prepared.resident.norms;
        let norm = |n| norms[shape.norm_index(n)].as_ref().map(Vector::values);
        assert_eq!(norm(Norm::Final), Some([wanted; 8].as_slice()));
        assert_eq!(norm(Norm::Input(0)), Some([wanted - 0.25; 8].as_slice()));
        assert_eq!(norm(Norm::Input(1)), None);
    }
}

fn embedded(prepared: Prepared, shape: &ModelShape, token: u32) -> Vec<f32> {
    let zero = vec![0.0; shape.vocab * shape.hidden];
    let (device, memory) = (Device::cpu(1), &Memory::Cpu);
    let table = Matrix::from_f32(memory, Dtype::F32, shape.vocab, shape.hidden, &zero).unwrap();
    let mut h = Plane::new(memory, 1, shape.hidden).unwrap();
    on_a_row(prepared.resident, |segments| {
        embed(&device, &table, &[token], 1.0, segments, &mut h);
    });
    h.read(&device, 1).unwrap().to_vec()
}

#[test]
fn embedding_factors_pick_a_column_and_take_the_embedding_scale() {
    let shape = ModelShape { embedding_scale: 3.0, ..tiny() };
    let mut files = Files::plain(3);
    files.set("target_modules", json!(["q_proj", "v_proj", "embed_tokens"]));
    let (a, b) = (values(70, 20), values(71, 16));
    files.push("model.embed_tokens.lora_embedding_A", &[2, 10], a.clone());
    files.push("model.embed_tokens.lora_embedding_B", &[8, 2], b.clone());
    let token = 7;
    let wanted: Vec<f64> = (0..8)
        .map(|h| {
            let product = b[h * 2] * a[token] + b[h * 2 + 1] * a[10 + token];
            f64::from(product) * 2.0 * 3.0
        })
        .collect();
    let (summary, prepared) = load(&files, &shape).unwrap();
    assert_eq!(summary.sites, 5);
    assert_near(&embedded(prepared, &shape, 7), &wanted, 1e-5);

    // The same factors as GGUF, where the token table's A lies transposed.
    let turned: Vec<f32> = (0..20).map(|i| a[i % 2 * 10 + i / 2]).collect();
    let file = gguf(
        &head("llama"),
        &[
            ("token_embd.weight.lora_a", vec![2, 10], turned),
            ("token_embd.weight.lora_b", vec![2, 8], b),
        ],
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter.gguf"), file).unwrap();
    let (_, prepared) = self::prepared(dir.path(), &shape).unwrap();
    assert_near(&embedded(prepared, &shape, 7), &wanted, 1e-5);
}

#[test]
fn a_head_adapter_may_bring_the_bases_own_table_but_no_other() {
    let shape = tiny();
    let head = values(site_seed(Site::Head), 80);
    let mut files = Files::plain(3);
    files.set("target_modules", json!(["q_proj", "v_proj", "lm_head"]));
    files.factors("lm_head", 2, 8, 10, 90);
    files.push("lm_head.base_layer.weight", &[10, 8], head.clone());
    let (summary, mut prepared) = load(&files, &shape).unwrap();
    assert_eq!(summary.targets, ["q_proj", "v_proj", "lm_head"]);
    assert!(prepared.resident.embedding.is_none(), "a tied head's factors act on the head only");
    assert_eq!(delta_of(&mut prepared, &shape, Site::Head).rank(), 2);

    // One changed value in the last row.
    files.get("lm_head.base_layer").2[79] += 0.5;
    assert_eq!(refusal(&files, "row 9"), "base_weights_changed");
    // A plain copy might have been trained, so it must be closer.
    files.get("lm_head.base_layer").0 = "base_model.model.lm_head.weight".into();
    files.get("lm_head.weight").2 = head.iter().map(|v| v * 1.01).collect();
    assert_eq!(refusal(&files, "row 0"), "base_weights_changed");
    files.get("lm_head.weight").2 = head.iter().map(|v| v * 1.001).collect();
    load(&files, &shape).unwrap();
    // The tied table may also come under the embedding's name.
    files.get("lm_head.weight").0 = "base_model.model.model.embed_tokens.base_layer.weight".into();
    load(&files, &shape).unwrap();
}
