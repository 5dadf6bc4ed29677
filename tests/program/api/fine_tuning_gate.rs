//! What was trained is measured before it serves: gates, candidates, and what a kill leaves.

use crate::api::files::upload;
use serde_json::{Value, json};
use std::path::PathBuf;
use support::live::{Live, hello, with};

/// Examples with one answer, which a tiny model learns in a few steps.
pub fn lines(from: usize, count: usize) -> String {
    let line = |n: usize| json!({"prompt": format!("{n}?"), "completion": "yes"});
    (from..from + count).map(|n| format!("{}\n", line(n))).collect()
}

pub async fn file(live: &Live, key: &str, content: &str) -> String {
    let file = upload(live, key, "train.jsonl", content).await;
    file["id"].as_str().expect("an id").to_owned()
}

/// A job that learns its lines well.
pub fn good(name: &str, file: &str, ours: Value) -> Value {
    let plain = json!({"r": 4, "lr": 0.02});
    json!({"model": "tiny", "training_file": file, "suffix": name, "seed": 3,
           "hyperparameters": {"n_epochs": 8, "batch_size": 4}, "polylora": with(plain, ours)})
}

/// One that hardly changes the base.
fn bad(name: &str, file: &str, ours: Value) -> Value {
    let mut job = good(name, file, with(json!({"lr": 1e-5}), ours));
    job["hyperparameters"]["n_epochs"] = json!(1);
    job
}

pub async fn submit(live: &Live, job: Value) -> String {
    let answer = live.post("/v1/fine_tuning/jobs", job).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()["id"].as_str().expect("an id").to_owned()
}

pub async fn job(live: &Live, id: &str) -> Value {
    live.get(&format!("/v1/fine_tuning/jobs/{id}")).await.json()
}

/// Waits until a job is over.
pub async fn over(live: &Live, id: &str) -> Value {
    live.until("the job is over", async || !job(live, id).await["finished_at"].is_null()).await;
    job(live, id).await
}

pub async fn done(live: &Live, order: Value) -> Value {
    let job = over(live, &submit(live, order).await).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    job
}

/// The versions of a name that are no checkpoints, and the one that it means.
async fn standing(live: &Live, name: &str) -> (Vec<u64>, Value) {
    let shown = live.get(&format!("/v1/adapters/{name}")).await.json();
    let versions = shown["versions"].as_array().unwrap_or_else(|| panic!("{shown}"));
    let whole = versions.iter().filter(|v| v["lineage"]["step"].is_null());
    (whole.map(|v| v["version"].as_u64().expect("a number")).collect(), shown["current"].clone())
}

async fn report(live: &Live, job: &Value) -> Value {
    let id = job["id"].as_str().expect("an id");
    live.get(&format!("/v1/fine_tuning/jobs/{id}/report")).await.json()
}

async fn told(live: &Live, job: &Value) -> Vec<Value> {
    let id = job["id"].as_str().expect("an id");
    let page = live.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=100")).await.json();
    page["data"].as_array().expect("events").clone()
}

/// Number of a version.
fn number(job: &Value) -> u64 {
    let id = job["fine_tuned_model"].as_str().expect("a version");
    id.split_once('@').and_then(|(_, number)| number.parse().ok()).expect("a number")
}

/// Where the files of a version lie.
async fn blob(live: &Live, id: &str) -> PathBuf {
    let (name, number) = id.split_once('@').expect("a version");
    let shown = live.get(&format!("/v1/adapters/{name}")).await.json();
    let versions = shown["versions"].as_array().expect("versions");
    let number: u64 = number.parse().expect("a number");
    let version = versions.iter().find(|v| v["version"] == number).expect("there");
    let digest = version["digest"].as_str().expect("a digest").trim_start_matches("sha256:");
    live.data().join("adapters/sha256").join(&digest[..2]).join(digest)
}

#[tokio::test]
async fn what_holds_takes_the_name_and_the_report_has_the_trainers_own_figures() {
    let live = Live::start(&[]);
    let (train, valid) =
        (file(&live, "-", &lines(0, 12)).await, file(&live, "-", &lines(20, 6)).await);
    let gate = json!({"max_loss_ratio_to_base": 0.5, "min_exact_match": 0.5,
                      "max_negative_flips": 0, "must_beat_current": true});
    let order = with(good("yes", &train, json!({"gate": gate})), json!({"validation_file": valid}));
    let job = done(&live, order).await;
    let judged = &job["polylora"]["gate"];
    assert_eq!(
        *judged,
        json!({"passed": true, "reasons": [], "promoted": true, "thresholds": gate}),
        "{job}"
    );
    let made = number(&job);
    assert_eq!(standing(&live, "yes").await, (vec![made], json!(made)));
    let answer = live.chat(hello("yes", 3)).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "yes", "{answer}");

    let report = report(&live, &job).await;
    let table = &report["evaluation"];
    assert_eq!((&table["examples"], &table["held_out"]), (&json!(6), &json!(6)), "{report}");
    let scores = table["scores"].as_array().expect("scores");
    let models: Vec<&str> = scores.iter().map(|s| s["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["base", &format!("yes@{made}")], "no version was there before");
    // The trainer validates by its own passes, after the last step.
    let figure = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{report}"));
    let (own, theirs) = (figure(&scores[1]["loss"]), figure(&report["last"]["full_valid_loss"]));
    assert!((own - theirs).abs() < 1e-3 * theirs, "{own} {theirs}");
    let (own, theirs) =
        (&scores[1]["token_accuracy"], &report["last"]["full_valid_mean_token_accuracy"]);
    assert!((figure(own) - figure(theirs)).abs() < 1e-9, "{own} {theirs}");
    assert!(figure(&scores[0]["loss"]) > 2.0 * figure(&scores[1]["loss"]), "{table}");
    let svg = format!("/v1/fine_tuning/jobs/{}/report?format=svg", job["id"].as_str().unwrap());
    assert!(live.get(&svg).await.text.starts_with("<svg"));

    // ‖s·B·A‖² = Σ (A·Aᵀ)∘(Bᵀ·B), in f64 from the files.
    let dir = blob(&live, &format!("yes@{made}")).await;
    let bytes = std::fs::read(dir.join("adapter_model.safetensors")).expect("weights");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    let mut square = 0.0;
    for name in tensors.names().into_iter().filter(|name| name.ends_with("lora_A.weight")) {
        let of = |name: &str| {
            let tensor = tensors.tensor(name).expect("there");
            let values =
                tensor.data().as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
            (tensor.shape().to_vec(), values.collect::<Vec<f64>>())
        };
        let (a_dims, a) = of(name);
        let (b_dims, b) = of(&name.replace("lora_A", "lora_B"));
        for (i, k) in (0..4).flat_map(|i| (0..4).map(move |k| (i, k))) {
            let inner = |at: &dyn Fn(usize) -> f64, n: usize| (0..n).map(at).sum::<f64>();
            let rows = inner(&|x| a[i * a_dims[1] + x] * a[k * a_dims[1] + x], a_dims[1]);
            let columns = inner(&|x| b[x * 4 + i] * b[x * 4 + k], b_dims[0]);
            square += 4.0 * rows * columns; // lora_alpha 8 by rank 4
        }
    }
    let norm = figure(&report["weights"]["norm"]);
    assert!((norm - square.sqrt()).abs() < 1e-5 * norm, "{norm} {}", square.sqrt());
    let rank = figure(&report["weights"]["effective_rank"]);
    assert!((1.0..=4.0).contains(&rank), "{rank}");
    assert!(figure(&report["weights"]["relative_norm"]) > 0.0);
}

#[tokio::test]
async fn what_does_not_hold_stays_a_candidate_and_says_by_how_much() {
    let live = Live::start(&["--versions-kept", "1"]);
    let train = file(&live, "-", &lines(0, 12)).await;
    let valid = file(&live, "-", &lines(20, 6)).await;
    let held = json!({"validation_file": valid});
    let first = done(&live, with(good("yes", &train, json!({})), held.clone())).await;
    let (first, current) = (number(&first), standing(&live, "yes").await.1);
    assert_eq!(current, json!(first), "without a threshold the name moves");

    let gate = json!({"max_negative_flips": 0, "must_beat_current": true, "max_valid_loss": 0.01});
    let worse = done(&live, with(bad("yes", &train, json!({"gate": gate})), held.clone())).await;
    let second = number(&worse);
    let judged = &worse["polylora"]["gate"];
    assert_eq!((&judged["passed"], &judged["promoted"]), (&json!(false), &json!(false)));
    let table = report(&live, &worse).await["evaluation"].clone();
    let scores = table["scores"].as_array().expect("scores");
    let models: Vec<&str> = scores.iter().map(|s| s["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["base", &format!("yes@{first}"), &format!("yes@{second}")]);
    let reasons = judged["reasons"].as_array().expect("reasons");
    let shown = |n: &Value| format!("{:.4}", n.as_f64().expect("a number"));
    let (loss, before) = (shown(&scores[2]["loss"]), shown(&scores[1]["loss"]));
    let flips = table["negative_flips"]["count"].as_u64().expect("a count");
    assert!(flips > 0, "{table}");
    assert_eq!(flips as usize, table["negative_flips"]["lines"].as_array().unwrap().len());
    assert_eq!(
        *reasons,
        [
            format!("valid_loss {loss} is above max_valid_loss 0.01"),
            format!("negative_flips {flips} is above max_negative_flips 0"),
            format!(
                "valid_loss {loss} is above the current version's {before}, and \
                     must_beat_current is set"
            ),
        ]
    );
    let told = told(&live, &worse).await;
    let warned: Vec<&str> = told
        .iter()
        .filter(|e| e["level"] == "warn")
        .filter_map(|e| e["message"].as_str())
        .filter(|m| m.starts_with("The gate refuses"))
        .collect();
    assert_eq!(warned.len(), 1, "{told:?}");
    assert!(reasons.iter().all(|r| warned[0].contains(r.as_str().unwrap())), "{warned:?}");
    // It answers by its number, and the route of rollbacks moves the name to it.
    assert_eq!(standing(&live, "yes").await, (vec![first, second], json!(first)));
    assert_eq!(live.chat(hello(&format!("yes@{second}"), 1)).await.status, 200);
    let moved = live.post("/v1/adapters/yes/rollback", json!({"version": second})).await;
    assert_eq!((moved.status, &moved.json()["current"]), (200, &json!(true)), "{}", moved.text);
}

#[tokio::test]
async fn manual_and_never_leave_the_name_and_a_split_is_enough_to_measure() {
    let live = Live::start(&[]);
    let train = file(&live, "-", &lines(0, 20)).await;
    let gate = json!({"max_loss_ratio_to_base": 0.5});
    let ours = |promote: &str| json!({"gate": gate, "promote": promote, "validation_split": 0.2});
    let manual = done(&live, good("yes", &train, ours("manual"))).await;
    let made = number(&manual);
    assert_eq!(standing(&live, "yes").await, (vec![made], Value::Null));
    let judged = &manual["polylora"]["gate"];
    assert_eq!((&judged["passed"], &judged["promoted"]), (&json!(true), &json!(false)));
    let table = report(&live, &manual).await["evaluation"].clone();
    assert_eq!((&table["examples"], &table["held_out"]), (&json!(4), &json!(4)), "{table}");
    let how = format!("POST /v1/adapters/yes/rollback with {{\"version\": {made}}}");
    let told = told(&live, &manual).await;
    assert!(told.iter().any(|e| e["message"].as_str().is_some_and(|m| m.contains(&how))));
    assert_eq!(live.chat(hello("yes", 1)).await.error(), "404 model_not_found model");
    assert_eq!(live.chat(hello(&format!("yes@{made}"), 1)).await.status, 200);
    let never = done(&live, with(good("yes", &train, ours("never")), json!({"seed": 4}))).await;
    assert_eq!(never["polylora"]["gate"]["passed"], true);
    assert_eq!(standing(&live, "yes").await, (vec![made, number(&never)], Value::Null));
    // What could not be measured is refused before anything is trained.
    let blind = good("yes", &train, json!({"gate": gate}));
    let refused = live.post("/v1/fine_tuning/jobs", blind).await;
    assert_eq!(refused.error(), "400 invalid_value polylora.gate");
}

/// A job with so many examples to be measured by that a test can act meanwhile.
async fn long_measured(live: &Live, name: &str, ours: Value) -> String {
    let train = file(live, "-", &lines(0, 8)).await;
    let valid = file(live, "-", &lines(100, 900)).await;
    let mut order = with(good(name, &train, ours), json!({"validation_file": valid}));
    order["hyperparameters"] = json!({"n_epochs": 2, "batch_size": 4});
    let id = submit(live, order).await;
    let stage = async || job(live, &id).await["polylora"]["stage"].clone();
    live.until("it measures", async || stage().await == "evaluating").await;
    id
}

#[tokio::test]
async fn a_kill_before_the_name_moves_publishes_once_and_passes_no_gate() {
    let mut live = Live::start(&[]);
    for (gate, passes) in [(json!({"max_valid_loss": 1e-6}), false), (json!({}), true)] {
        let name = format!("yes-{passes}");
        assert_eq!(live.upload(&name, 1).await.status, 201);
        let id = long_measured(&live, &name, json!({"gate": gate})).await;
        let (versions, current) = standing(&live, &name).await;
        assert_eq!((versions.len(), current), (2, json!(1)), "a candidate, and nothing moved");
        live = live.crash_and_restart(&[]);
        let job = over(&live, &id).await;
        assert_eq!(
            (&job["status"], &job["polylora"]["restarted"]),
            (&json!("succeeded"), &json!(1))
        );
        assert_eq!(job["polylora"]["gate"]["passed"], passes, "{job}");
        let made = number(&job);
        let (versions, current) = standing(&live, &name).await;
        assert_eq!(versions, [1, made], "published once");
        assert_eq!(current, json!(if passes { made } else { 1 }));
    }
}

#[tokio::test]
async fn a_name_that_moved_meanwhile_is_not_moved_back_and_a_cancelled_job_moves_none() {
    let live = Live::start(&[]);
    let id = long_measured(&live, "yes", json!({})).await;
    assert_eq!(live.upload("yes", 1).await.status, 200);
    let (_, uploaded) = standing(&live, "yes").await;
    let job = over(&live, &id).await;
    let judged = &job["polylora"]["gate"];
    assert_eq!((&judged["passed"], &judged["promoted"]), (&json!(true), &json!(false)), "{job}");
    assert!(judged["reasons"][0].as_str().is_some_and(|r| r.contains("not as expected")), "{job}");
    assert_eq!(standing(&live, "yes").await.1, uploaded);

    let id = long_measured(&live, "other", json!({})).await;
    let cancelled = live.post(&format!("/v1/fine_tuning/jobs/{id}/cancel"), json!({})).await.json();
    assert_eq!(cancelled["status"], "cancelled", "{cancelled}");
    let model = cancelled["fine_tuned_model"].as_str().expect("the candidate");
    assert_eq!(live.chat(hello(model, 1)).await.status, 200);
    assert_eq!(standing(&live, "other").await.1, Value::Null);
    let report = format!("/v1/fine_tuning/jobs/{id}/report");
    assert_eq!(live.get(&report).await.error(), "409 fine_tuning_report_missing id");
}
