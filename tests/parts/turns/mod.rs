//! Fairness, one promise at a time: whose turn it is, who gives way, and how long one waits.
//!
//! Each test drives a scheduler by hand and counts its steps; no clock is looked at. The thing to
//! know: `simulate` holds the bound against a million random events.

mod rig;

use polylora::engine::scheduler::Budgets;
use rig::{Rig, ask, budgets};

#[test]
fn a_tenant_below_its_share_is_taken_in_by_the_next_plan_however_many_run() {
    let mut rig = Rig::new(Budgets { sequences_max: 4, ..budgets() });
    for _ in 0..20 {
        rig.submit(ask("flood", 0, 20, 150));
    }
    (0..5).for_each(|_| rig.step());
    assert_eq!(rig.running("flood"), 4);
    let quiet = rig.submit(ask("quiet", 0, 20, 3));
    rig.step();
    assert_eq!((rig.running("flood"), rig.running("quiet")), (3, 1));
    assert_eq!(rig.tokens(quiet), 1, "its first token comes with the very next step");
    (0..2).for_each(|_| rig.step());
    rig.step();
    assert_eq!((rig.running("flood"), rig.running("quiet")), (4, 0), "and then its place is back");
}

#[test]
fn a_long_prompt_of_one_tenant_does_not_hold_back_anothers_short_one() {
    let mut rig = Rig::new(Budgets { rows_max: 16, ..budgets() });
    rig.submit(ask("flood", 0, 180, 5));
    rig.step();
    let quiet = rig.submit(ask("quiet", 0, 12, 5));
    rig.step();
    assert_eq!(rig.tokens(quiet), 1, "its prompt goes first; the long one gets what is left");
}

#[test]
fn with_one_place_the_unpopular_adapter_is_served_after_one_request_of_the_popular() {
    for tenants in [["", ""], ["a", "b"]] {
        let mut rig = Rig::new(Budgets { sequences_max: 1, ..budgets() });
        rig.submit(ask(tenants[0], 1, 10, 6));
        let other = rig.submit(ask(tenants[1], 2, 10, 6));
        for _ in 0..10 {
            rig.submit(ask(tenants[0], 1, 10, 6));
        }
        (0..7).for_each(|_| rig.step());
        assert_eq!(rig.tokens(other), 1, "{tenants:?}: B comes after the A that ran");
    }
}

#[test]
fn with_one_place_a_long_answer_gives_way_after_a_turn() {
    for tenants in [["", ""], ["a", "b"]] {
        let mut rig = Rig::new(Budgets { sequences_max: 1, quantum_tokens: 30, ..budgets() });
        let long = rig.submit(ask(tenants[0], 1, 10, 150));
        (0..5).for_each(|_| rig.step());
        let other = rig.submit(ask(tenants[1], 2, 10, 4));
        let mut waited = 0;
        while rig.tokens(other) == 0 {
            rig.step();
            waited += 1;
        }
        assert!((30..=33).contains(&waited), "{tenants:?}: after {waited} steps");
        while !rig.is_over(long) {
            rig.step();
        }
        assert!(rig.is_over(other));
    }
}

#[test]
fn weights_share_the_tokens() {
    let mut rig = Rig::new(Budgets { sequences_max: 8, waiting_max: 400, ..budgets() });
    for _ in 0..150 {
        rig.submit_weighted(ask("small", 0, 8, 12), 1);
        rig.submit_weighted(ask("large", 0, 8, 12), 3);
    }
    (0..200).for_each(|_| rig.step());
    let (small, large) = (rig.tokens_of("small") as f64, rig.tokens_of("large") as f64);
    assert!(rig.running("small") > 0 && rig.running("large") > 0, "both still have work");
    assert!((2.6..3.4).contains(&(large / small)), "{large} to {small}");
}

#[test]
fn a_pause_saves_no_turns_up() {
    let mut rig = Rig::new(Budgets { sequences_max: 1, waiting_max: 100, ..budgets() });
    for _ in 0..30 {
        rig.submit(ask("busy", 0, 10, 10));
    }
    (0..100).for_each(|_| rig.step());
    // Back after a long pause: half of what follows is its, not all.
    for _ in 0..20 {
        rig.submit(ask("back", 0, 10, 10));
    }
    let before = rig.tokens_of("busy");
    (0..100).for_each(|_| rig.step());
    let (busy, back) = (rig.tokens_of("busy") - before, rig.tokens_of("back"));
    assert!(busy.abs_diff(back) <= 20, "{busy} and {back}");
}

#[test]
fn when_pages_run_out_the_tenant_that_holds_most_places_gives_way() {
    let mut rig = Rig::new(Budgets { pages: 14, ..budgets() });
    for _ in 0..5 {
        rig.submit(ask("flood", 0, 14, 60));
    }
    let quiet = rig.submit(ask("quiet", 0, 14, 60));
    while !rig.is_over(quiet) {
        rig.step();
        assert_eq!(rig.running("quiet") + usize::from(rig.is_over(quiet)), 1, "it never gives way");
    }
    assert!(rig.preempted > 0, "pages did run out");
}

/// The victims' wait for a first token, in steps, each alone and beside a flood of a hundred times
/// as many requests: the 99th of a hundred is at most twice as long.
#[test]
fn a_flood_of_a_hundred_times_at_most_doubles_the_steps_to_a_first_token() {
    let run = |flood: usize| {
        let budgets = Budgets { rows_max: 64, sequences_max: 16, waiting_max: 200, ..budgets() };
        let mut rig = Rig::new(Budgets { pages: 300, waiting_tokens_max: 1 << 20, ..budgets });
        let mut waits = Vec::new();
        for round in 0..100 {
            for _ in 0..flood {
                if rig.queued() < 100 {
                    rig.submit(ask("flood", 0, 150, 40));
                }
            }
            let ids = ["one", "two"].map(|t| rig.submit(ask(t, 0, 120 + round % 7, 5)));
            for steps in 1..=40 {
                rig.step();
                for id in ids {
                    if rig.tokens(id) == 1 && !waits.contains(&(id, 0)) && steps <= 40 {
                        waits.push((id, 0));
                        waits.push((id, steps));
                    }
                }
                if ids.iter().all(|id| rig.is_over(*id)) {
                    break;
                }
            }
        }
        let mut steps: Vec<usize> = waits.iter().map(|w| w.1).filter(|&s| s > 0).collect();
        assert_eq!(steps.len(), 200, "everybody was served");
        steps.sort_unstable();
        steps[197]
    };
    let (alone, flooded) = (run(0), run(100));
    println!("p99 of steps to a first token: {alone} alone, {flooded} beside the flood");
    assert!(flooded <= 2 * alone, "{flooded} steps against {alone}");
}
