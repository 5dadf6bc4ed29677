//! Merged adapters on the real demo model, against PEFT's logprobs and greedy tokens. What is an
//! exact sum is also asked for as a composition, which must say what the merged one says.
//!
//! The `_svd` methods make every product in full, which takes half a minute: they join in a
//! soak. Their layer-0 tensors are always compared (`oracle.rs`).

use polylora::adapters::bank::{AdapterMix, Slot};
use polylora::adapters::format::factors::{OpenAdapter, open};
use polylora::adapters::format::{prepare, write};
use polylora::checkpoint::{Checkpoint, source};
use polylora::merge::Merge;
use polylora::merge::spec::{Method, Options, Source, Spec};
use polylora_kernels::{Device, Dtype};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use support::golden_adapter;
use support::peft;
use support::runner::{Runner, Stream, Weights, logprobs_at};

const LOGPROB_TOLERANCE: f64 = 2e-3;
const NEAR_TIE: f32 = 2e-3;
const END: u32 = 2;

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().expect("ids").iter().map(|x| x.as_u64().expect("id") as u32).collect()
}

/// Merges the sample adapters, writes the result and loads it as an upload is loaded.
fn install(runner: &mut Runner, spec: Spec) -> Slot {
    let weights = runner.model.weights.clone();
    let shape = &weights.shape;
    let open = |name: &str| open(&golden_adapter(name), shape).expect("a sample adapter");
    let adapters: Vec<OpenAdapter> = spec.sources.iter().map(|s| open(&s.name)).collect();
    let modules: Vec<_> = adapters.iter().map(OpenAdapter::modules).collect();
    let mut merge = Merge::new(spec, &modules).expect("a plan");
    loop {
        let read = &mut |source: usize, place| adapters[source].read(place);
        let progress = merge.step(2, read).expect("a step");
        if progress.done == progress.total {
            break;
        }
    }
    let dir = tempfile::tempdir().expect("directory");
    let merged = merge.finish().expect("merged");
    write::write(dir.path(), &merged.modules, Some("base")).expect("written");
    install_dir(runner, dir.path())
}

fn install_dir(runner: &mut Runner, dir: &Path) -> Slot {
    let weights = runner.model.weights.clone();
    let (rows, bias) = (weights.base_rows(), weights.base_bias());
    let prepared = prepare(dir, &weights.shape, Dtype::F32, &rows, &bias);
    let (_, prepared) = prepared.expect("it loads");
    runner.bank.install(prepared).ok().expect("a free slot")
}

/// The largest difference.
fn apart(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

/// The order of a golden case; both adapters active at once is their exact sum.
fn order(result: &Value) -> Spec {
    if !result["kwargs"].is_null() {
        return peft::spec(&result["kwargs"]);
    }
    let both = ["pirate", "ticket-json"];
    let sources = both.map(|name| Source { name: name.to_owned(), weight: 1.0 }).to_vec();
    Spec { method: Method::Cat, sources, options: Options::default(), seed: 0 }
}

#[test]
fn merged_adapters_say_what_pefts_say() {
    let golden = support::golden("merge.json");
    let located = source::locate(source::DEMO).expect("demo model");
    let checkpoint = Checkpoint::open(&located.path).expect("checkpoint");
    let weights = Weights::load(&checkpoint, Some(Dtype::F32.into()), &Device::cpu(2), &|_, _| ())
        .expect("weights");
    let mut runner = Runner::new(Arc::new(weights), Dtype::F32, 4_000);
    let prompts: Vec<Vec<u32>> =
        golden["info"]["prompt_ids"].as_array().expect("prompts").iter().map(ids).collect();
    let alone =
        ["pirate", "ticket-json"].map(|name| install_dir(&mut runner, &golden_adapter(name)));
    let mut streams: Vec<Stream> = Vec::new();
    let mut owners: Vec<(String, &Value)> = Vec::new();
    for (case, result) in golden["results"].as_object().expect("results") {
        if case.ends_with("_svd") && !support::soak::soak() {
            continue;
        }
        let spec = order(result);
        let mut ways = Vec::new();
        if spec.method == Method::Cat {
            let weights = spec.sources.iter().map(|source| source.weight as f32);
            ways.push((
                format!("{case} composed"),
                AdapterMix::new(alone.into_iter().zip(weights)),
            ));
        }
        ways.push((case.clone(), install(&mut runner, spec).into()));
        for (way, mix) in ways {
            for (p, tokens) in prompts.iter().enumerate() {
                streams.push(runner.blended(tokens, Some(mix), tokens.len() + 20));
                owners.push((way.clone(), &result["prompts"][p.to_string()]));
            }
        }
    }
    let composed = owners.iter().filter(|(way, _)| way.ends_with(" composed")).count();
    assert_eq!(composed, 2 * prompts.len(), "`cat` and `both_active` are sums");
    let lens: Vec<usize> = streams.iter().map(|s| s.tokens.len()).collect();
    let mut said: HashMap<(String, usize), Vec<f64>> = HashMap::new();
    runner.advance(&mut streams, |i, position, logits| {
        let (case, expected) = &owners[i];
        if position + 1 == lens[i] {
            let ours = logprobs_at(logits, &ids(&expected["top_ids"]));
            let theirs = expected["top_logprobs"].as_array().expect("logprobs").iter();
            let theirs: Vec<f64> = theirs.map(|y| y.as_f64().expect("number")).collect();
            let most = apart(&ours, &theirs);
            eprintln!("{case:20} {most:.2e}");
            assert!(most < LOGPROB_TOLERANCE, "{case}: logprobs {most} apart");
            let key = case.trim_end_matches(" composed").to_owned();
            let before = said.insert((key.clone(), i % prompts.len()), ours.clone());
            if let Some(before) = before {
                let most = apart(&before, &ours);
                eprintln!("{key:20} {most:.2e} between composed and merged");
                assert!(most < 1e-4, "{key}: composed and merged are {most} apart");
            }
        }
    });
    streams.iter_mut().for_each(|s| s.computed -= 1); // so that the last logits are seen again
    for ((case, expected), (tokens, gaps)) in
        owners.iter().zip(runner.greedy(&mut streams, 16, END))
    {
        let expected = ids(&expected["greedy"]);
        let sure = gaps.iter().take_while(|g| **g >= NEAR_TIE).count().min(expected.len());
        assert!(sure >= 4, "{case}: only {sure} tokens to compare");
        assert_eq!(tokens[..sure], expected[..sure], "{case}");
    }
}
