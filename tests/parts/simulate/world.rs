//! A world: one scheduler with its budgets and pages, its KV memory, its clients and the dice.
//!
//! Owns the events and says what each must make of its clients. Never chooses who runs. The thing
//! to know: a step computes rows from KV memory only, as a model does.

use crate::simulate::client::{Client, Place, kv_after, next_token};
use crate::simulate::{Dice, Seen, mix};
use polylora::adapters::Digest;
use polylora::adapters::bank::Slot;
use polylora::adapters::registry::Lease;
use polylora::ending::{EndReason, FinishReason};
use polylora::engine::pages::{PAGE, Pages};
use polylora::engine::request::{Request, Sampling, TokenEvent, channel};
use polylora::engine::scheduler::{Budgets, Notice, Plan, Planned, Scheduler};
use polylora::engine::sequence::Sequence;
use polylora::error::{Error, Result};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const BASE: Digest = Digest([7; 32]);
/// Tenants and their weights.
const TENANTS: [(&str, u32); 3] = [("", 1), ("acme", 1), ("globex", 3)];
/// A computed token at weight 1.
pub const TOKEN: u64 = 300;

/// What a client asks for; `adapter` 0 is the base model.
#[derive(Clone)]
struct Ask {
    adapter: u8,
    request: Request,
}

pub struct World {
    dice: Dice,
    pub budgets: Budgets,
    context: usize,
    pub book: Pages,
    pub scheduler: Scheduler,
    pub plan: Plan,
    sampled: Vec<Option<Result<TokenEvent>>>,
    pub kv: Vec<[u64; PAGE]>,
    pub clients: BTreeMap<u64, Client>,
    /// Clients forgotten, by how their sequences must have ended.
    gone: BTreeMap<&'static str, usize>,
    prefixes: Vec<Vec<u32>>,
    /// Weighted tokens computed for each tenant, none counted twice.
    pub done: BTreeMap<String, u64>,
    /// In percent, how often the first tenant asks rather than another.
    skew: usize,
    recent: Option<Ask>,
    start: Instant,
    next_id: u64,
    pub seen: Seen,
}

impl World {
    pub fn new(seed: u64, start: Instant) -> Self {
        let mut dice = Dice(mix(seed));
        let context = dice.between(20, 140);
        let pages_min = context.div_ceil(PAGE);
        let tight = dice.percent(60);
        let pages = pages_min + dice.between(0, if tight { 3 } else { 3 * pages_min });
        let rows_max = [1, 3, 8, 16, 33, 64, 300][dice.between(0, 6)];
        let budgets = Budgets {
            rows_max,
            logit_rows_max: if dice.percent(30) {
                dice.between(1, rows_max)
            } else {
                rows_max.min(40)
            },
            sequences_max: dice.between(1, 10),
            quantum_tokens: dice.between(1, 60),
            waiting_max: dice.between(1, 12),
            waiting_tokens_max: dice.between(context, 12 * context),
            pages,
        };
        Self {
            context,
            book: Pages::new(pages, dice.percent(85)),
            scheduler: Scheduler::new(budgets.clone()),
            plan: Plan::new(budgets.sequences_max),
            sampled: Vec::new(),
            kv: vec![[0; PAGE]; pages],
            clients: BTreeMap::new(),
            gone: BTreeMap::new(),
            prefixes: prefixes(&mut dice, context),
            done: TENANTS.map(|(name, _)| (name.to_owned(), 0)).into(),
            skew: [0, 0, 60, 95][dice.between(0, 3)],
            recent: None,
            start,
            next_id: 0,
            seen: Seen::default(),
            budgets,
            dice,
        }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.seen.steps as u64)
    }

    pub fn event(&mut self) {
        match self.dice.between(1, 100) {
            1..=20 => self.submit(),
            21 => self.cancel(),
            22..=55 => self.read(),
            _ => self.step(),
        }
        self.check();
        self.forget();
    }

    /// Lets go of clients that have all they will get.
    fn forget(&mut self) {
        let gone = &mut self.gone;
        self.clients.retain(|_, client| match client.place {
            Place::Gone(reason) if client.ended || client.cancelled() => {
                *gone.entry(reason.name()).or_default() += 1;
                false
            }
            _ => true,
        });
    }

    /// What a client might ask for: often the beginning of what others ask for, or all of it.
    fn ask(&mut self) -> Ask {
        let d = &mut self.dice;
        let again = d.percent(30);
        let seed = d.between(0, 3) as u64;
        if let Some(ask) = &mut self.recent
            && again
        {
            ask.request.sampling.seed = seed;
            return ask.clone();
        }
        let mut prompt = self.prefixes[d.between(0, 2)].clone();
        prompt.truncate(d.between(0, self.context - 1));
        let tail_min = usize::from(prompt.is_empty());
        let tail = d.between(tail_min, 8).min(self.context - 1 - prompt.len());
        prompt.extend(d.tokens(tail));
        let stops = d.between(0, 1) * d.between(0, 2);
        let (tenant, weight) = TENANTS[if d.percent(self.skew) { 0 } else { d.between(0, 2) }];
        let ask = Ask {
            adapter: d.between(0, 2) as u8,
            request: Request {
                prompt,
                sampling: Sampling {
                    seed,
                    prompt_logprobs: d.percent(15).then_some(0),
                    ..Sampling::default()
                },
                tokens_max: d.between(1, 60) as u32,
                tokens_min: d.between(0, 20) as u32,
                stop_tokens: (0..stops).map(|token| token as u32 * 2).collect(),
                lease: None,
                tenant: tenant.into(),
                weight,
            },
        };
        self.recent = Some(ask.clone());
        ask
    }

    fn submit(&mut self) {
        let Ask { adapter, mut request } = self.ask();
        let (queued, queued_tokens) = self.scheduler.queued();
        let tokens = queued_tokens + request.prompt.len();
        if queued == self.budgets.waiting_max || tokens > self.budgets.waiting_tokens_max {
            return;
        }
        let slow = self.dice.percent(25);
        let capacity = if slow { self.dice.between(1, 12) } else { 2 * self.context + 2 };
        let (sender, stream) = channel(capacity);
        let mut client = Client::new(request.clone(), adapter, self.context, stream, capacity);
        // Somebody gains a row in every step; whoever is there may be computed again, and others
        // may overtake as far as fairness lets them.
        let ahead = self.clients.values().filter(|c| c.alive());
        let steps: usize = ahead.map(|c| c.len_max).sum();
        let overtaken = TENANTS.len() * (self.overtaking_max() / TOKEN) as usize;
        client.deadline = self.seen.steps + 3 * (steps + client.len_max + overtaken);
        client.before = self.done.clone();
        request.lease = (adapter > 0).then(|| lease(adapter).into());
        client.version = request.lease.as_ref().and_then(|lease| lease.alone()).cloned();
        let now = self.now();
        let sequence = Sequence::new(self.next_id, request, &BASE, self.context, sender, now);
        self.scheduler.submit(sequence);
        self.clients.insert(self.next_id, client);
        self.next_id += 1;
    }

    /// By how many weighted tokens another tenant may get ahead while one waits: what all places
    /// hold, when it begins to wait and again when it ends, and a turn.
    pub fn overtaking_max(&self) -> u64 {
        let places = self.budgets.sequences_max.min(self.budgets.rows_max);
        TOKEN * (self.budgets.quantum_tokens + 2 * places * self.context) as u64
    }

    fn any_client(&mut self) -> Option<u64> {
        let last = self.clients.len().checked_sub(1)?;
        self.clients.keys().nth(self.dice.between(0, last)).copied()
    }

    fn cancel(&mut self) {
        if let Some(id) = self.any_client() {
            self.clients.get_mut(&id).unwrap().stream = None;
        }
    }

    fn read(&mut self) {
        let times = self.dice.between(1, 20);
        if let Some(id) = self.any_client() {
            let client = self.clients.get_mut(&id).unwrap();
            (0..times).all(|_| client.read());
        }
    }

    fn step(&mut self) {
        let now = self.now();
        self.seen.steps += 1;
        self.scheduler.plan(&mut self.book, now, &mut self.plan);
        for client in self.clients.values_mut().filter(|c| c.alive() && c.cancelled()) {
            client.place = Place::Gone(EndReason::Cancelled);
        }
        self.check_plan();
        self.notices();
        let entries = self.plan.entries().to_vec();
        self.compute(&entries);
        if self.dice.percent(1) {
            self.cancel(); // while the step runs
        }
        if self.dice.between(1, 250) == 1 {
            self.fail_step(&entries);
        } else {
            self.commit(&entries);
        }
        self.notices();
    }

    /// Computes the planned rows in KV memory, from what KV memory holds before them.
    fn compute(&mut self, entries: &[Planned]) {
        let running = self.scheduler.running();
        for planned in entries {
            let sequence = &running[planned.sequence];
            let client = &self.clients[&sequence.id];
            for position in planned.start..planned.start + planned.len {
                let page = sequence.pages[position / PAGE];
                let holders = running.iter().filter(|s| s.pages.contains(&page)).count();
                assert_eq!(holders, 1, "a page is written while shared");
                let before = match position {
                    0 => client.identity,
                    p => self.kv[sequence.pages[(p - 1) / PAGE] as usize][(p - 1) % PAGE],
                };
                let token = sequence.tokens[position];
                self.kv[page as usize][position % PAGE] = kv_after(before, token);
            }
        }
    }

    /// The step fails after it wrote nonsense into its pages.
    fn fail_step(&mut self, entries: &[Planned]) {
        self.seen.failed_steps += 1;
        for planned in entries {
            let sequence = &self.scheduler.running()[planned.sequence];
            for position in planned.start..planned.start + planned.len {
                self.kv[sequence.pages[position / PAGE] as usize][position % PAGE] = u64::MAX;
            }
            let client = self.clients.get_mut(&sequence.id).unwrap();
            if client.cancelled() {
                client.place = Place::Gone(EndReason::Failed);
            } else {
                client.fail();
            }
        }
        self.scheduler.abort_planned(&self.plan, &mut self.book, &Error::fault("planted"));
    }

    fn commit(&mut self, entries: &[Planned]) {
        for planned in entries {
            let sequence = &self.scheduler.running()[planned.sequence];
            let (id, last) = (sequence.id, planned.start + planned.len - 1);
            let kv = self.kv[sequence.pages[last / PAGE] as usize][last % PAGE];
            let sample = planned.samples.then(|| {
                if self.dice.between(1, 500) == 1 {
                    return Err(Error::fault("planted"));
                }
                let (seed, index) = (sequence.sampling.seed, sequence.output_len());
                Ok(TokenEvent::unscored(next_token(kv, seed, index, sequence.banned())))
            });
            if planned.prompt_logits && planned.start == 0 && self.clients[&id].prompt_told > 0 {
                self.seen.prompts_recomputed += 1;
            }
            let client = self.clients.get_mut(&id).unwrap();
            let end = planned.start + planned.len;
            let fresh = end.saturating_sub(client.paid.max(planned.start)) as u64;
            client.paid = client.paid.max(end);
            *self.done.get_mut(&client.request.tenant).unwrap() +=
                fresh * TOKEN / u64::from(client.request.weight);
            self.expect(id, planned, sample.as_ref().is_some_and(Result::is_err));
            self.sampled.push(sample);
            if planned.prompt_logits {
                let prompt = self.clients[&id].request.prompt.clone();
                for row in (planned.start..=last).filter(|row| row + 1 < prompt.len()) {
                    let event = TokenEvent::unscored(prompt[row + 1]);
                    self.scheduler.prompt_scored(planned, row, event);
                }
            }
        }
        let now = self.now();
        self.scheduler.commit(&self.plan, &mut self.sampled, &mut self.book, now);
    }

    /// What the commit of `planned` must make of client `id`.
    fn expect(&mut self, id: u64, planned: &Planned, planted: bool) {
        let client = self.clients.get_mut(&id).unwrap();
        let computed = planned.start + planned.len;
        let gone = |reason| Place::Gone(reason);
        if client.cancelled() {
            client.place = gone(if planted { EndReason::Failed } else { EndReason::Cancelled });
            return;
        }
        if planned.prompt_logits {
            client.tell_prompt(computed);
        }
        if planted {
            return client.fail();
        }
        if planned.samples {
            client.deliver();
            if !client.too_slow && computed + 1 == client.tokens.len() {
                client.deliver();
                let reason = if client.stops { FinishReason::Stop } else { FinishReason::Length };
                client.place = gone(EndReason::Finished(reason));
            }
        }
        if client.too_slow {
            self.seen.too_slow += 1;
            client.fail();
        }
    }

    /// Counts what the scheduler says has happened.
    fn notices(&mut self) {
        for notice in self.scheduler.notices() {
            match notice {
                Notice::Preempted => self.seen.preemptions += 1,
                Notice::Admitted { cached_tokens, .. } => {
                    self.seen.hit_tokens += cached_tokens.unwrap_or(0);
                }
                Notice::Ended { reason, .. } => {
                    *self.seen.ends.entry(reason.name()).or_default() += 1
                }
                Notice::Token { .. } => {}
            }
        }
    }

    /// No more clients: all that was begun comes to its end, and nothing is left over.
    pub fn close(&mut self) {
        while !self.scheduler.is_empty() {
            self.step();
            self.check();
        }
        self.step();
        assert!(self.plan.is_empty(), "a plan for nobody");
        for client in self.clients.values_mut() {
            while client.read() {}
            assert!(client.ended || client.cancelled(), "every stream has a last event");
        }
        assert_eq!((self.book.used(), self.scheduler.queued()), (0, (0, 0)));
        self.forget();
        assert!(self.clients.is_empty());
        assert_eq!(self.seen.ends, self.gone, "each sequence ends once, for its own reason");
    }
}

/// Beginnings of prompts. They are made of two pages only, so that equal pages follow different
/// ones.
fn prefixes(dice: &mut Dice, len: usize) -> Vec<Vec<u32>> {
    let pages = [dice.tokens(PAGE), dice.tokens(PAGE)];
    let mut prefix = || {
        let of = (0..len.div_ceil(PAGE)).map(|_| &pages[dice.between(0, 1)]);
        of.flatten().take(len).copied().collect()
    };
    (0..3).map(|_| prefix()).collect()
}

/// A lease on an adapter of its own digest; two of the same number are the same content.
fn lease(number: u8) -> Lease {
    let digest = Digest([number; 32]);
    Lease::detached(&format!("adapter-{number}"), digest, Slot(u32::from(number)))
}
