//! What means harm: malformed adapters and requests by the thousand against the real program, and
//! the bodies of the fuzz targets on their seeds.
//!
//! 220 adapters and 2,200 requests; in a soak 2,000 and 20,000. Each input follows from its number
//! alone, and a failure names it: `POLYLORA_ONLY` repeats that one.

mod adapters;
mod archives;
mod bundles;
mod containers;
mod poison;
mod requests;
mod server;
mod spoilt;

use server::Hostile;
use support::soak::cases;
use support::tiny;

/// How many canned rounds lie between two canaries.
const CANARY_EVERY: usize = 100;

#[tokio::test]
async fn every_malformed_adapter_gets_its_documented_refusal_and_leaves_nothing_behind() {
    let server = Hostile::start().await;
    let numbers = cases(220, 2_000);
    let (mut refused, rounds) = (0, numbers.len());
    for i in numbers {
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
    assert!(rounds == 1 || refused * 10 >= rounds * 8, "{refused} of {rounds} refused");
    server.canary("the last adapter").await;
    assert_eq!(server.staged(), 0, "nothing is left in staging");
    server.check_memory();
}

#[tokio::test]
async fn every_malformed_request_gets_its_documented_refusal_and_the_server_goes_on() {
    let server = Hostile::start().await;
    let numbers = cases(2_200, 20_000);
    let (mut refused, rounds) = (0, numbers.len());
    for i in numbers.clone() {
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
    assert!(rounds == 1 || refused * 10 >= rounds * 5, "{refused} of {rounds} refused");
    for i in numbers.take(rounds.div_ceil(10)) {
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
