//! A million random events against the scheduler and the page book, and a slow obvious model of
//! what must hold.
//!
//! The model repeats no decision of the scheduler. It knows what every client asked for (`client`)
//! and what each place in KV memory was last written with (`world`), computes every stream
//! beforehand, alone, and looks at everything after each event (`checks`). The thing to know: the
//! "keys and values" of a token are a number made of its identity and all tokens up to it, so one
//! wrong page anywhere shows as a wrong number.

mod checks;
mod client;
mod world;

use std::collections::BTreeMap;
use std::time::Instant;
use support::soak::cases;
use world::World;

const EVENTS: usize = 1_000_000;
const EVENTS_PER_WORLD: usize = 2_500;

pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 31)).wrapping_mul(0x7fb5_d329_728e_a185);
    z = (z ^ (z >> 27)).wrapping_mul(0x81da_def4_bc2d_d44d);
    z ^ (z >> 33)
}

/// The only source of chance.
pub struct Dice(pub u64);

impl Dice {
    /// Uniform enough in `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        low + (mix(self.0) % (high - low + 1) as u64) as usize
    }
    pub fn percent(&mut self, chance: usize) -> bool {
        self.between(1, 100) <= chance
    }
    pub fn tokens(&mut self, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.between(0, client::VOCAB as usize - 1) as u32).collect()
    }
}

/// What a world saw, to be sure that the dice reach every corner.
#[derive(Default, Debug)]
pub struct Seen {
    pub steps: usize,
    pub preemptions: usize,
    pub hit_tokens: usize,
    pub ends: BTreeMap<&'static str, usize>,
    pub too_slow: usize,
    pub failed_steps: usize,
    pub prompts_recomputed: usize,
    pub shared_pages: usize,
    /// How near one came to the bound on overtaking.
    pub overtaken_percent_max: usize,
}

impl Seen {
    fn add(&mut self, seen: Seen) {
        self.steps += seen.steps;
        self.preemptions += seen.preemptions;
        self.hit_tokens += seen.hit_tokens;
        self.too_slow += seen.too_slow;
        self.failed_steps += seen.failed_steps;
        self.prompts_recomputed += seen.prompts_recomputed;
        self.shared_pages += seen.shared_pages;
        let percent = seen.overtaken_percent_max;
        self.overtaken_percent_max = self.overtaken_percent_max.max(percent);
        for (reason, times) in seen.ends {
            *self.ends.entry(reason).or_default() += times;
        }
    }
}

/// Says which world it was when one breaks.
pub struct Seed(pub usize);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the world of seed {} broke; POLYLORA_ONLY={} runs it alone", self.0, self.0);
        }
    }
}

#[test]
fn a_million_random_events_break_no_invariant() {
    let start = Instant::now();
    let worlds = EVENTS / EVENTS_PER_WORLD;
    let seeds = cases(worlds, worlds);
    let alone = seeds.len() == 1;
    let mut all = Seen::default();
    for seed in seeds {
        let _says = Seed(seed);
        let mut world = World::new(seed as u64, start);
        for _ in 0..EVENTS_PER_WORLD {
            world.event();
        }
        world.close();
        all.add(world.seen);
    }
    println!("{all:?}");
    if !alone {
        let corners =
            [all.preemptions, all.hit_tokens, all.too_slow, all.failed_steps, all.shared_pages];
        assert!(corners.iter().all(|&times| times > 1000), "a corner was not reached: {all:?}");
        assert_eq!(all.ends.len(), 4, "every way to end");
    }
}
