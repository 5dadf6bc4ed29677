//! Training jobs: from a file to an adapter that answers, what stops one, and whose it is.

use crate::api::files::{content, upload};
use crate::api::keys::{ask, make};
use reqwest::Method;
use serde_json::{Value, json};
use std::time::Instant;
use support::command::polylora;
use support::live::{BASE, Live, hello, whole, with};

const JOBS: &str = "/v1/fine_tuning/jobs";

/// Examples, each different. The tiny model's chat template has no end of a turn to learn, so
/// they are completions.
fn lines(n: usize) -> String {
    let line = |n| format!("{}\n", json!({"prompt": format!("{n}?"), "completion": " yes"}));
    (0..n).map(line).collect()
}

/// Uploads examples as an operator; the file's id.
async fn file(live: &Live, text: &str) -> String {
    id_of(&upload(live, "-", "train.jsonl", text).await)
}

fn id_of(object: &Value) -> String {
    object["id"].as_str().expect("an id").to_owned()
}

/// An order of two epochs in batches of four, at a rate that shows.
fn order(file: &str, name: &str, more: Value) -> Value {
    let hyperparameters = json!({"n_epochs": 2, "batch_size": 4});
    let method = json!({"type": "supervised", "supervised": {"hyperparameters": hyperparameters}});
    let order = json!({"model": BASE, "training_file": file, "suffix": name, "method": method,
                       "seed": 7, "polylora": {"r": 4, "lr": 0.01}});
    with(order, more)
}

/// One that goes on until somebody ends it.
fn endless(file: &str, name: &str) -> Value {
    let hyperparameters = json!({"n_epochs": 50, "batch_size": 1});
    order(
        file,
        name,
        json!({"method": {"type": "supervised", "supervised":
        {"hyperparameters": hyperparameters}}}),
    )
}

async fn submit(live: &Live, order: Value) -> String {
    let answer = live.post(JOBS, order).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    id_of(&answer.json())
}

async fn job(live: &Live, id: &str) -> Value {
    live.get(&format!("{JOBS}/{id}")).await.json()
}

async fn over(live: &Live, id: &str) -> Value {
    let is = |job: &Value| ["succeeded", "failed", "cancelled"].iter().any(|s| job["status"] == *s);
    live.until("the job is over", async || is(&job(live, id).await)).await;
    job(live, id).await
}

async fn done(live: &Live, order: Value) -> Value {
    let id = submit(live, order).await;
    let job = over(live, &id).await;
    assert_eq!((&job["status"], &job["error"]), (&json!("succeeded"), &Value::Null), "{job}");
    job
}

async fn stepped(live: &Live, id: &str) {
    live.until("it trains", async || job(live, id).await["polylora"]["step"].as_u64() > Some(2))
        .await;
}

/// All events, oldest first.
async fn events(live: &Live, id: &str) -> Vec<Value> {
    let page = live.get(&format!("{JOBS}/{id}/events?limit=100")).await.json();
    assert_eq!(page["has_more"], false, "few enough for a page");
    let mut all = page["data"].as_array().expect("events").clone();
    all.reverse();
    all
}

async fn digest(live: &Live, version: &Value) -> Value {
    let (name, number) = version.as_str().expect("a version").split_once('@').expect("name@n");
    let shown = live.get(&format!("/v1/adapters/{name}")).await.json();
    let versions = shown["versions"].as_array().expect("versions");
    let found = versions.iter().find(|v| v["version"].as_u64() == number.parse().ok());
    found.unwrap_or_else(|| panic!("{version} of {shown}"))["digest"].clone()
}

#[tokio::test]
async fn a_file_becomes_an_adapter_and_every_epoch_a_version_of_it() {
    let live = Live::start(&[]);
    let (training, held) = (file(&live, &lines(12)).await, file(&live, &lines(3)).await);
    let done = done(&live, order(&training, "house", json!({"validation_file": held}))).await;
    assert_eq!(done["fine_tuned_model"], "house@2", "{done}");
    assert_eq!(done["hyperparameters"]["n_epochs"], 2);
    assert_eq!(done["polylora"]["resolved"]["rank"], 4);
    let id = id_of(&done);

    let told = events(&live, &id).await;
    let steps: Vec<&Value> =
        told.iter().map(|e| &e["data"]).filter(|d| d["step"].is_u64()).collect();
    assert_eq!(steps.iter().map(|d| d["step"].clone()).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    let loss = |i: usize| steps[i]["train_loss"].as_f64().expect("a loss");
    assert!(loss(5) < loss(0), "it learns: {told:#?}");
    let measured = |i: usize| steps[i]["full_valid_loss"].is_f64();
    assert_eq!((0..6).filter(|i| measured(*i)).collect::<Vec<_>>(), [2, 5], "at epochs' ends");
    let warned = told.iter().any(|e| {
        e["level"] == "warn"
            && e["message"].as_str().is_some_and(|m| m.contains("3 lines of the training file"))
    });
    assert!(warned, "{told:#?}");
    let streamed = live.get(&format!("{JOBS}/{id}/events?stream=true")).await.text;
    let streamed: Vec<&str> = streamed.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    let parsed = |text: &&str| serde_json::from_str::<Value>(text).ok();
    assert_eq!(streamed.iter().filter_map(parsed).collect::<Vec<_>>(), told);
    assert_eq!(streamed.last(), Some(&"[DONE]"));

    let page = live.get(&format!("{JOBS}/{id}/checkpoints")).await.json();
    let checkpoint = &page["data"][0];
    assert_eq!((&checkpoint["step_number"], &page["data"][1]), (&json!(3), &Value::Null), "{page}");
    assert_eq!(checkpoint["metrics"]["step"], 3);
    let mut answers = Vec::new();
    for model in [BASE, "house@1", "house@2", "house"] {
        let answer = live.chat(with(hello(model, 24), json!({"temperature": 0}))).await;
        assert_eq!(answer.status, 200, "{model}: {}", answer.text);
        answers.push(answer.json()["choices"][0]["message"]["content"].clone());
    }
    assert_eq!(answers[2], answers[3], "the name means the result");
    assert_ne!(answers[0], answers[3], "which is not the base");

    let csv = content(&live, "-", done["result_files"][0].as_str().expect("a file")).await.text;
    assert_eq!(csv.lines().count(), 7, "{csv}");
    assert!(csv.starts_with("step,train_loss,train_accuracy,valid_loss,"), "{csv}");
    assert_eq!(done["trained_tokens"].as_u64(), steps.iter().map(|d| d["tokens"].as_u64()).sum());
    let lineage = live.get("/v1/adapters/house").await.json()["versions"][1]["lineage"].clone();
    assert_eq!(lineage["job"], json!(id), "{lineage}");
}

#[tokio::test]
async fn the_command_line_makes_the_same_bytes_as_the_server() {
    let live = Live::start(&[]);
    let text = lines(9);
    let training = file(&live, &text).await;
    let made = done(&live, order(&training, "house", json!({}))).await;
    let data = live.data().join("lines.jsonl");
    std::fs::write(&data, text).expect("a file");
    let out = live.data().join("out");
    // The config names the base as it is called.
    let model = live.data().with_file_name("model");
    let named = model.with_file_name(BASE);
    std::fs::create_dir(&named).expect("a directory");
    for file in std::fs::read_dir(model).expect("a model").flatten() {
        std::fs::copy(file.path(), named.join(file.file_name())).expect("a copy");
    }
    let [from, to, base] = [&data, &out, &named].map(|path| path.to_str().expect("UTF-8"));
    let said = polylora(&[
        "train",
        from,
        "--out",
        to,
        "--model",
        base,
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--rank",
        "4",
        "--learning-rate",
        "0.01",
        "--seed",
        "7",
    ]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let digest = digest(&live, &made["fine_tuned_model"]).await;
    assert!(said.trim().ends_with(digest.as_str().expect("a digest")), "{said} {digest}");
    let table = std::fs::read_to_string(out.join("training_steps.csv")).expect("a table");
    assert_eq!(table.lines().count(), 7, "{table}");
}

#[tokio::test]
async fn a_paused_job_goes_on_after_a_kill_and_comes_to_the_same_bytes() {
    let live = Live::start(&[]);
    let training = file(&live, &lines(40)).await;
    let order = |name: &str| {
        let hyperparameters = json!({"n_epochs": 6, "batch_size": 1});
        let method = json!({"type": "supervised", "supervised":
            {"hyperparameters": hyperparameters}});
        order(&training, name, json!({"method": method}))
    };
    let whole = done(&live, order("whole")).await;
    let id = submit(&live, order("parts")).await;
    stepped(&live, &id).await;
    let paused = live.post(&format!("{JOBS}/{id}/pause"), json!({})).await.json();
    assert_eq!(
        (&paused["status"], &paused["polylora"]["paused"]),
        (&json!("queued"), &json!(true))
    );
    let again = live.post(&format!("{JOBS}/{id}/pause"), json!({})).await;
    assert_eq!(again.error(), "409 fine_tuning_job_over id");
    let kept = || live.data().join("training").join(&id).exists();
    live.until("what it did is kept", async || kept()).await;
    let live = live.crash_and_restart(&[]);
    assert_eq!(job(&live, &id).await["polylora"]["paused"], true, "it waits after a restart too");
    live.post(&format!("{JOBS}/{id}/resume"), json!({})).await;
    let parts = over(&live, &id).await;
    assert_eq!(parts["status"], "succeeded", "{parts}");
    let [a, b] = [&whole, &parts].map(|job| job["fine_tuned_model"].clone());
    assert_eq!(digest(&live, &a).await, digest(&live, &b).await);
    let mut told = Vec::new();
    let mut after = String::new();
    loop {
        let page = live.get(&format!("{JOBS}/{id}/events?limit=100{after}")).await.json();
        let events = page["data"].as_array().expect("events").clone();
        after = format!("&after={}", events.last().expect("one")["id"].as_str().expect("an id"));
        told.extend(events);
        if page["has_more"] == false {
            break;
        }
    }
    let went_on = |e: &&Value| e["message"].as_str().is_some_and(|m| m.starts_with("Going on"));
    assert_eq!(told.iter().filter(went_on).count(), 1, "{told:#?}");
    let mut steps: Vec<u64> = told.iter().filter_map(|e| e["data"]["step"].as_u64()).collect();
    steps.reverse();
    assert_eq!(steps, (1..=240).collect::<Vec<_>>(), "every step is told once");
    assert!(!live.data().join("training").join(&id).exists(), "nothing is left of its state");
}

#[tokio::test]
async fn a_job_goes_on_from_a_version_with_its_shape() {
    let live = Live::start(&[]);
    let training = file(&live, &lines(12)).await;
    let first = done(&live, order(&training, "house", json!({}))).await;
    let ours = |more: Value| json!({"polylora": with(json!({"lr": 0.01}), more)});
    let of = |name: &str, more: Value| {
        with(order(&training, name, ours(more)), json!({"model": "house@2"}))
    };
    let wrong = live.post(JOBS, of("more", json!({"r": 8}))).await;
    assert_eq!(wrong.error(), "400 invalid_value polylora.r", "{}", wrong.text);
    let wrong = live.post(JOBS, of("more", json!({"lora_alpha": 8}))).await;
    assert_eq!(wrong.error(), "400 invalid_value polylora.lora_alpha");
    let more = done(&live, of("more", json!({}))).await;
    assert_eq!(more["polylora"]["resolved"]["rank"], 4, "{more}");
    let losses = async |job: &Value| {
        let told = events(&live, &id_of(job)).await;
        let loss = |e: &Value| e["data"]["train_loss"].as_f64();
        told.iter().filter_map(loss).collect::<Vec<f64>>()
    };
    let (first, more_losses) = (losses(&first).await, losses(&more).await);
    let gained = first[0] - more_losses[0];
    assert!(gained > 0.0, "it begins where the other ended: {first:?} {more_losses:?}");
    let shown = live.get("/v1/adapters/more").await.json();
    assert_eq!(shown["versions"][1]["lineage"]["from"]["id"], "house@2", "{shown}");
    // What a version is made of may go; the job has it until it is over.
    let id = submit(&live, of("third", json!({}))).await;
    live.request(Method::DELETE, "/v1/adapters/house").send().await.expect("an answer");
    assert_eq!(over(&live, &id).await["status"], "succeeded");
    let gone = live.post(JOBS, of("fourth", json!({}))).await;
    assert_eq!(gone.error(), "404 model_not_found model");
}

#[tokio::test]
async fn every_method_makes_an_adapter_of_its_own() {
    let live = Live::start(&[]);
    let training = file(&live, &lines(12)).await;
    let mut made = Vec::new();
    for (i, ours) in [
        json!({}),
        json!({"use_dora": true}),
        json!({"use_rslora": true}),
        json!({"loraplus_lr_ratio": 16.0}),
        json!({"freeze_a": true}),
        json!({"nested_ranks": true}),
        json!({"optim": "lion"}),
        json!({"optim": "adafactor"}),
        json!({"optim": "frugal"}),
        json!({"init_lora_weights": "eva"}),
        json!({"target_modules": ["q_proj", "v_proj"]}),
        json!({"lr_scheduler_type": "cosine", "warmup_ratio": 0.5}),
        json!({"weight_decay": 0.5, "max_grad_norm": 0.01}),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("way-{i}");
        let ours = json!({"polylora": with(json!({"r": 4, "lr": 0.01}), ours)});
        let job = done(&live, order(&training, &name, ours)).await;
        let (digest, seen) = (digest(&live, &job["fine_tuned_model"]).await, &made);
        assert!(!seen.contains(&digest), "an option that does nothing: {job}");
        made.push(digest);
        let answer = live.chat(hello(&name, 4)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

#[tokio::test]
async fn a_job_that_is_killed_at_any_moment_comes_to_the_same_bytes_once() {
    let mut live = Live::start(&[]);
    let training = file(&live, &lines(24)).await;
    let order = |name: &str| order(&training, name, json!({}));
    let begun = Instant::now();
    let whole = done(&live, order("whole")).await;
    let took = begun.elapsed();
    let expected = digest(&live, &whole["fine_tuned_model"]).await;
    let rounds = support::soak::rounds(3, 50);
    for round in 0..rounds {
        let name = format!("killed-{round}");
        let id = submit(&live, order(&name)).await;
        // From the first moment to a little after the last.
        tokio::time::sleep(took * 5 * (round as u32 + 1) / (4 * rounds as u32)).await;
        live = live.crash_and_restart(&[]);
        let done = over(&live, &id).await;
        assert_eq!(done["status"], "succeeded", "{done}");
        assert_eq!(digest(&live, &done["fine_tuned_model"]).await, expected, "{done}");
        let shown = live.get(&format!("/v1/adapters/{name}")).await.json();
        let versions = shown["versions"].as_array().expect("versions").iter();
        let steps: Vec<Value> = versions.map(|v| v["lineage"]["step"].clone()).collect();
        assert_eq!(steps, [json!(6), Value::Null], "a checkpoint and a result: {shown}");
        let told = events(&live, &id).await;
        let steps: Vec<u64> = told.iter().filter_map(|e| e["data"]["step"].as_u64()).collect();
        assert_eq!(steps, (1..=12).collect::<Vec<_>>(), "every step is told once");
    }
}

#[tokio::test]
async fn a_job_that_is_cancelled_leaves_its_checkpoints_and_no_name() {
    let live = Live::start(&[]);
    let training = file(&live, &lines(8)).await;
    let id = submit(&live, endless(&training, "gone")).await;
    let two = submit(&live, endless(&training, "two")).await;
    live.until("an epoch is over", async || live.get("/v1/adapters/gone").await.status == 200)
        .await;
    let path = format!("/v1/files/{training}");
    let removed = ask(&live, Method::DELETE, &path, "-", Value::Null).await;
    assert_eq!(removed.error(), "409 file_in_use -");
    let cancelled = live.post(&format!("{JOBS}/{id}/cancel"), json!({})).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    let again = live.post(&format!("{JOBS}/{id}/cancel"), json!({})).await;
    assert_eq!(again.error(), "409 fine_tuning_job_over id");
    // The half-trained never answers by the bare name; its versions do by number.
    assert_eq!(live.chat(hello("gone", 4)).await.error(), "404 model_not_found model");
    assert_eq!(live.chat(hello("gone@1", 4)).await.status, 200);
    let rolled = live.post("/v1/adapters/gone/rollback", json!({"version": 1})).await;
    assert_eq!(rolled.status, 200, "{}", rolled.text);
    assert_eq!(live.chat(hello("gone", 4)).await.status, 200, "until somebody says so");
    let removed = whole(live.request(Method::DELETE, "/v1/adapters/gone")).await;
    assert_eq!(removed.json()["deleted"], true, "{}", removed.text);
    live.post(&format!("{JOBS}/{two}/cancel"), json!({})).await;
    over(&live, &two).await;
    let removed = ask(&live, Method::DELETE, &path, "-", Value::Null).await;
    assert_eq!(removed.status, 200, "{}", removed.text);
}

#[tokio::test]
async fn a_name_moves_only_when_it_is_meant_to() {
    let live = Live::start(&[]);
    assert_eq!(live.upload("house", 3).await.status, 201);
    let training = file(&live, &lines(8)).await;
    let manual = json!({"polylora": {"r": 4, "lr": 0.01, "promote": "manual"}});
    let made = done(&live, order(&training, "house", manual)).await;
    let shown = live.get("/v1/adapters/house").await.json();
    assert_eq!((&shown["current"], &made["fine_tuned_model"]), (&json!(1), &json!("house@3")));
    let made = done(&live, order(&training, "house", json!({}))).await;
    assert_eq!(made["fine_tuned_model"], "house@5", "{made}");
    assert_eq!(live.get("/v1/adapters/house").await.json()["current"], 5);
    // The version before is what served before, not a checkpoint.
    let rolled = live.post("/v1/adapters/house/rollback", json!({})).await.json();
    assert!(rolled["version"] == 1 || rolled["version"] == 3, "{rolled}");
}

#[tokio::test]
async fn what_cannot_be_trained_is_refused_or_fails_by_name() {
    let live = Live::start(&[]);
    let training = file(&live, &lines(8)).await;
    let refused = async |order: Value| live.post(JOBS, order).await.error();
    let plain = |more: Value| order(&training, "house", more);
    assert_eq!(refused(plain(json!({"model": "nobody"}))).await, "404 model_not_found model");
    let missing = plain(json!({"training_file": "file-1"}));
    assert_eq!(refused(missing).await, "404 file_not_found training_file");
    let empty = plain(json!({"suffix": "a b"}));
    assert_eq!(refused(empty).await, "400 invalid_name suffix");
    let wide = plain(json!({"polylora": {"r": 300}}));
    assert_eq!(refused(wide).await, "400 invalid_value polylora.r");
    let unknown = plain(json!({"polylora": {"rank": 3}}));
    assert!(refused(unknown).await.starts_with("400 "));
    assert_eq!(refused(plain(json!({"n": 3}))).await, "400 unknown_parameter n");
    let bad = upload(&live, "-", "bad.jsonl", "{\"messages\": []}\n").await;
    assert_eq!(bad["status"], "error");
    let unread = plain(json!({"training_file": bad["id"]}));
    assert_eq!(refused(unread).await, "400 invalid_training_file training_file");

    let fails = async |order: Value| {
        let id = submit(&live, order).await;
        let job = over(&live, &id).await;
        assert_eq!(job["status"], "failed", "{job}");
        job["error"].clone()
    };
    // What only a tokenizer can find.
    let long = json!({"prompt": "a", "completion": "b ".repeat(20_000)});
    let long = file(&live, &format!("{}{long}\n", lines(2))).await;
    let error = fails(plain(json!({"training_file": long}))).await;
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("invalid_training_file"), &json!("training_file"))
    );
    assert!(error["message"].as_str().is_some_and(|m| m.contains("line 3")), "{error}");
    let dpo = plain(json!({"method": {"type": "dpo"}}));
    assert_eq!(fails(dpo).await["code"], "invalid_training_file");
    // Factors grow by the rate with every step, until gate times up overflows.
    let wild = json!({"polylora": {"lr": 10.0, "max_grad_norm": 0.0, "lora_alpha": 1e6}});
    let error = fails(with(endless(&training, "house"), wild)).await;
    assert_eq!(error["code"], "non_finite_loss", "{error}");
    assert_eq!(live.chat(hello(BASE, 4)).await.status, 200);
}

#[tokio::test]
async fn nobody_sees_another_tenants_jobs() {
    let live = Live::start(&["--api-key", "secret"]);
    let key = async |tenant: &str| {
        let body = json!({"tenant": tenant, "scopes": ["admin", "inference"],
                          "adapters": [format!("{tenant}-*")]});
        make(&live, body).await.0
    };
    let (acme, globex) = (key("acme").await, key("globex").await);
    let training = id_of(&upload(&live, &acme, "train.jsonl", &lines(8)).await);
    let order = order(&training, "acme-house", json!({}));
    let foreign = ask(&live, Method::POST, JOBS, &globex, order.clone()).await;
    assert_eq!(foreign.error(), "403 name_not_allowed suffix");
    let foreign = with(order.clone(), json!({"suffix": "globex-house"}));
    let foreign = ask(&live, Method::POST, JOBS, &globex, foreign).await;
    assert_eq!(foreign.error(), "404 file_not_found training_file");
    let made = ask(&live, Method::POST, JOBS, &acme, order).await;
    assert_eq!(made.status, 200, "{}", made.text);
    let id = id_of(&made.json());
    for (method, rest) in [
        (Method::GET, ""),
        (Method::GET, "/events"),
        (Method::GET, "/events?stream=true"),
        (Method::GET, "/checkpoints"),
        (Method::POST, "/pause"),
        (Method::POST, "/resume"),
        (Method::POST, "/cancel"),
    ] {
        let route = format!("{JOBS}/{id}{rest}");
        let answer = ask(&live, method, &route, &globex, Value::Null).await;
        assert_eq!(answer.error(), "404 fine_tuning_job_not_found id", "{rest}");
    }
    assert_eq!(ask(&live, Method::GET, JOBS, &globex, Value::Null).await.json()["data"], json!([]));
    live.until("it is over", async || {
        let shown = ask(&live, Method::GET, &format!("{JOBS}/{id}"), &acme, Value::Null).await;
        shown.json()["status"] == "succeeded"
    })
    .await;
    let shown = ask(&live, Method::GET, &format!("{JOBS}/{id}"), &acme, Value::Null).await.json();
    // The table is its tenant's, too.
    let table = shown["result_files"][0].as_str().expect("a file").to_owned();
    assert_eq!(content(&live, &acme, &table).await.status, 200);
    assert_eq!(content(&live, &globex, &table).await.error(), "404 file_not_found id");
}

#[tokio::test]
async fn a_preview_shows_what_is_learnt() {
    let live = Live::start(&[]);
    let training = file(&live, &lines(8)).await;
    let page = live.get(&format!("/v1/files/{training}/preview?limit=2")).await.json();
    let examples = page["data"].as_array().expect("examples");
    assert_eq!(examples.len(), 2, "{page}");
    let spans = examples[1]["spans"].as_array().expect("spans");
    let learnt = |s: &&Value| s["supervised"] == true;
    let learnt: String = spans.iter().filter(learnt).filter_map(|s| s["text"].as_str()).collect();
    assert!(learnt.starts_with(" yes"), "{page}");
    let wrong = live.get(&format!("/v1/files/{training}/preview?method=dpo")).await;
    assert_eq!(wrong.status, 400, "{}", wrong.text);
    let wrong = live.get(&format!("/v1/files/{training}/preview?limit=0")).await;
    assert_eq!(wrong.error(), "400 invalid_value limit");
}
