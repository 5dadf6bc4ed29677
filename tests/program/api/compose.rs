//! Several adapters in one request: what it is called, what it equals, what it never shares, and
//! what is refused.

use crate::api::bundles::{jinja, prompt, upload};
use crate::api::keys::{ask, make, upload_as};
use polylora::shape::Projection;
use reqwest::Method;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::live::{Answer, BASE, Live, form, hello, rest, whole, with};

/// A greedy answer of eight tokens with their logprobs.
fn scored(model: &str) -> Value {
    with(hello(model, 8), json!({"logprobs": true, "top_logprobs": 5}))
}

fn logprobs(answer: &Answer) -> Vec<f64> {
    let body = answer.json();
    let tokens = body["choices"][0]["logprobs"]["content"].as_array().expect("logprobs").clone();
    let each = tokens.iter().flat_map(|t| {
        let top = t["top_logprobs"].as_array().expect("alternatives").clone();
        std::iter::once(t.clone()).chain(top)
    });
    each.map(|t| t["logprob"].as_f64().expect("a number")).collect()
}

fn who(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 200, "{}", answer.text);
    let header = |name| answer.header(name).to_owned();
    (header("x-polylora-adapter"), header("x-polylora-digest"))
}

#[tokio::test]
async fn every_spelling_of_a_sum_is_one_identity_and_one_part_alone_is_itself() {
    let live = Live::start(&[]);
    let pirate = live.upload("pirate", 1).await.json()["digest"].clone();
    live.upload("sql", 2).await;
    let first = live.chat(scored("pirate:0.7+sql:0.3")).await;
    let (id, digest) = who(&first);
    assert_eq!(id, "pirate@1:0.7+sql@1:0.3");
    assert!(digest.starts_with("sha256:") && digest.len() == 71, "{digest}");
    let list = |a: &str, b: &str| json!([{"name": a, "weight": 0.7}, {"name": b, "weight": 0.3}]);
    let cat = json!({"ids": ["sql", "pirate"], "weights": [0.3, 0.7], "merge_strategy": "cat",
                     "density": 0, "majority_sign_method": "total"});
    for body in [
        scored("sql:0.3+pirate:0.7"),
        scored("tiny:pirate@1:.7+sql@1:3e-1"),
        with(scored(BASE), json!({"adapters": list("pirate", "sql@1")})),
        with(scored(BASE), json!({"merged_adapters": cat})),
    ] {
        let again = live.chat(body.clone()).await;
        assert_eq!(who(&again), (id.clone(), digest.clone()), "{body}");
        assert_eq!(logprobs(&again), logprobs(&first), "{body}");
    }
    let plain = live.chat(scored("pirate+sql")).await;
    assert_eq!(who(&plain).0, "pirate@1+sql@1");
    assert_ne!(logprobs(&plain), logprobs(&first));

    let alone = live.chat(scored("pirate")).await;
    for body in [
        scored("pirate:1.0"),
        with(scored(BASE), json!({"adapters": [{"name": "pirate"}]})),
        with(scored(BASE), json!({"merged_adapters": {"ids": ["pirate"]}})),
    ] {
        let again = live.chat(body).await;
        assert_eq!(who(&again), ("pirate@1".to_owned(), pirate.as_str().unwrap().to_owned()));
        assert_eq!(logprobs(&again), logprobs(&alone));
    }
    let nothing = json!({"adapters": [], "merged_adapters": {}, "adapter_id": ""});
    assert_eq!(who(&live.chat(with(scored(BASE), nothing)).await).0, "base");
    let half = live.chat(scored("pirate:-0.5")).await;
    assert_eq!(who(&half).0, "pirate@1:-0.5");
    assert_ne!(logprobs(&half), logprobs(&alone));
}

#[tokio::test]
async fn a_sum_says_what_the_adapter_says_that_cat_merges_it_to() {
    let live = Live::start(&[]);
    let sources = [(1, 0.7), (2, -0.4), (3, 1.5)];
    let mut args = vec!["merge".to_owned()];
    let mut named = Vec::new();
    for (seed, weight) in sources {
        let dir = live.adapter_files(seed, 0.3);
        args.push(format!("{}={weight}", dir.display()));
        named.push(format!("a{seed}:{weight}"));
        assert_eq!(live.upload(&format!("a{seed}"), seed).await.status, 201);
    }
    let to = tempfile::tempdir().expect("a directory");
    let out = to.path().join("merged");
    args.extend(["--method", "cat", "--out"].map(str::to_owned));
    args.push(out.display().to_string());
    let merge = Command::new(support::command::program()).args(&args).output();
    let done = merge.expect("the binary runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let put = live.request(Method::PUT, "/v1/adapters/merged").multipart(form(&out));
    assert_eq!(whole(put).await.status, 201);
    let merged = logprobs(&live.chat(scored("merged")).await);
    let composed = logprobs(&live.chat(scored(&named.join("+"))).await);
    let apart = merged.iter().zip(&composed).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    eprintln!("{apart:.1e} between composed and merged");
    assert_eq!(merged.len(), composed.len());
    assert!(apart < 1e-4, "{merged:?} {composed:?}");
}

#[tokio::test]
async fn prefix_pages_are_shared_within_a_sum_and_with_nobody_else() {
    let live = Live::start(&[]);
    live.upload("a", 1).await;
    live.upload("b", 2).await;
    let long = "hello ".repeat(30);
    let cached = async |model: &str| {
        let messages = json!([{"role": "user", "content": long}]);
        let answer = live.chat(with(hello(model, 1), json!({"messages": messages}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let usage = answer.json()["usage"].clone();
        usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
    };
    let others = [BASE, "a", "b", "a+b", "a:0.5+b", "a+b:0.5", "a:0.5", "a:0.5+b:0.5"];
    for model in others {
        assert_eq!(cached(model).await, 0, "{model} finds another's pages");
    }
    for model in ["b+a", "b:1+a:0.50", "b:0.5+a", "a:0.5", "b:0.5+a:0.5"] {
        assert!(cached(model).await > 100, "{model} finds its own pages");
    }
}

/// Files of a random adapter with another config and more tensors, of ones: (name, values).
fn altered(live: &Live, seed: u64, fields: Value, more: &[(String, usize)]) -> PathBuf {
    let dir = live.adapter_files(seed, 0.3);
    let config = std::fs::read(dir.join("adapter_config.json")).expect("a config");
    let config = with(serde_json::from_slice(&config).expect("JSON"), fields);
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).expect("written");
    let path = dir.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).expect("tensors");
    let ones: Vec<Vec<u8>> = more.iter().map(|(_, n)| 1f32.to_le_bytes().repeat(*n)).collect();
    let mut tensors: Vec<(String, TensorView<'_>)> =
        SafeTensors::deserialize(&bytes).expect("tensors").tensors();
    for ((name, n), ones) in more.iter().zip(&ones) {
        let view = TensorView::new(Dtype::F32, vec![*n], ones).expect("a tensor");
        tensors.push((name.clone(), view));
    }
    safetensors::serialize_to_file(tensors, None, &path).expect("written");
    dir
}

/// A magnitude for every module of a random adapter.
fn magnitudes(dir: &Path) -> Vec<(String, usize)> {
    let bytes = std::fs::read(dir.join("adapter_model.safetensors")).expect("tensors");
    let file = SafeTensors::deserialize(&bytes).expect("tensors");
    let outputs = file.iter().filter_map(|(name, tensor)| {
        let module = name.strip_suffix(".lora_B.weight")?;
        Some((format!("{module}.lora_magnitude_vector"), tensor.shape()[0]))
    });
    outputs.collect()
}

async fn put(live: &Live, name: &str, dir: &Path) {
    let path = format!("/v1/adapters/{name}");
    let done = whole(live.request(Method::PUT, &path).multipart(form(dir))).await;
    assert_eq!(done.status, 201, "{}", done.text);
}

#[tokio::test]
async fn what_is_no_sum_is_refused_with_its_code_and_the_parts_name() {
    let live = Live::start(&[]);
    live.upload("a", 1).await;
    live.upload("b", 2).await;
    put(&live, "twin", &live.adapter_files(1, 0.3)).await;
    let names = magnitudes(&live.adapter_files(3, 0.3));
    put(&live, "dora", &altered(&live, 3, json!({"use_dora": true}), &names)).await;
    let norm = ("base_model.model.model.norm.weight".to_owned(), 64);
    put(&live, "normed", &altered(&live, 4, json!({"modules_to_save": ["norm"]}), &[norm])).await;
    for (name, seed) in [("wide", 5), ("broad", 6)] {
        put(&live, name, &live.adapter_of(300, &[Projection::Q], seed, 0.02)).await;
    }
    for (model, expected, named) in [
        ("a+nobody", "404 model_not_found model", "`nobody`"),
        ("a+b@7", "404 model_not_found model", "`b@7`"),
        ("a+../b", "404 model_not_found model", "`a+../b`"),
        ("a:x+b", "404 model_not_found model", "`a:x+b`"),
        ("a+", "404 model_not_found model", "`a+`"),
        ("a:nan+b", "400 invalid_weight model", "`a`"),
        ("a+b:1e99", "400 invalid_weight model", "`b`"),
        ("a+b+a:0.5", "400 duplicate_adapter model", "`a@1`"),
        ("a+twin", "400 duplicate_adapter model", "`twin@1`"),
        ("a+a+a+a+a+a+a+a+a", "400 too_many_adapters model", "9"),
        ("a+dora:0.5", "422 not_composable model", "`dora@1`"),
        ("dora:0.5", "422 not_composable model", "`dora@1`"),
        ("normed+a", "422 not_composable model", "`normed@1`"),
        ("wide+broad", "422 rank_out_of_range model", "600"),
    ] {
        let answer = live.chat(hello(model, 1)).await;
        assert_eq!(answer.error(), expected, "{model}: {}", answer.text);
        let message = answer.json()["error"]["message"].clone();
        assert!(message.as_str().is_some_and(|m| m.contains(named)), "{model}: {message}");
    }
    for model in ["dora", "dora:1", "normed", "wide", "wide+a"] {
        assert_eq!(live.chat(hello(model, 1)).await.status, 200, "{model}");
    }
    for path in ["/v1/models/a+b", "/v1/models/a:0.5"] {
        assert_eq!(live.get(path).await.error(), "404 model_not_found model");
        let delete = whole(live.request(Method::DELETE, path)).await;
        assert_eq!(delete.error(), "404 model_not_found model");
    }
}

#[tokio::test]
async fn fields_that_name_adapters_are_refused_by_their_paths_and_loraxs_where_it_is_no_sum() {
    let live = Live::start(&[]);
    live.upload("a", 1).await;
    live.upload("b", 2).await;
    let merged =
        |ids: Value, more: Value| json!({"merged_adapters": with(json!({"ids": ids}), more)});
    let two = json!(["a", "b"]);
    let (strategy, path) = ("merge_strategy", "merged_adapters.merge_strategy");
    let inexact = format!("400 inexact_merge {path}");
    for (more, expected) in [
        (merged(two.clone(), json!({})), inexact.as_str()),
        (merged(two.clone(), json!({strategy: "linear"})), &inexact),
        (merged(json!(["a"]), json!({strategy: "linear", "weights": [0.5]})), &inexact),
        (merged(two.clone(), json!({strategy: "ties", "density": 1.0})), &inexact),
        (merged(json!(["a"]), json!({strategy: "dare_ties", "density": 0.5})), &inexact),
        (merged(two.clone(), json!({strategy: "svd"})), &format!("400 invalid_value {path}")),
        (
            merged(two.clone(), json!({strategy: "cat", "weights": [1]})),
            "400 invalid_value merged_adapters.weights",
        ),
        (
            merged(two.clone(), json!({strategy: "cat", "weights": [1, 1e300]})),
            "400 invalid_weight merged_adapters.weights[1]",
        ),
        (
            json!({"adapters": [{"name": "a", "weight": 1e300}]}),
            "400 invalid_weight adapters[0].weight",
        ),
        (json!({"adapters": [{"name": "a+b"}]}), "404 model_not_found model"),
        (json!({"adapters": [{"name": "a"}, {"name": "a"}]}), "400 duplicate_adapter adapters"),
        (json!({"adapters": [{"nome": "a"}]}), "400 invalid_type adapters[0].nome"),
        (json!({"adapters": [{"name": "a"}], "adapter_id": "b"}), "400 invalid_value adapters"),
        (json!({"adapters": [{"name": "a"}], "model": "b"}), "400 invalid_value adapters"),
    ] {
        let answer = live.chat(with(hello(BASE, 1), more.clone())).await;
        assert_eq!(answer.error(), expected, "{more}: {}", answer.text);
    }
}

#[tokio::test]
async fn a_part_that_the_caller_may_not_see_is_a_part_that_nobody_has() {
    let live = Live::start(&["--api-key", "secret"]);
    let tenant = json!({"scopes": ["inference"], "tenant": "acme", "adapters": ["acme-*"]});
    let (key, _) = make(&live, tenant).await;
    for (name, seed) in [("acme-a", 1), ("acme-b", 2), ("glob-a", 3)] {
        assert_eq!(upload_as(&live, "secret", name, seed).await.status, 201);
    }
    let chat = async |body: Value| {
        let answer = ask(&live, Method::POST, "/v1/chat/completions", &key, body).await;
        (answer.status, answer.text)
    };
    assert_eq!(chat(hello("acme-a+acme-b:0.5", 1)).await.0, 200);
    for sum in ["acme-a+NAME", "NAME@1:0.5+acme-a", "NAME:2", "acme-a+nobody+NAME", "tiny:NAME+x"] {
        let there = chat(hello(&sum.replace("NAME", "glob-a"), 1)).await;
        let missing = chat(hello(&sum.replace("NAME", "glob-x"), 1)).await;
        assert_eq!(there.0, 404, "{}", there.1);
        assert_eq!(there.1.replace("glob-a", "NAME"), missing.1.replace("glob-x", "NAME"), "{sum}");
        let list = |name: &str| json!({"adapters": [{"name": "acme-a"}, {"name": name}]});
        let there = chat(with(hello(BASE, 1), list("glob-a"))).await;
        let missing = chat(with(hello(BASE, 1), list("glob-x"))).await;
        assert_eq!(there.1.replace("glob-a", "NAME"), missing.1.replace("glob-x", "NAME"));
    }
}

/// With two places, sums that each want what the other has would wait for ever if one were held
/// while the other is waited for.
#[tokio::test]
async fn two_places_serve_crowds_of_sums_that_want_each_others_parts() {
    let live = Arc::new(Live::start(&["--resident-max", "2", "--adapter-patience-ms", "20"]));
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3), ("d", 4)] {
        assert_eq!(live.upload(name, seed).await.status, 201);
    }
    let sums = ["a+b", "c+d", "b:2+c", "d+a", "a", "b+d:0.5", "c:0.5"];
    let clients: Vec<_> = (0..sums.len())
        .map(|client| {
            let live = live.clone();
            tokio::spawn(async move {
                for round in 0..6 {
                    let model = sums[(client * 3 + round) % sums.len()];
                    let answer = live.chat(hello(model, 3)).await;
                    assert_eq!(answer.status, 200, "{model}: {}", answer.text);
                }
            })
        })
        .collect();
    for client in clients {
        client.await.expect("every request is served");
    }
    assert!(live.metric("polylora_adapter_evictions_total").await > 10.0, "they took turns");
    let three = live.chat(hello("a+b+c", 1)).await;
    assert_eq!(three.error(), "507 insufficient_capacity model");
}

#[tokio::test]
async fn a_sum_ends_with_its_part_counts_against_each_and_is_in_the_books_as_itself() {
    let live = Live::start(&["--metric-adapters-max", "1"]);
    for (name, seed) in [("a", 1), ("b", 2)] {
        live.upload(name, seed).await;
    }
    let told = live.chat(hello("b:0.5+a", 2)).await;
    let (id, digest) = who(&told);
    assert_eq!(id, "a@1+b@1:0.5");
    let usage = live.get("/v1/usage?view=records&adapter=a@1%2Bb@1:0.5").await.json();
    let record = &usage["records"][0];
    assert_eq!((&record["adapter"], &record["version"]), (&json!(id), &json!(0)), "{usage}");
    assert_eq!(record["digest"], json!(digest));
    let page = live.get("/metrics").await.text;
    let series =
        "polylora_adapter_requests_total{adapter=\"_composed\",finished_reason=\"length\"} 1";
    assert!(page.contains(series) && !page.contains("adapter=\"a@1"), "{page}");

    let limits = json!({"requests_per_minute": 1});
    let set = whole(live.request(Method::PUT, "/v1/limits/b").json(&limits)).await;
    assert_eq!(set.status, 200, "{}", set.text);
    assert_eq!(live.chat(hello("a+b", 1)).await.status, 200);
    let over = live.chat(hello("a+b:2", 1)).await;
    assert_eq!(over.error(), "429 rate_limit_exceeded -");
    assert!(over.text.contains("adapter b"), "{}", over.text);
    assert_eq!(live.chat(hello("a", 1)).await.status, 200, "a has no limit");
    whole(live.request(Method::PUT, "/v1/limits/b").json(&json!({}))).await;

    let endless = json!({"model": "a:0.5+b:0.5", "prompt": "x", "max_tokens": 16_000,
                         "stream": true, "ignore_eos": true, "temperature": 0});
    // The gauge is set after a step's answers are out: it may count the last one still.
    live.idle().await;
    let socket = live.socket("POST /v1/completions", &endless.to_string());
    live.until("it runs", async || live.metric("polylora_requests_running").await == 1.0).await;
    let busy = live.get("/metrics").await.text;
    assert!(busy.contains("running_lora_adapters=\"a,b\""), "{busy}");
    let gone = whole(live.request(Method::DELETE, "/v1/adapters/b?drain_seconds=0")).await;
    assert_eq!(gone.json()["cut"], 1, "{}", gone.text);
    let (_, events) = rest(socket);
    assert!(events.contains("adapter_deleted") && !events.contains("[DONE]"), "{events}");
    assert_eq!(live.chat(hello("a+b", 1)).await.error(), "404 model_not_found model");
}

#[tokio::test]
async fn an_alias_in_a_sum_is_sticky_and_templates_hold_where_all_agree() {
    let live = Live::start(&[]);
    let own = jinja("T {{ messages[0].content }}");
    let generation = ("generation_config.json", json!({"max_new_tokens": 3}).to_string());
    for (name, seed) in [("a", 1), ("b", 2)] {
        let files = [own.clone(), generation.clone()];
        assert_eq!(upload(&live, name, seed, &files).await.status, 201);
    }
    assert_eq!(
        upload(&live, "other", 3, &[jinja("U {{ messages[0].content }}")]).await.status,
        201
    );
    live.upload("plain", 4).await;
    for (model, expected) in [
        ("a+b:0.5", "T hello"),
        ("a:0.5", "T hello"),
        ("a+other", "user: hello\nassistant: "),
        ("a+plain", "user: hello\nassistant: "),
    ] {
        assert_eq!(prompt(&live, model).await, expected, "{model}");
    }
    let open = |model: &str| {
        let mut body = hello(model, 9);
        body.as_object_mut().expect("an object").remove("max_tokens");
        with(body, json!({"stop": "never"}))
    };
    assert_eq!(live.chat(open("a+b")).await.json()["usage"]["completion_tokens"], 3);
    let answer = live.chat(with(open("a+plain"), json!({"max_tokens": 5}))).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 5);

    live.upload("plain", 5).await;
    let alias = json!({"adapter": "plain", "weights": {"1": 50, "2": 50}});
    let made = whole(live.request(Method::PUT, "/v1/aliases/prod").json(&alias)).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let mut seen = std::collections::BTreeSet::new();
    for user in 0..12 {
        let body = with(hello("a+prod:0.5", 1), json!({"user": format!("user-{user}")}));
        let (first, again) = (live.chat(body.clone()).await, live.chat(body).await);
        assert_eq!(who(&first), who(&again), "user {user}");
        seen.insert(who(&first).0);
    }
    let both = ["a@1+plain@1:0.5", "a@1+plain@2:0.5"].map(str::to_owned);
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), both);
}
