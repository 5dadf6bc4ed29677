//! `/metrics` and `/v1/usage` against a scripted workload: every figure by adapter is the sum of
//! what the answers said.

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use support::live::{BASE, ENDLESS, Live, hello, with};

/// What answers said they used, by adapter.
#[derive(Default, Debug, PartialEq, Clone)]
struct Sum {
    requests: BTreeMap<String, u64>,
    prompt: u64,
    cached: u64,
    completion: u64,
}

/// The same, as the usage log sums it.
#[derive(Default, Debug, PartialEq)]
struct Logged {
    requests: u64,
    prompt: u64,
    cached: u64,
    completion: u64,
}

impl Sum {
    fn add(&mut self, answer: &Value, reason: &str) {
        let usage = &answer["usage"];
        let number = |v: &Value| v.as_u64().expect("a number");
        *self.requests.entry(reason.to_owned()).or_default() += 1;
        self.prompt += number(&usage["prompt_tokens"]);
        self.cached += number(&usage["prompt_tokens_details"]["cached_tokens"]);
        self.completion += number(&usage["completion_tokens"]);
    }
}

/// The figure of a line of the page; 0 when it has none.
fn figure(page: &str, series: &str) -> u64 {
    let line = page.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
    line.map_or(0, |v| v.parse().expect("a whole number"))
}

fn told(page: &str, adapter: &str) -> Sum {
    let of = |name: &str| {
        figure(page, &format!("polylora_adapter_{name}_tokens_total{{adapter=\"{adapter}\"}}"))
    };
    let reasons = ["stop", "length", "cancelled", "failed"].map(|reason| {
        let label = format!("{{adapter=\"{adapter}\",finished_reason=\"{reason}\"}}");
        (reason.to_owned(), figure(page, &format!("polylora_adapter_requests_total{label}")))
    });
    Sum {
        requests: reasons.into_iter().filter(|(_, n)| *n > 0).collect(),
        prompt: of("prompt"),
        cached: of("cached"),
        completion: of("completion"),
    }
}

/// The usage of a streamed answer, as a whole one would tell it.
fn streamed(body: &str) -> Value {
    let frames: Vec<&str> = body.split("\n\n").filter_map(|f| f.strip_prefix("data: ")).collect();
    serde_json::from_str(frames[frames.len() - 2]).expect("JSON")
}

#[tokio::test]
async fn the_page_equals_a_scripted_workload() {
    let live = Live::start(&["--metric-adapters-max", "2"]);
    for (seed, name) in ["one", "two", "three", "four"].iter().enumerate() {
        assert_eq!(live.upload(name, seed as u64 + 1).await.status, 201);
    }
    let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
    let mut logged: BTreeMap<&str, Logged> = BTreeMap::new();
    let label = |model: &str| match model {
        BASE => "base",
        "one" => "one",
        "two" => "two",
        _ => "_other",
    };
    for (model, tokens) in
        [(BASE, 3), ("one", 40), ("one", 5), ("two", 1), ("three", 6), ("four", 2)]
    {
        for more in [json!({}), json!({"n": 3, "temperature": 1.0}), json!({"max_tokens": 30})] {
            let answer = live.chat(with(hello(model, tokens), more)).await.json();
            sums.entry(label(model)).or_default().add(&answer, "length");
        }
        let asked = json!({"stream": true, "stream_options": {"include_usage": true}});
        let body = live.chat(with(hello(model, tokens), asked)).await.text;
        sums.entry(label(model)).or_default().add(&streamed(&body), "length");
    }
    let whole = live.chat(hello("two", 30)).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().expect("text");
    let stop: String = text.chars().skip(4).take(3).collect();
    let stopped = live.chat(with(hello("two", 30), json!({"stop": stop}))).await.json();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert!(stopped["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64(), "{stopped}");
    let two = sums.entry("two").or_default();
    two.add(&whole, "length");
    two.add(&stopped, "stop");
    // Refused: counted by route and status, not against the adapter.
    live.chat(with(hello("two", 1), json!({"temperature": 9}))).await;
    live.chat(hello("nobody", 1)).await;

    let page = live.get("/metrics").await.text;
    for (adapter, sum) in &sums {
        assert_eq!(&told(&page, adapter), sum, "{adapter}");
    }
    let usage = live.get("/v1/usage").await.json();
    for sum in usage["sums"].as_array().expect("sums") {
        let name = sum["adapter"].as_str().expect("a name");
        let logged = logged.entry(label(if name == "base" { BASE } else { name })).or_default();
        let number = |key: &str| sum[key].as_u64().expect("a number");
        *logged = Logged {
            requests: logged.requests + number("requests"),
            prompt: logged.prompt + number("prompt_tokens"),
            cached: logged.cached + number("cached_tokens"),
            completion: logged.completion + number("completion_tokens"),
        };
    }
    for (adapter, sum) in &sums {
        let requests = sum.requests.values().sum();
        let Sum { prompt, cached, completion, .. } = *sum;
        assert_eq!(logged[adapter], Logged { requests, prompt, cached, completion }, "{adapter}");
    }
    assert!(!page.contains("adapter=\"three\"") && !page.contains("nobody"), "{page}");
    first_tokens_are_measured_once(&page, 6 * 4 + 2);
    let route = "polylora_http_requests_total{route=\"/v1/chat/completions\",status=";
    assert_eq!(figure(&page, &format!("{route}\"200\"}}")), 6 * 4 + 2);
    assert_eq!(figure(&page, &format!("{route}\"400\"}}")), 1);
    assert_eq!(figure(&page, &format!("{route}\"404\"}}")), 1);
    assert_eq!(figure(&page, "polylora_adapter_loads_total"), 4);
    assert_eq!(figure(&page, "polylora_adapters_resident{tier=\"device\"}"), 4);
    assert_eq!(figure(&page, "vllm:num_gpu_loaded_lora_adapters"), 4);
    let loaded = "vllm:lora_adapter_loaded{adapter_name=\"three\",level=\"gpu\",pinned=\"false\"}";
    assert_eq!(figure(&page, loaded), 1);
}

/// The whole server's time to first token is that of its adapters: one for each request, of the
/// same length.
fn first_tokens_are_measured_once(page: &str, requests: u64) {
    let all = |series: &str| -> f64 {
        let of = page.lines().filter_map(|line| line.strip_prefix(series)?.split_once(' '));
        of.map(|(_, value)| value.parse::<f64>().expect("a number")).sum()
    };
    for series in ["polylora", "polylora_adapter", "vllm"] {
        let colon = if series == "vllm" { ':' } else { '_' };
        let name = format!("{series}{colon}time_to_first_token_seconds");
        assert_eq!(all(&format!("{name}_count")), requests as f64, "{name}");
        let (sum, of) = (all(&format!("{name}_sum")), "polylora_time_to_first_token_seconds_sum");
        assert!((sum / all(of) - 1.0).abs() < 1e-9, "{name}: {sum} of {}", all(of));
    }
}

#[tokio::test]
async fn a_gateway_sees_which_adapters_run_and_which_wait() {
    // Long turns: when the two have taken one each, both have begun.
    let live = Live::start(&["--sequences-max", "1", "--rows-max", "8192"]);
    for (seed, name) in ["one", "two"].iter().enumerate() {
        live.upload(name, seed as u64 + 1).await;
    }
    let endless = |model: &str| hello(model, ENDLESS).to_string();
    let first = live.socket("POST /v1/chat/completions", &endless("one"));
    let activity = |running: &str, waiting: &str| {
        format!(
            "vllm:lora_requests_info{{max_lora=\"1024\",running_lora_adapters=\"{running}\",\
             waiting_lora_adapters=\"{waiting}\"}} "
        )
    };
    let shows = async |line: String| {
        live.until(&line, async || live.get("/metrics").await.text.contains(&line)).await;
    };
    shows(activity("one", "")).await;
    let second = live.socket("POST /v1/chat/completions", &endless("two"));
    shows(activity("one", "two")).await;
    drop(first);
    shows(activity("two", "")).await;
    drop(second);
    shows(activity("", "")).await;
    let cancelled =
        "polylora_adapter_requests_total{adapter=\"one\",finished_reason=\"cancelled\"}";
    assert_eq!(live.metric(cancelled).await, 1.0);
}

#[tokio::test]
async fn a_gateway_sees_what_is_resident_and_what_is_pinned() {
    let live = Live::start(&["--resident-max", "2"]);
    for (name, seed) in [("one", 1), ("one", 2), ("two", 3)] {
        live.upload(name, seed).await;
    }
    let loaded = async || {
        let page = live.get("/metrics").await.text;
        let lines = page.lines().filter(|l| l.starts_with("vllm:lora_adapter_loaded{"));
        lines.map(|l| l.replace("vllm:lora_adapter_loaded", "")).collect::<Vec<_>>()
    };
    let line = |name: &str, pinned: bool| {
        format!("{{adapter_name=\"{name}\",level=\"gpu\",pinned=\"{pinned}\"}} 1")
    };
    let is = async |expected: Vec<String>| {
        live.until(&format!("{expected:?}"), async || loaded().await == expected).await;
    };
    is(vec![line("one", false), line("two", false)]).await;
    live.post("/v1/adapters/one/pin", json!({"version": 1})).await;
    // The least recently used made room; an old version goes by its number.
    is(vec![line("one@1", true), line("two", false)]).await;
    live.post("/v1/adapters/two/pin", json!({})).await;
    is(vec![line("one@1", true), line("two", true)]).await;
    let live = live.crash_and_restart(&["--resident-max", "2"]);
    let page = live.get("/metrics").await.text;
    for name in ["one@1", "two"] {
        assert!(page.contains(&line(name, true)), "{name} after a restart: {page}");
    }
    live.post("/v1/adapters/two/unpin", json!({})).await;
    assert!(live.get("/metrics").await.text.contains(&line("two", false)));
}

#[tokio::test]
async fn a_deleted_adapter_leaves_the_page() {
    let live = Live::start(&[]);
    live.upload("gone", 1).await;
    live.chat(hello("gone", 2)).await;
    assert!(live.get("/metrics").await.text.contains("\"gone\""));
    live.request(reqwest::Method::DELETE, "/v1/adapters/gone").send().await.expect("an answer");
    live.until("it is off the page", async || {
        !live.get("/metrics").await.text.contains("\"gone\"")
    })
    .await;
}

/// Names of series in a dashboard's queries.
fn queried(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value.as_str() {
                    Some(query) if key == "expr" || key == "query" => {
                        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                        let ours = words.filter(|w| w.starts_with("polylora_"));
                        names.extend(ours.map(str::to_owned));
                    }
                    _ => queried(value, names),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|v| queried(v, names)),
        _ => {}
    }
}

#[tokio::test]
async fn every_series_of_the_dashboard_is_on_the_page_and_the_other_way_round() {
    let live = Live::start(&[]);
    live.upload("one", 1).await;
    let live = live.crash_and_restart(&[]);
    // One of everything that has labels.
    live.chat(hello("one", 2)).await;
    live.request(reqwest::Method::PUT, "/v1/adapters/bad").body("?").send().await.expect("refused");
    let ended =
        async || live.metric("polylora_requests_finished_total{finished_reason=\"length\"}").await;
    live.until("it is counted", async || ended().await == 1.0).await;
    let page = live.get("/metrics").await.text;
    assert_eq!(figure(&page, "polylora_adapter_cold_starts_total{reason=\"restart\"}"), 1);
    let typed = page.lines().filter_map(|l| l.strip_prefix("# TYPE polylora_"));
    let families: BTreeMap<String, bool> = typed
        .filter_map(|l| l.split_once(' '))
        .map(|(name, kind)| (format!("polylora_{name}"), kind == "histogram"))
        .collect();
    let dashboard: Value =
        serde_json::from_str(include_str!("../../../src/metrics/dashboard.json")).expect("JSON");
    let mut names = BTreeSet::new();
    queried(&dashboard, &mut names);
    assert!(names.len() > 25, "{names:?}");
    let family = |name: &String| match name.strip_suffix("_bucket") {
        Some(histogram) if families.get(histogram) == Some(&true) => histogram.to_owned(),
        _ => name.clone(),
    };
    let shown: BTreeSet<String> = names.iter().map(family).collect();
    let exported: BTreeSet<String> = families.into_keys().collect();
    assert_eq!(shown, exported);
}
