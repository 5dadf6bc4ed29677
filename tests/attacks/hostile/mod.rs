//! What means harm: malformed adapters and requests by the thousand against the real program, and
//! the bodies of the fuzz targets on their seeds.
//!
//! `POLYLORA_ROUNDS` (default 220) is the number of adapters; requests are ten times as many. The
//! acceptance run is `POLYLORA_ROUNDS=2000`. Each input follows from its number alone, so a failure
//! names what to repeat: `POLYLORA_FIRST` is the number to begin with.

mod adapters;
mod archives;
mod bundles;
mod containers;
mod poison;
mod requests;
mod server;
mod spoilt;

use server::Hostile;
use support::tiny;

fn number(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
        Err(_) => default,
    }
}

/// How many canned rounds lie between two canaries.
const CANARY_EVERY: usize = 100;

#[tokio::test]
async fn every_malformed_adapter_gets_its_documented_refusal_and_leaves_nothing_behind() {
    let server = Hostile::start().await;
    let (first, rounds) = (number("POLYLORA_FIRST", 0), number("POLYLORA_ROUNDS", 220));
    let mut refused = 0;
    for i in first..first + rounds {
        let case = adapters::case(i);
        let answer = server.upload(&case).await;
        let what = format!("adapter {i}, {}: {} {}", case.what, answer.status, answer.text);
        match answer.code() {
            Some(code) => {
                server.check_documented(&answer, &what);
                assert!(case.codes.is_empty() || case.codes.contains(&code), "{what}");
                refused += 1;
            }
            // Damage that a file survives makes an adapter like any other.
            None => assert!(case.codes.is_empty(), "{what}"),
        }
        if i % CANARY_EVERY == CANARY_EVERY - 1 {
            server.canary(&what).await;
        }
    }
    assert!(refused * 10 >= rounds * 8, "{refused} of {rounds} refused");
    server.canary("the last adapter").await;
    assert_eq!(server.staged(), 0, "nothing is left in staging");
    server.check_memory();
}

#[tokio::test]
async fn every_malformed_request_gets_its_documented_refusal_and_the_server_goes_on() {
    let server = Hostile::start().await;
    let (first, rounds) = (number("POLYLORA_FIRST", 0), number("POLYLORA_ROUNDS", 220) * 10);
    let mut refused = 0;
    for i in first..first + rounds {
        let case = requests::case(i);
        let answer = server.send(&case).await;
        let shown: String = String::from_utf8_lossy(&case.body).chars().take(300).collect();
        let what = format!("request {i}, {} {shown}: {} {}", case.what, answer.status, answer.text);
        if answer.status >= 400 {
            server.check_documented(&answer, &what);
            refused += 1;
        } else {
            assert!(!case.surely, "{what}");
            assert!(!answer.text.contains("internal_error"), "{what}");
        }
        if i % CANARY_EVERY == CANARY_EVERY - 1 {
            server.canary(&what).await;
        }
    }
    assert!(refused * 10 >= rounds * 5, "{refused} of {rounds} refused");
    for i in first..first + rounds / 10 {
        let (what, bytes) = requests::raw(i);
        let answer = server.speak(&bytes);
        let status: u16 = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        assert!(status == 0 || status < 500, "socket {i}, {what}: {answer}");
    }
    server.canary("the last request").await;
    server.check_memory();
}

/// With `POLYLORA_CORPUS` also writes them as the first corpus of each target.
#[test]
fn every_fuzz_target_survives_its_seeds_and_cuts_of_them() {
    let corpus = std::env::var_os("POLYLORA_CORPUS").map(std::path::PathBuf::from);
    for (name, body, seeds) in support::fuzz::TARGETS {
        for (i, seed) in seeds().into_iter().enumerate() {
            body(&seed);
            for cut in [0, 1, seed.len() / 2, seed.len() - 1] {
                body(&seed[..cut]);
            }
            if let Some(dir) = corpus.as_ref().map(|c| c.join(name)) {
                std::fs::create_dir_all(&dir).expect("a directory");
                std::fs::write(dir.join(format!("seed-{i}")), seed).expect("a seed");
            }
        }
    }
}
