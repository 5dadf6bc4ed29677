//! A scheduler driven step by step, with prompts that share nothing and tokens of no meaning.

use polylora::adapters::Digest;
use polylora::adapters::bank::Slot;
use polylora::adapters::registry::Lease;
use polylora::engine::pages::Pages;
use polylora::engine::request::{EventStream, Request, Sampling, TokenEvent, channel};
use polylora::engine::scheduler::{Budgets, Notice, Plan, Scheduler};
use polylora::engine::sequence::Sequence;
use std::collections::BTreeMap;
use std::time::Instant;

const BASE: Digest = Digest([9; 32]);
const CONTEXT: usize = 200;

pub fn budgets() -> Budgets {
    Budgets {
        rows_max: 64,
        logit_rows_max: 64,
        sequences_max: 8,
        quantum_tokens: 512,
        waiting_max: 64,
        waiting_tokens_max: 1 << 20,
        pages: 120,
    }
}

/// A request of `tenant` for adapter `number` (0 is the base): tokens of prompt and answer.
pub fn ask(tenant: &str, number: u8, prompt: usize, tokens: u32) -> Request {
    Request {
        prompt: vec![1; prompt],
        sampling: Sampling::default(),
        tokens_max: tokens,
        tokens_min: 0,
        stop_tokens: vec![],
        lease: (number > 0).then(|| lease(number).into()),
        tenant: tenant.to_owned(),
        weight: 1,
    }
}

fn lease(number: u8) -> Lease {
    let digest = Digest([number; 32]);
    Lease::detached(&format!("adapter-{number}"), digest, Slot(u32::from(number)))
}

struct Client {
    tenant: String,
    tokens: usize,
    tokens_max: usize,
    _stream: EventStream,
}

pub struct Rig {
    scheduler: Scheduler,
    book: Pages,
    plan: Plan,
    clients: BTreeMap<u64, Client>,
    pub preempted: usize,
    now: Instant,
}

impl Rig {
    pub fn new(budgets: Budgets) -> Self {
        Self {
            book: Pages::new(budgets.pages, false),
            plan: Plan::new(budgets.sequences_max),
            scheduler: Scheduler::new(budgets),
            clients: BTreeMap::new(),
            preempted: 0,
            now: Instant::now(),
        }
    }

    pub fn submit(&mut self, request: Request) -> u64 {
        self.submit_weighted(request, 1)
    }

    pub fn submit_weighted(&mut self, mut request: Request, weight: u32) -> u64 {
        request.weight = weight;
        let id = self.clients.len() as u64;
        let (sender, stream) = channel(2 * CONTEXT);
        let client = Client {
            tenant: request.tenant.clone(),
            tokens: 0,
            tokens_max: request.tokens_max as usize,
            _stream: stream,
        };
        self.clients.insert(id, client);
        let sequence = Sequence::new(id, request, &BASE, CONTEXT, sender, self.now);
        self.scheduler.submit(sequence);
        id
    }

    pub fn step(&mut self) {
        self.scheduler.plan(&mut self.book, self.now, &mut self.plan);
        let mut sampled = Vec::new();
        for planned in self.plan.entries() {
            let id = self.scheduler.running()[planned.sequence].id;
            let client = self.clients.get_mut(&id).expect("a client");
            client.tokens += usize::from(planned.samples);
            sampled.push(planned.samples.then(|| Ok(TokenEvent::unscored(1))));
        }
        self.scheduler.commit(&self.plan, &mut sampled, &mut self.book, self.now);
        let notices = self.scheduler.notices();
        self.preempted += notices.filter(|n| *n == Notice::Preempted).count();
    }

    pub fn queued(&self) -> usize {
        self.scheduler.queued().0
    }
    /// Sequences of a tenant that run.
    pub fn running(&self, tenant: &str) -> usize {
        self.scheduler.running().iter().filter(|s| s.tenant == tenant).count()
    }
    /// Tokens that a request has.
    pub fn tokens(&self, id: u64) -> usize {
        self.clients[&id].tokens
    }
    pub fn tokens_of(&self, tenant: &str) -> usize {
        self.clients.values().filter(|c| c.tenant == tenant).map(|c| c.tokens).sum()
    }
    pub fn is_over(&self, id: u64) -> bool {
        let client = &self.clients[&id];
        client.tokens == client.tokens_max
    }
}
