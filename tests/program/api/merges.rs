//! Merges ordered over HTTP: what comes out, what is told on the way, what is refused.

use crate::api::keys::{ask, make, upload_as};
use polylora::config::limits::MERGES_MAX;
use reqwest::Method;
use reqwest::multipart::Part;
use serde_json::{Value, json};
use support::command::{out, polylora, refused};
use support::live::{Answer, BASE, Live, form, hello, rest, whole, with};

/// Names as the command would call the directories, so that DARE draws alike.
pub const SOURCES: [(&str, u64); 2] = [("adapter-4-1-0.3", 1), ("adapter-4-2-0.3", 2)];

pub async fn upload_sources(live: &Live) {
    for (name, seed) in SOURCES {
        assert_eq!(live.upload(name, seed).await.status, 201);
    }
}

/// An order for the two sources.
pub fn order(name: &str, more: Value) -> Value {
    let sources = json!([{"model": SOURCES[0].0, "weight": 0.7},
                         {"model": SOURCES[1].0, "weight": 0.4}]);
    with(json!({"sources": sources, "name": name}), more)
}

/// One that takes seconds: many units, many starts.
pub fn slow(name: &str) -> Value {
    let ways = ["", "@1"].iter().flat_map(|at| SOURCES.map(|(s, _)| format!("{s}{at}")));
    let ways = ways.flat_map(|s| [s.clone(), format!("{BASE}:{s}")]);
    let sources: Vec<Value> = ways.map(|s| json!({"model": s})).collect();
    let options = json!({"rank": 16, "restarts": 1000});
    json!({"sources": sources, "name": name, "method": "lego", "options": options})
}

/// Keeps the server at a long answer until it is dropped: a merge then rests after its first site.
pub fn occupied(live: &Live) -> std::net::TcpStream {
    let body = with(hello(BASE, 16_000), json!({"stream": true}));
    live.socket("POST /v1/chat/completions", &body.to_string())
}

pub async fn submit(live: &Live, order: Value) -> String {
    let answer = live.post("/v1/merges", order).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    let job = answer.json();
    assert_eq!((&job["object"], &job["state"]), (&json!("merge"), &json!("queued")));
    job["id"].as_str().expect("an id").to_owned()
}

pub async fn job(live: &Live, id: &str) -> Value {
    live.get(&format!("/v1/merges/{id}")).await.json()
}

/// Waits until a job is over.
pub async fn over(live: &Live, id: &str) -> Value {
    let is = |job: &Value| ["done", "failed", "cancelled"].iter().any(|s| job["state"] == *s);
    live.until("the merge is over", async || is(&job(live, id).await)).await;
    job(live, id).await
}

pub async fn done(live: &Live, order: Value) -> Value {
    let id = submit(live, order).await;
    let job = over(live, &id).await;
    assert_eq!((&job["state"], &job["error"]), (&json!("done"), &Value::Null), "{job}");
    job
}

/// What the command makes of the same: its digest, the last word that it says.
fn offline(live: &Live, out_dir: &std::path::Path, more: &[&str]) -> String {
    let weighted = SOURCES.iter().zip(["0.7", "0.4"]);
    let sources: Vec<String> = weighted
        .map(|((_, seed), w)| format!("{}={w}", live.adapter_files(*seed, 0.3).display()))
        .collect();
    let to = out_dir.display().to_string();
    let said = polylora(&[&["merge", &sources[0], &sources[1], "--out", &to], more].concat());
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    out(&said).split_whitespace().last().expect("a digest").to_owned()
}

#[tokio::test]
async fn a_merge_over_http_is_the_commands_bit_for_bit_and_serves_at_once() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let dir = tempfile::tempdir().expect("directory");
    for (name, fields, flags) in [
        ("best", json!({}), &[][..]),
        ("all", json!({"method": "cat"}), &["--method", "cat"][..]),
        (
            "units",
            json!({"method": "lego", "seed": 7, "options": {"rank": 3, "plain_centroids": true}}),
            &["--method", "lego", "--seed", "7", "--rank", "3", "--plain-centroids"][..],
        ),
        (
            "thin",
            json!({"method": "dare_ties", "seed": 3, "options": {"density": 0.4}}),
            &["--method", "dare_ties", "--seed", "3", "--density", "0.4"][..],
        ),
        (
            "spread",
            json!({"options": {"rank": 3, "spread": true}}),
            &["--rank", "3", "--spread"][..],
        ),
    ] {
        let job = done(&live, order(name, fields)).await;
        let digest = offline(&live, &dir.path().join(name), flags);
        assert_eq!(job["result"], json!({"id": format!("{name}@1"), "digest": digest}));
        assert_eq!(job["progress"]["done"], job["progress"]["total"]);
        let answer = live.chat(hello(name, 2)).await;
        assert_eq!((answer.status, answer.header("x-polylora-digest")), (200, &*digest));
        let shown = live.get(&format!("/v1/adapters/{name}")).await.json();
        let lineage = &shown["versions"][0]["lineage"];
        assert_eq!((&lineage["kind"], &lineage["job"]), (&json!("merged"), &job["id"]));
        assert_eq!(lineage["from"][0]["id"], "adapter-4-1-0.3@1");
        assert_eq!(lineage["from"][1]["weight"], 0.4);
        // The report is the command's, but for the evaluation.
        let mut report = live.get(&report_of(&job)).await.json();
        assert_eq!(
            report.as_object_mut().expect("an object").remove("evaluation"),
            Some(json!(null))
        );
        let file = dir.path().join(name).join("merge_report.json");
        let file = std::fs::read_to_string(file).expect("the report");
        assert_eq!(report, serde_json::from_str::<Value>(&file).expect("JSON"), "{name}");
    }
    let list = live.get("/v1/merges").await.json();
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|j| j["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["spread", "thin", "units", "all", "best"]);
    // The same again is the same version.
    assert_eq!(done(&live, order("best", json!({}))).await["result"]["id"], "best@1");
}

pub fn report_of(job: &Value) -> String {
    format!("/v1/merges/{}/report", job["id"].as_str().expect("an id"))
}

#[tokio::test]
async fn a_report_is_a_picture_for_whoever_asks_for_one() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let path = report_of(&done(&live, order("both", json!({}))).await);
    let by_query = live.get(&format!("{path}?format=svg")).await;
    assert_eq!((by_query.status, by_query.header("content-type")), (200, "image/svg+xml"));
    assert!(by_query.text.starts_with("<svg") && by_query.text.contains("q_proj"));
    let by_header = live.request(Method::GET, &path).header("accept", "image/svg+xml,*/*");
    assert_eq!(whole(by_header).await.text, by_query.text);
    let json = live.request(Method::GET, &format!("{path}?format=json"));
    let json = whole(json.header("accept", "image/svg+xml")).await.json();
    assert_eq!(json["overall"]["sites"], 6);
    let wrong = live.get(&format!("{path}?format=png")).await;
    assert_eq!(wrong.error(), "400 invalid_value format");
}

#[tokio::test]
async fn events_tell_the_way_of_a_merge_in_order_and_end_with_it() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let busy = occupied(&live);
    let first = submit(&live, slow("one")).await;
    let id = submit(&live, order("two", json!({}))).await;
    let socket = live.socket(&format!("GET /v1/merges/{id}/events"), "");
    let cancelled = live.post(&format!("/v1/merges/{first}/cancel"), json!({})).await;
    assert_eq!(cancelled.status, 200, "{}", cancelled.text);
    drop(busy);
    let (head, body) = tokio::task::spawn_blocking(|| rest(socket)).await.expect("read");
    assert!(head.contains("text/event-stream"), "{head}");
    let events: Vec<(String, Value)> = body
        .split("\n\n")
        .filter(|frame| frame.starts_with("event: "))
        .map(|frame| {
            let (name, data) = frame.split_once("\ndata: ").expect("a name and data");
            (name["event: ".len()..].to_owned(), serde_json::from_str(data).expect("JSON"))
        })
        .collect();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let rank = |name: &&str| ["queued", "running", "done"].iter().position(|n| n == name);
    assert!(names.is_sorted_by_key(rank), "{names:?}");
    assert_eq!((names[0], names[names.len() - 1]), ("queued", "done"), "{names:?}");
    assert!(events.iter().all(|(name, job)| job["state"] == **name && job["id"] == *id));
    let sites = |job: &Value| job["progress"]["done"].as_u64().unwrap_or(0);
    assert!(events.iter().map(|(_, job)| sites(job)).is_sorted(), "{body}");
    // Whoever comes after the end is told the end.
    let (_, late) = rest(live.socket(&format!("GET /v1/merges/{id}/events"), ""));
    assert_eq!(late.matches("event: ").count(), 1);
    assert!(late.starts_with("event: done\n"), "{late}");
}

#[tokio::test]
async fn what_waits_or_runs_can_be_cancelled_and_leaves_nothing() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let busy = occupied(&live);
    let names: Vec<String> = (1..=MERGES_MAX).map(|n| format!("sum-{n}")).collect();
    let mut ids = Vec::new();
    for name in &names {
        ids.push(submit(&live, slow(name)).await);
    }
    let full = live.post("/v1/merges", order("more", json!({}))).await;
    assert_eq!(full.error(), "429 merge_queue_full -");
    assert!(!full.header("retry-after").is_empty());
    live.until("the first runs", async || job(&live, &ids[0]).await["state"] == "running").await;
    assert_eq!(job(&live, &ids[1]).await["state"], "queued");
    ids.swap(0, 1);
    for id in &ids {
        let early = live.get(&format!("/v1/merges/{id}/report")).await;
        assert_eq!(early.error(), "409 merge_report_missing id");
        let path = format!("/v1/merges/{id}/cancel");
        let cancelled = live.post(&path, json!({})).await;
        assert_eq!((cancelled.status, &cancelled.json()["state"]), (200, &json!("cancelled")));
        assert_eq!(live.post(&path, json!({})).await.error(), "409 merge_over id");
    }
    drop(busy);
    // The place is free again, and the name was never made.
    let next = done(&live, order("more", json!({}))).await;
    let path = format!("/v1/merges/{}/cancel", next["id"].as_str().unwrap());
    assert_eq!(live.post(&path, json!({})).await.error(), "409 merge_over id");
    for name in names {
        assert_eq!(live.get(&format!("/v1/adapters/{name}")).await.status, 404);
    }
    live.until("staging is empty", async || staged(&live) == 0).await;
}

/// Directories of publications under way.
pub fn staged(live: &Live) -> usize {
    std::fs::read_dir(live.data().join("staging")).expect("staging").count()
}

#[tokio::test]
async fn an_order_that_cannot_be_is_refused_before_there_is_a_job() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let dora = live.adapter_files(3, 0.3);
    spoil(&dora);
    let put = live.request(Method::PUT, "/v1/adapters/biased").multipart(form(&dora));
    let put = whole(put).await;
    assert_eq!(put.status, 201, "{}", put.text);
    let alias = json!({"weights": {"adapter-4-1-0.3@1": 1}});
    let alias = live.request(Method::PUT, "/v1/aliases/lead").json(&alias);
    assert_eq!(whole(alias).await.status, 201);
    let source = |model: &str| json!({"sources": [{"model": model}]});
    let sources = |all: Value| json!({"sources": all});
    let options = |o: Value| json!({"options": o});
    let example = json!({"messages": [{"role": "user", "content": "hi"}]});
    for (more, expected) in [
        (json!({"sources": null}), "400 missing_parameter sources"),
        (json!({"name": null}), "400 missing_parameter name"),
        (sources(json!([])), "400 invalid_merge sources"),
        (sources(json!([{"weight": 1}])), "400 missing_parameter model"),
        (sources(json!([{"model": 1}])), "400 invalid_type sources[0].model"),
        (source("none"), "404 model_not_found sources[0].model"),
        (source("adapter-4-1-0.3@9"), "404 model_not_found sources[0].model"),
        (source(BASE), "400 invalid_merge sources[0].model"),
        (source("biased"), "422 not_mergeable -"),
        (json!({"method": "sum"}), "400 invalid_merge method"),
        (json!({"method": "slerp"}), "400 invalid_merge sources"),
        (options(json!({"rank": 0})), "400 invalid_merge options.rank"),
        (options(json!({"density": 2})), "400 invalid_merge options.density"),
        (options(json!({"spread": true})), "400 invalid_merge options.spread"),
        (options(json!({"restarts": 0})), "400 invalid_merge options.restarts"),
        (options(json!({"units": "odd"})), "400 invalid_type options.units"),
        (options(json!({"rnak": 4})), "400 invalid_type options.rnak"),
        (json!({"seed": -1}), "400 invalid_type seed"),
        (json!({"sauces": []}), "400 unknown_parameter sauces"),
        (json!({"name": "../x"}), "400 invalid_name name"),
        (json!({"name": BASE}), "400 invalid_name name"),
        (json!({"name": "lead"}), "409 name_taken name"),
        (
            json!({"evaluation": [{"model": "none", "data": [example]}]}),
            "400 invalid_value evaluation[0].model",
        ),
        (
            json!({"evaluation": [{"model": SOURCES[0].0, "data": []}]}),
            "400 invalid_value evaluation[0].data",
        ),
        (
            json!({"evaluation": [{"model": SOURCES[0].0, "data": [example]}]}),
            "400 invalid_value evaluation[0].data[0].messages",
        ),
    ] {
        let answer = live.post("/v1/merges", with(order("out", json!({})), more.clone())).await;
        assert_eq!(answer.error(), expected, "{more}: {}", answer.text);
    }
    assert_eq!(live.get("/v1/merges").await.json()["data"], json!([]));
    assert_eq!(live.get("/v1/merges/no").await.error(), "404 merge_not_found id");
    // An alias is the version that it leads to.
    let job = done(&live, with(order("out", json!({})), source("lead"))).await;
    assert_eq!(job["sources"][0]["id"], "adapter-4-1-0.3@1");
}

/// Gives a random adapter a bias beside one of its factors: no product of two factors.
fn spoil(dir: &std::path::Path) {
    let path = dir.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("config");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["use_dora"] = json!(true);
    std::fs::write(&path, config.to_string()).expect("written");
    let path = dir.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).expect("tensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    let mut all: Vec<(String, safetensors::tensor::TensorView<'_>)> = file.tensors();
    let ones: Vec<u8> = [1f32.to_le_bytes(); 64].concat();
    let magnitudes: Vec<String> = all
        .iter()
        .filter_map(|(name, _)| {
            Some(format!("{}.lora_magnitude_vector", name.strip_suffix(".lora_A.weight")?))
        })
        .collect();
    for name in magnitudes {
        let ones = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![64], &ones);
        all.push((name, ones.expect("a tensor")));
    }
    let bytes = safetensors::serialize(all, None).expect("serialized");
    std::fs::write(&path, bytes).expect("written");
}

#[tokio::test]
async fn a_survey_tells_the_same_over_http_and_offline_and_makes_nothing() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let answer = live.post("/v1/merges", order("both", json!({"dry_run": true}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let survey = answer.json();
    let sites = survey["sites"].as_array().expect("sites");
    assert_eq!(sites.len(), 6);
    let job = done(&live, order("both", json!({}))).await;
    let report = live.get(&report_of(&job)).await.json();
    for (seen, merged) in sites.iter().zip(report["sites"].as_array().unwrap()) {
        for key in ["site", "rank", "alignment", "cosine", "norm_exact", "source_norms"] {
            assert_eq!(seen[key], merged[key], "{key}");
        }
    }
    for key in ["alignment", "cosine", "norm_exact", "effective_rank_exact", "parameters"] {
        let (seen, merged) = (survey["overall"][key].as_f64(), report["overall"][key].as_f64());
        let (seen, merged) = (seen.expect(key), merged.expect(key));
        assert!((seen - merged).abs() <= 1e-9 * merged.abs(), "{key}: {seen} {merged}");
    }
    assert_eq!(live.get("/v1/merges").await.json()["data"].as_array().unwrap().len(), 1);
    let dirs: Vec<String> = SOURCES
        .iter()
        .zip(["0.7", "0.4"])
        .map(|((_, seed), w)| format!("{}={w}", live.adapter_files(*seed, 0.3).display()))
        .collect();
    let said = polylora(&["merge", &dirs[0], &dirs[1], "--survey"]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let said = out(&said);
    let all = said.lines().last().expect("a line");
    let alignment = survey["overall"]["alignment"].as_f64().unwrap();
    let both = ["merge", &dirs[0], "--survey", "--out", "nowhere"];
    assert!(refused(&polylora(&both), 2).contains("--survey"));
    assert!(all.starts_with("all") && all.contains(&format!("{alignment:.3}")), "{said}");
}

/// A template that says nothing of its own, so that an answer is its letters and nothing else.
const BARE: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";

#[tokio::test]
async fn an_evaluation_scores_base_sources_and_result_by_what_they_say_themselves() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let bare = Part::bytes(BARE.as_bytes().to_vec()).file_name("chat_template.jinja");
    let files = form(&live.adapter_files(1, 0.3)).part("chat_template.jinja", bare);
    let put = live.request(Method::PUT, &format!("/v1/adapters/{}", SOURCES[0].0));
    assert_eq!(whole(put.multipart(files)).await.status, 200);
    // Right answers are the base's own for two examples, and the first source's for one.
    let mut data = Vec::new();
    for (model, prompts) in [(BASE, "abc"), (BASE, "what?"), (SOURCES[0].0, "tell")] {
        let (prompt, answer) = greedy(&live, model, prompts).await;
        let user = json!({"role": "user", "content": prompt});
        data.push(json!({"messages": [user, {"role": "assistant", "content": answer}]}));
    }
    let evaluation = json!([{"model": SOURCES[0].0, "data": data}]);
    let job = done(&live, order("both", json!({"evaluation": evaluation}))).await;
    let table = live.get(&report_of(&job)).await.json()["evaluation"].clone();
    let set = &table[0];
    assert_eq!((&set["set"], &set["examples"]), (&json!(SOURCES[0].0), &json!(3)), "{table}");
    let scores = set["scores"].as_array().expect("scores");
    let models: Vec<&str> = scores.iter().map(|s| s["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["base", SOURCES[0].0, SOURCES[1].0, "both@1"]);
    for (score, model) in scores.iter().zip([BASE, SOURCES[0].0, SOURCES[1].0, "both@1"]) {
        let (mut sum, mut count, mut exact) = (0.0, 0, 0);
        for example in &data {
            let text = |i: usize| example["messages"][i]["content"].as_str().unwrap();
            let (logprobs, likeliest) = scored(&live, model, text(0), text(1)).await;
            sum -= logprobs.iter().sum::<f64>();
            count += logprobs.len();
            exact += usize::from(likeliest);
        }
        let loss = score["loss"].as_f64().expect("a loss");
        assert!((loss - sum / count as f64).abs() < 1e-5, "{model}: {loss} {}", sum / count as f64);
        assert_eq!(score["exact_match"].as_f64(), Some(exact as f64 / 3.0), "{model}");
        assert_eq!(set["answer_tokens"], count);
    }
    assert!(scores[0]["exact_match"].as_f64() >= Some(2.0 / 3.0), "the base said two of them");
    assert!(scores[1]["exact_match"].as_f64() >= Some(1.0 / 3.0), "the source said one");
}

/// A prompt, and what a model says to it: two plain letters, each one token.
async fn greedy(live: &Live, model: &str, prompts: &str) -> (String, String) {
    for letter in 'a'..='z' {
        let prompt = format!("{prompts}{letter}");
        let body = json!({"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0});
        let said = live.complete(body).await.json();
        let text = said["choices"][0]["text"].as_str().expect("text");
        if text.len() == 2 && text.chars().all(|c| c.is_ascii_graphic()) {
            return (prompt, text.to_owned());
        }
    }
    panic!("{model} says no plain letters");
}

/// Log-probabilities of an answer's letters, and whether each is the likeliest.
async fn scored(live: &Live, model: &str, prompt: &str, answer: &str) -> (Vec<f64>, bool) {
    let body = json!({"model": model, "prompt": format!("{prompt}{answer}"), "max_tokens": 0,
                      "echo": true, "logprobs": 1, "temperature": 0});
    let said = live.complete(body).await.json();
    let scores = &said["choices"][0]["logprobs"];
    let list = |key: &str| scores[key].as_array().unwrap_or_else(|| panic!("{said}")).clone();
    let from = prompt.len();
    let logprobs = list("token_logprobs")[from..].iter().map(|l| l.as_f64().unwrap()).collect();
    let mut likeliest = true;
    for (own, top) in list("token_logprobs")[from..].iter().zip(&list("top_logprobs")[from..]) {
        let number = |l: &Value| l.as_f64().expect("a number") as f32;
        let most = top.as_object().unwrap().values().map(number);
        likeliest &= most.fold(f32::MIN, f32::max) <= number(own);
    }
    (logprobs, likeliest)
}

#[tokio::test]
async fn a_tenant_merges_its_own_and_sees_no_other_job() {
    let live = Live::start(&["--api-key", "secret"]);
    let tenant = |name: &str| {
        json!({"scopes": ["inference", "admin"], "tenant": name,
               "adapters": [format!("{name}-*")]})
    };
    let (acme, _) = make(&live, tenant("acme")).await;
    let (glob, _) = make(&live, tenant("glob")).await;
    assert_eq!(upload_as(&live, &acme, "acme-a", 1).await.status, 201);
    assert_eq!(upload_as(&live, &acme, "acme-b", 2).await.status, 201);
    assert_eq!(upload_as(&live, &glob, "glob-a", 3).await.status, 201);
    let post = async |key: &str, models: [&str; 2], name: &str| -> Answer {
        let sources = models.map(|m| json!({"model": m}));
        let body = json!({"sources": sources, "name": name});
        ask(&live, Method::POST, "/v1/merges", key, body).await
    };
    let foreign = post(&acme, ["acme-a", "glob-a"], "acme-out").await;
    assert_eq!(foreign.error(), "404 model_not_found sources[1].model");
    let outside = post(&acme, ["acme-a", "acme-b"], "glob-out").await;
    assert_eq!(outside.error(), "403 name_not_allowed name");
    let made = post(&acme, ["acme-a", "acme-b"], "acme-out").await;
    assert_eq!(made.status, 202, "{}", made.text);
    let id = made.json()["id"].as_str().unwrap().to_owned();
    for (key, status, listed) in [(&*acme, 200, 1), (&*glob, 404, 0), ("secret", 200, 1)] {
        for path in ["", "/events"] {
            let path = format!("/v1/merges/{id}{path}");
            assert_eq!(ask(&live, Method::GET, &path, key, Value::Null).await.status, status);
        }
        let list = ask(&live, Method::GET, "/v1/merges", key, Value::Null).await.json();
        assert_eq!(list["data"].as_array().unwrap().len(), listed);
    }
    let cancel = format!("/v1/merges/{id}/cancel");
    let refused = ask(&live, Method::POST, &cancel, &glob, json!({})).await;
    assert_eq!(refused.error(), "404 merge_not_found id");
    let audit = ask(&live, Method::GET, "/v1/audit", "secret", Value::Null).await.json();
    let data = audit["data"].as_array().unwrap();
    let records = data.iter().filter(|r| r["action"] == "POST /v1/merges");
    let records: Vec<(&Value, &Value)> = records.map(|r| (&r["name"], &r["outcome"])).collect();
    assert_eq!(records.len(), 3, "{audit}");
    assert_eq!(records[0], (&json!("acme-out"), &json!("ok")));
}
