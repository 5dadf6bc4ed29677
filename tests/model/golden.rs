//! The right tokens: base and adapters on the real demo model against numbers made with Hugging
//! Face PEFT.
//!
//! `golden/trained.json` and `golden/synthetic.json` hold what torch 2.15, transformers 5.23 and
//! peft 0.21 computed in f32 on the same weights. Everything runs in mixed batches: all adapters
//! and the base share each step. Each adapter that can be summed is also run as the sum of a
//! quarter and three quarters of itself: biases, embedding and head factors are weighted too.

use polylora::adapters::bank::{AdapterMix, Slot};
use polylora::adapters::format;
use polylora::checkpoint::Checkpoint;
use polylora::checkpoint::source;
use polylora_kernels::{Device, Dtype, FactorDtype, KvDtype, WeightDtype};
use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use support::golden_adapter;
use support::runner::{Runner, Stream, Weights, best, logprobs_at};

const TRAINED: &str = include_str!("../golden/trained.json");
const SYNTHETIC: &str = include_str!("../golden/synthetic.json");
const END: u32 = 2;
const NEAR_TIE: f32 = 1e-3;
const LOGPROB_TOLERANCE: f64 = 1e-3;

fn load(dtype: Option<WeightDtype>) -> Arc<Weights> {
    let located = source::locate(source::DEMO).expect("demo model");
    let checkpoint = Checkpoint::open(&located.path).expect("checkpoint");
    Arc::new(Weights::load(&checkpoint, dtype, &Device::cpu(2), &|_, _| ()).expect("weights"))
}

static F32: LazyLock<Arc<Weights>> = LazyLock::new(|| load(Some(WeightDtype::F32)));

static BF16: LazyLock<Arc<Weights>> = LazyLock::new(|| load(Some(WeightDtype::Bf16)));

fn install(runner: &mut Runner, dir: &Path, dtype: impl Into<FactorDtype>) -> Slot {
    let weights = runner.model.weights.clone();
    let (_, prepared) =
        format::prepare(dir, &weights.shape, dtype, &weights.base_rows(), &weights.base_bias())
            .unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    runner.bank.install(prepared).ok().expect("a free slot")
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().expect("ids").iter().map(|x| x.as_u64().expect("id") as u32).collect()
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("number")).collect()
}

/// One adapter's (or the base's) part of a golden file.
struct Case<'a> {
    name: String,
    mix: Option<AdapterMix>,
    expected: &'a Value,
}

/// How far a case is from its golden numbers.
#[derive(Debug, Default, Clone)]
struct Distance {
    logprob_max: f64,
    text_mean: f64,
    greedy_wrong: Option<String>,
    greedy_compared: usize,
}

impl Distance {
    fn is_right(&self) -> bool {
        self.logprob_max < LOGPROB_TOLERANCE
            && self.text_mean < LOGPROB_TOLERANCE
            && self.greedy_wrong.is_none()
    }
}

/// Runs all cases together and measures each against its golden numbers.
fn measure(runner: &mut Runner, golden: &Value, cases: &[Case]) -> Vec<Distance> {
    runner.reset();
    let prompts: Vec<Vec<u32>> =
        golden["info"]["prompt_ids"].as_array().expect("prompts").iter().map(ids).collect();
    let mut streams: Vec<Stream> = Vec::new();
    let mut owner: Vec<(usize, usize)> = Vec::new();
    for (c, case) in cases.iter().enumerate() {
        for (key, _) in case.expected["prompts"].as_object().expect("prompts") {
            let p: usize = key.parse().expect("prompt number");
            streams.push(runner.blended(&prompts[p], case.mix, prompts[p].len() + 40));
            owner.push((c, p));
        }
    }
    let mut out = vec![Distance::default(); cases.len()];
    runner.advance(&mut streams, |i, position, logits| {
        let (c, p) = owner[i];
        if position + 1 == prompts[p].len() {
            let expected = &cases[c].expected["prompts"][p.to_string()];
            let ours = logprobs_at(logits, &ids(&expected["top_ids"]));
            for (a, b) in ours.iter().zip(floats(&expected["top_logprobs"])) {
                out[c].logprob_max = out[c].logprob_max.max((a - b).abs());
            }
        }
    });
    check_greedy(runner, &mut streams, &owner, cases, &mut out);
    check_text(runner, golden, cases, &mut out);
    out
}

fn check_greedy(
    runner: &mut Runner,
    streams: &mut [Stream],
    owner: &[(usize, usize)],
    cases: &[Case],
    out: &mut [Distance],
) {
    // The prompt's last token is computed again so that its logits are seen.
    for s in streams.iter_mut() {
        s.computed -= 1;
    }
    let ours = runner.greedy(streams, 32, END);
    for (i, (tokens, gaps)) in ours.iter().enumerate() {
        let (c, p) = owner[i];
        let expected = ids(&cases[c].expected["prompts"][p.to_string()]["greedy"]);
        for (at, &token) in expected.iter().enumerate() {
            if gaps[at] < NEAR_TIE {
                break;
            }
            if tokens[at] != token {
                let wrong = format!("prompt {p} token {at}: {} not {token}", tokens[at]);
                out[c].greedy_wrong.get_or_insert(wrong);
                break;
            }
            out[c].greedy_compared += 1;
        }
    }
}

fn check_text(runner: &mut Runner, golden: &Value, cases: &[Case], out: &mut [Distance]) {
    let text = ids(&golden["info"]["text_ids"]);
    let mut streams: Vec<Stream> =
        cases.iter().map(|c| runner.blended(&text, c.mix, text.len())).collect();
    let mut sums = vec![0.0; cases.len()];
    runner.advance(&mut streams, |i, position, logits| {
        if let Some(&next) = text.get(position + 1) {
            sums[i] += logprobs_at(logits, &[next])[0];
        }
    });
    for (c, case) in cases.iter().enumerate() {
        let expected = case.expected["mean_logprob_text"].as_f64().expect("mean");
        out[c].text_mean = (sums[c] / (text.len() - 1) as f64 - expected).abs();
    }
}

/// Whether all that an adapter does is adding products and biases.
fn is_a_sum(runner: &Runner, slot: Slot) -> bool {
    let resident = runner.bank.residents().get(slot).expect("installed");
    let gained = resident.deltas.iter().flatten().any(|delta| delta.has_gain());
    !gained && resident.norms.iter().all(Option::is_none)
}

/// Installs every adapter of a golden file and compares them all in shared steps.
fn check_file(golden: &str) {
    let golden: Value = serde_json::from_str(golden).expect("golden file");
    let mut runner = Runner::new(F32.clone(), Dtype::F32, 24_000);
    let results = golden["results"].as_object().expect("results");
    let mut cases = Vec::new();
    for (name, expected) in results {
        let slot =
            (name != "base").then(|| install(&mut runner, &golden_adapter(name), Dtype::F32));
        cases.push(Case { name: name.clone(), mix: slot.map(AdapterMix::from), expected });
        if let Some(slot) = slot.filter(|slot| is_a_sum(&runner, *slot)) {
            let mix = Some(AdapterMix::new([(slot, 0.25), (slot, 0.75)]));
            cases.push(Case { name: format!("{name} in parts"), mix, expected });
        }
    }
    assert!(cases.iter().any(|case| case.name.ends_with("in parts")));
    let distances = measure(&mut runner, &golden, &cases);
    for (case, d) in cases.iter().zip(&distances) {
        eprintln!("{:12} {d:?}", case.name);
        let streams = case.expected["prompts"].as_object().expect("prompts").len();
        assert!(d.is_right(), "{}: {d:?}", case.name);
        assert!(d.greedy_compared >= streams * 4, "{}: too few tokens compared", case.name);
    }
}

#[test]
fn base_and_trained_adapters_match_peft_in_one_batch() {
    check_file(TRAINED);
}

#[test]
fn base_and_corner_case_adapters_match_peft_in_one_batch() {
    check_file(SYNTHETIC);
}

/// Copies an adapter, lets `spoil` change config and tensors, and says how far the result is from
/// the golden numbers.
fn distance_when_spoiled(
    golden: &str,
    name: &str,
    spoil: impl Fn(&mut Value, &mut Vec<(String, Tensor)>),
) -> Distance {
    let golden: Value = serde_json::from_str(golden).expect("golden file");
    let dir = tempfile::tempdir().expect("directory");
    let source = golden_adapter(name);
    let config = std::fs::read(source.join("adapter_config.json")).expect("config");
    let mut config: Value = serde_json::from_slice(&config).expect("config");
    let bytes = std::fs::read(source.join("adapter_model.safetensors")).expect("tensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    let mut tensors: Vec<(String, Tensor)> = file
        .iter()
        .map(|(n, v)| (n.to_owned(), Tensor(v.dtype(), v.shape().to_vec(), v.data().to_vec())))
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    spoil(&mut config, &mut tensors);
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).expect("write");
    let views = tensors.iter().map(|(n, t)| {
        (n.clone(), safetensors::tensor::TensorView::new(t.0, t.1.clone(), &t.2).expect("view"))
    });
    let out = dir.path().join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &out).expect("write");

    let mut runner = Runner::new(F32.clone(), Dtype::F32, 4_000);
    let slot = install(&mut runner, dir.path(), Dtype::F32);
    let (mix, expected) = (Some(slot.into()), &golden["results"][name]);
    let case = Case { name: name.to_owned(), mix, expected };
    measure(&mut runner, &golden, &[case]).remove(0)
}

/// dtype, dims, bytes
struct Tensor(safetensors::Dtype, Vec<usize>, Vec<u8>);

/// The comparison above can fail: each of these mistakes, which other servers have shipped, is
/// seen.
#[test]
fn planted_errors_are_seen() {
    let wrong_scale = distance_when_spoiled(TRAINED, "pirate", |config, _| {
        config["lora_alpha"] = 8.into();
    });
    assert!(!wrong_scale.is_right(), "wrong scale: {wrong_scale:?}");

    let wrong_order = distance_when_spoiled(TRAINED, "blurb", |config, _| {
        let pattern = config["alpha_pattern"].as_object().expect("pattern").clone();
        let reversed: serde_json::Map<String, Value> = pattern.into_iter().rev().collect();
        config["alpha_pattern"] = Value::Object(reversed);
    });
    assert!(!wrong_order.is_right(), "wrong pattern order: {wrong_order:?}");

    let swapped = distance_when_spoiled(TRAINED, "pirate", |_, tensors| {
        swap_tensors(
            tensors,
            "layers.7.self_attn.q_proj.lora_B",
            "layers.7.self_attn.o_proj.lora_B",
        );
    });
    assert!(!swapped.is_right(), "swapped factors: {swapped:?}");

    let wrong_layer = distance_when_spoiled(SYNTHETIC, "lora-layers", |_, tensors| {
        swap_tensors(tensors, "layers.0.mlp.down_proj.lora_A", "layers.7.mlp.down_proj.lora_A");
        swap_tensors(tensors, "layers.0.mlp.down_proj.lora_B", "layers.7.mlp.down_proj.lora_B");
    });
    assert!(!wrong_layer.is_right(), "wrong layer: {wrong_layer:?}");

    let no_dora = distance_when_spoiled(TRAINED, "sql", |config, tensors| {
        config["use_dora"] = false.into();
        tensors.retain(|(name, _)| !name.contains("lora_magnitude_vector"));
    });
    assert!(!no_dora.is_right(), "DoRA left out: {no_dora:?}");
}

fn swap_tensors(tensors: &mut [(String, Tensor)], a: &str, b: &str) {
    let find = |part: &str, tensors: &[(String, Tensor)]| {
        tensors.iter().position(|(n, _)| n.contains(part)).expect("tensor")
    };
    let (i, j) = (find(a, tensors), find(b, tensors));
    assert_eq!(tensors[i].1.1, tensors[j].1.1, "only equal shapes can be swapped unseen");
    let (left, right) = tensors.split_at_mut(i.max(j));
    std::mem::swap(&mut left[i.min(j)].1, &mut right[0].1);
}

/// At least `tokens_min` positions of text that the adapters were not trained on: what users and
/// assistants say, without the template around it, so that no position stands for forty equal ones.
fn heldout(runner: &Runner, tokens_min: usize) -> Vec<Vec<u32>> {
    let located = source::locate(source::DEMO).expect("demo model");
    let checkpoint = Checkpoint::open(&located.path).expect("checkpoint");
    assert_eq!(checkpoint.digest().expect("read"), runner.model.weights.digest);
    let text = polylora::text::Text::new(checkpoint.text).expect("text");
    let mut out: Vec<Vec<u32>> = Vec::new();
    for line in include_str!("../golden/heldout.jsonl").lines() {
        let example: Value = serde_json::from_str(line).expect("example");
        let messages = example["messages"].as_array().expect("messages");
        let said = messages.iter().map(|m| m["content"].as_str().expect("text"));
        out.push(text.encode(&said.collect::<Vec<_>>().join("\n"), false).expect("tokens"));
        if out.iter().map(Vec::len).sum::<usize>() >= tokens_min {
            break;
        }
    }
    out
}

/// (mean logprob of the golden text, best token of every held-out position)
fn judge(
    weights: Arc<Weights>,
    factors: FactorDtype,
    adapter: Option<&str>,
) -> (f64, Vec<(u32, f32)>) {
    let kv = weights.dtype.into();
    judge_with(weights, kv, factors, adapter)
}

/// The same with keys and values as `kv`.
fn judge_with(
    weights: Arc<Weights>,
    kv: KvDtype,
    factors: FactorDtype,
    adapter: Option<&str>,
) -> (f64, Vec<(u32, f32)>) {
    let golden: Value = serde_json::from_str(TRAINED).expect("golden file");
    let mut runner = Runner::new(weights, kv, 12_000);
    let slot = adapter.map(|name| install(&mut runner, &golden_adapter(name), factors));
    let text = ids(&golden["info"]["text_ids"]);
    let mut streams = vec![runner.stream(&text, slot, text.len())];
    let mut sum = 0.0;
    runner.advance(&mut streams, |_, position, logits| {
        if let Some(&next) = text.get(position + 1) {
            sum += logprobs_at(logits, &[next])[0];
        }
    });
    let corpus = heldout(&runner, 4_000);
    let mut streams: Vec<Stream> = corpus.iter().map(|t| runner.stream(t, slot, t.len())).collect();
    let mut tops: Vec<Vec<(u32, f32)>> = corpus.iter().map(|t| vec![(0, 0.0); t.len()]).collect();
    runner.advance(&mut streams, |i, position, logits| tops[i][position] = best(logits));
    (sum / (text.len() - 1) as f64, tops.concat())
}

#[test]
fn bf16_agrees_with_f32_on_the_best_token() {
    for adapter in [None, Some("ticket-json"), Some("sql")] {
        let want = judge(F32.clone(), FactorDtype::F32, adapter);
        let (share, apart) = compare(&want, &judge(BF16.clone(), FactorDtype::Bf16, adapter));
        assert!(share >= 0.98, "{adapter:?}: top-1 agreement {share}");
        assert!(apart < 0.02, "{adapter:?}: mean logprob {apart} apart");
    }
}

/// Share of equal best tokens, and how far the means are apart.
fn compare(want: &(f64, Vec<(u32, f32)>), got: &(f64, Vec<(u32, f32)>)) -> (f64, f64) {
    let equal = want.1.iter().zip(&got.1).filter(|(a, b)| a.0 == b.0).count();
    let (share, apart) = (equal as f64 / want.1.len() as f64, (want.0 - got.0).abs());
    eprintln!("top-1 {share:.4} of {}, mean {apart:.5} apart", want.1.len());
    assert!(want.1.len() >= 4_000, "only {} positions", want.1.len());
    (share, apart)
}

#[test]
fn int8_factors_agree_with_bf16_factors() {
    for adapter in ["pirate", "ticket-json", "sql", "blurb"] {
        let want = judge(BF16.clone(), FactorDtype::Bf16, Some(adapter));
        let int8 = judge(BF16.clone(), FactorDtype::Int8, Some(adapter));
        let (share, apart) = compare(&want, &int8);
        assert!(share >= 0.98, "{adapter}: top-1 agreement {share}");
        assert!(apart < 0.01, "{adapter}: mean logprob {apart} apart");
        assert!(want.1 != int8.1, "{adapter}: not one logit tells the two apart");
    }
}

#[test]
fn int8_keys_and_values_agree_with_bf16() {
    for adapter in [None, Some("ticket-json"), Some("sql")] {
        let want = judge(BF16.clone(), FactorDtype::Bf16, adapter);
        let int8 = judge_with(BF16.clone(), KvDtype::Int8, FactorDtype::Bf16, adapter);
        let (share, apart) = compare(&want, &int8);
        assert!(share >= 0.97, "{adapter:?}: top-1 agreement {share}");
        assert!(apart < 0.01, "{adapter:?}: mean logprob {apart} apart");
        assert!(want.1 != int8.1, "{adapter:?}: not one logit tells the two apart");
    }
}

/// Rounding activations to 8 bits in groups of 32 moves the best token of one position in thirty to
/// forty: more than bf16 does, and log-probabilities about half as far as other programs that
/// multiply such files (`benches/peers/accuracy.py`).
#[test]
fn integer_weights_agree_with_the_same_weights_in_f32() {
    let adapters = [None, Some("sql")];
    let wants = adapters.map(|adapter| judge(F32.clone(), FactorDtype::F32, adapter));
    // The file's own Q4_1 and Q8_0; the same weights rounded to 8 bits once more. (To 4 bits they
    // would come out as they are in the file.)
    for dtype in [None, Some(WeightDtype::Int8)] {
        let weights = load(dtype);
        for (adapter, want) in adapters.iter().zip(&wants) {
            let (share, apart) =
                compare(want, &judge(weights.clone(), FactorDtype::Bf16, *adapter));
            assert!(share >= 0.955, "{dtype:?}, {adapter:?}: top-1 agreement {share}");
            assert!(apart < 0.02, "{dtype:?}, {adapter:?}: mean logprob {apart} apart");
        }
    }
}
