//! `polylora bench` against servers whose timing is known.

use super::fake::{Seen, server};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use support::command::{out, polylora};

/// Runs a bench and returns its JSON report and its table.
fn bench(url: &str, args: &[&str]) -> (Value, String) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_string_lossy().into_owned();
    let o = polylora(&[&["bench", "--url", url, "--json", &path], args].concat());
    let report = std::fs::read_to_string(file.path()).expect("a report");
    let report = serde_json::from_str(&report)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&o.stderr)));
    (report, out(&o))
}

#[test]
fn bench_times_what_the_server_did_and_counts_what_it_counted() {
    let (url, seen) = server();
    let counts = ["--requests", "8", "--concurrency", "4", "--warmup", "3", "--seed", "5"];
    let args = [&["--models", "auto"], &counts[..]].concat();
    let begun = Instant::now();
    let (report, table) = bench(&url, &args);
    let whole = begun.elapsed().as_secs_f64();
    let round = &report["contenders"][0]["rounds"][0];
    assert_eq!(round["answered"], 8);
    assert_eq!(round["output_tokens"], 40, "five each by usage, not four pieces");
    assert_eq!(round["prompt_tokens_mean"], 9.0);
    assert_eq!(round["asked"], json!({"base": 4, "pirate": 4}));
    let p50 = |key: &str| round[key]["p50"].as_f64().expect("a figure");
    // A sleep is hardly shorter than asked; how much longer depends on the machine.
    let [first, gap, latency] =
        ["time_to_first_token_seconds", "inter_token_seconds", "latency_seconds"].map(p50);
    assert!(first >= 0.119 && gap >= 0.030 && latency >= 0.230, "{round:#}");
    assert!(first < latency && latency < whole, "{round:#}");
    assert!(table.contains("8/8"), "{table}");
    let state = &report["states"][0];
    assert!(state["read_gigabytes_per_second"].as_f64() > Some(0.0), "{state:#}");
    assert!(table.contains("\nmachine, by round: ") && table.contains(" GB/s ("), "{table}");
    assert_eq!(seen.lock().expect("lock").len(), 11, "three of them to warm up");

    let prompts = |seen: &Seen| -> Vec<String> {
        let seen = seen.lock().expect("lock");
        let mut all: Vec<String> = seen.iter().map(|(_, b)| b["messages"].to_string()).collect();
        all.sort();
        all
    };
    let first = prompts(&seen);
    seen.lock().expect("lock").clear();
    bench(&url, &args);
    assert_eq!(prompts(&seen), first, "same seed, same requests");
}

#[test]
fn the_machines_state_is_measured_without_a_server() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let o = polylora(&["bench", "--machine", "--json", &file.path().to_string_lossy()]);
    let said = out(&o);
    assert!(said.contains(" GB/s (") && said.lines().count() == 1, "{said}");
    let report = std::fs::read_to_string(file.path()).expect("a report");
    let state: Value = serde_json::from_str(&report).expect("JSON");
    assert!(state["read_gigabytes_per_second"].as_f64() > Some(0.0), "{state:#}");
    assert_eq!(state["round_trip_ns"].is_null(), state["threads"] == 1, "{state:#}");
}

#[test]
fn bench_counts_errors_by_kind() {
    let (url, _) = server();
    let args = ["--models", "busy,breaks,vanishes,base", "--requests", "8", "--warmup", "0"];
    let (report, table) = bench(&url, &args);
    let round = &report["contenders"][0]["rounds"][0];
    let kinds = ["429 queue_full", "stream: ended early", "stream: internal_error"];
    assert_eq!(round["errors"], json!({kinds[0]: 2, kinds[1]: 2, kinds[2]: 2}));
    assert_eq!(round["answered"], 2);
    assert!(table.contains("bench: 2 x 429 queue_full"), "{table}");
    let o = polylora(&["bench", "--url", &url, "--models", "busy", "--requests", "2"]);
    assert_eq!(o.status.code(), Some(1), "nothing was answered");
    assert!(out(&o).contains("0/2"), "{}", out(&o));
}

#[test]
fn contenders_take_turns_and_are_compared_round_by_round() {
    let (url, seen) = server();
    let (one, two) =
        (format!("one={url},model=base"), format!("two={url},model=pirate,model=base"));
    let counts = ["--rounds", "2", "--requests", "2", "--warmup", "0"];
    let args = [&["--contender", &one, "--contender", &two], &counts[..]].concat();
    let (report, table) = bench(&url, &args);
    assert_eq!(report["contenders"][1]["models"], json!(["pirate", "base"]));
    assert_eq!(report["contenders"][1]["rounds"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["states"].as_array().map(Vec::len), Some(2), "a state a round");
    let ratio = report["contenders"][1]["ratio_to_first"]["median"].as_f64().expect("a ratio");
    assert!(ratio.is_finite() && ratio > 0.0, "{report:#}");
    assert!(table.contains("one") && table.contains("two"), "{table}");
    // Round 1: one, two; round 2: two, one. Only two asks `pirate`.
    let seen = seen.lock().expect("lock");
    let pirates: Vec<usize> = (0..8).filter(|i| seen[*i].1["model"] == "pirate").collect();
    assert_eq!(pirates.len(), 2);
    assert!(pirates.iter().all(|i| (2..6).contains(i)), "{pirates:?}");
}

#[test]
fn a_contender_asks_for_the_adapters_of_a_llama_server_by_index() {
    let (url, seen) = server();
    let llama = format!("llama={url},model=base,lora=0,lora=2");
    let counts = ["--requests", "4", "--concurrency", "1", "--warmup", "0"];
    let args = [&["--contender", &llama, "--contender", &format!("base={url}")], &counts[..]];
    let (report, _) = bench(&url, &args.concat());
    let llama = &report["contenders"][0];
    assert_eq!(llama["models"], json!(["lora=0", "lora=2"]));
    assert_eq!(llama["rounds"][0]["asked"], json!({"lora=0": 2, "lora=2": 2}));
    let seen = seen.lock().expect("lock");
    let lists: Vec<&Value> = seen.iter().map(|(_, b)| &b["lora"]).collect();
    let only = |id| json!([{"id": id, "scale": 1.0}]);
    assert_eq!(lists[..4], [&only(0), &only(2), &only(0), &only(2)]);
    assert!(seen.iter().all(|(_, b)| b["model"] == "base"));
    assert!(seen[4..].iter().all(|(_, b)| b.get("lora").is_none()), "{:?}", seen[4]);
}

#[test]
fn contenders_on_different_servers_get_the_same_requests() {
    let ((one, seen_one), (two, seen_two)) = (server(), server());
    let models = "model=base,model=pirate";
    let ours = [format!("a={one},{models}"), format!("b={two},{models}"), format!("c={one}/")];
    let contenders: Vec<&str> = ours.iter().flat_map(|c| ["--contender", c.as_str()]).collect();
    let counts = ["--requests", "8", "--warmup", "0", "--popularity", "zipf:1"];
    bench(&one, &[&contenders[..], &counts].concat());
    let asked = |seen: &Seen| -> Vec<String> {
        let seen = seen.lock().expect("lock");
        seen.iter().map(|(_, b)| format!("{} {}", b["model"], b["messages"])).collect()
    };
    let (mut first, mut second) = (asked(&seen_one), asked(&seen_two));
    let again = first.split_off(8);
    first.sort();
    second.sort();
    assert_eq!(first, second, "ratios compare servers, not prompts");
    let words = |s: &String| s.split_once(' ').expect("two parts").1.to_owned();
    let first: Vec<String> = first.iter().map(words).collect();
    assert!(again.iter().all(|s| !first.contains(&words(s))), "the prefix cache knew them");
}

#[test]
fn with_a_rate_a_stalled_server_is_charged_for_what_had_to_wait() {
    use std::io::{Read, Write};
    // One connection at a time, 100 ms each, ten requests due within a few milliseconds.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = [0; 65536];
            let _ = stream.read(&mut request).expect("a request");
            std::thread::sleep(Duration::from_millis(100));
            let choice =
                "{\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"stop\"}]}";
            let page = format!("data: {choice}\n\ndata: [DONE]\n\n");
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close";
            write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{page}", page.len()).expect("sent");
        }
    });
    let args = ["--models", "m", "--rate", "1000", "--requests", "10", "--warmup", "0"];
    let (report, _) = bench(&url, &args);
    let round = &report["contenders"][0]["rounds"][0];
    assert_eq!(round["answered"], 10, "{round:#}");
    let at = |p: &str| round["latency_seconds"][p].as_f64().expect("a figure");
    assert!(at("p50") > 0.4, "the fifth waited for four others: {round:#}");
    assert!(at("max") > 0.9, "the last waited for all others: {round:#}");
}
