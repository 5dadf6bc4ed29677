//! The scheduler and the page book, one promise at a time.
//!
//! Each test drives a scheduler by hand, with tokens of its own choosing in place of a model. The
//! thing to know: what no hand would think of is `simulate`'s.

use futures::FutureExt;
use polylora::adapters::Digest;
use polylora::adapters::bank::Slot;
use polylora::adapters::registry::Lease;
use polylora::ending::FinishReason;
use polylora::engine::pages::Pages;
use polylora::engine::request::{Event, EventStream, Request, Sampling, TokenEvent, channel};
use polylora::engine::scheduler::{Budgets, Notice, Plan, Scheduler};
use polylora::engine::sequence::Sequence;
use polylora::error::Error;
use std::time::Instant;

const BASE: Digest = Digest([9; 32]);
const CONTEXT: usize = 200;

struct Rig {
    scheduler: Scheduler,
    book: Pages,
    plan: Plan,
    next_id: u64,
    now: Instant,
}

fn budgets() -> Budgets {
    Budgets {
        rows_max: 64,
        logit_rows_max: 16,
        sequences_max: 8,
        quantum_tokens: 512,
        waiting_max: 16,
        waiting_tokens_max: 4000,
        pages: 40,
    }
}

fn ask(prompt: &[u32], tokens_max: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: Sampling::default(),
        tokens_max,
        tokens_min: 0,
        stop_tokens: vec![],
        lease: None,
        tenant: String::new(),
        weight: 1,
    }
}

fn lease(number: u8) -> Lease {
    let digest = Digest([number; 32]);
    Lease::detached(&format!("adapter-{number}"), digest, Slot(u32::from(number)))
}

/// Tokens 0, 1, 2 … of a prompt that differs from others at once.
fn prompt(first: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| first + i).collect()
}

impl Rig {
    fn new(budgets: Budgets) -> Self {
        Self {
            book: Pages::new(budgets.pages, true),
            plan: Plan::new(budgets.sequences_max),
            scheduler: Scheduler::new(budgets),
            next_id: 0,
            now: Instant::now(),
        }
    }

    fn submit(&mut self, request: Request) -> EventStream {
        self.submit_with_room(request, 1000)
    }

    fn submit_with_room(&mut self, request: Request, capacity: usize) -> EventStream {
        let (sender, stream) = channel(capacity);
        let id = self.next_id;
        self.next_id += 1;
        let sequence = Sequence::new(id, request, &BASE, CONTEXT, sender, self.now);
        self.scheduler.submit(sequence);
        stream
    }

    /// Plans, and says (id, start, len) of what is planned, by id.
    fn plan(&mut self) -> Vec<(u64, usize, usize)> {
        self.scheduler.plan(&mut self.book, self.now, &mut self.plan);
        let id = |index: usize| self.scheduler.running()[index].id;
        let entries = self.plan.entries().iter();
        let mut rows: Vec<_> = entries.map(|p| (id(p.sequence), p.start, p.len)).collect();
        rows.sort_unstable();
        rows
    }

    /// Commits tokens that depend on the sequence and its length only.
    fn commit(&mut self) {
        let mut sampled = Vec::new();
        for planned in self.plan.entries().to_vec() {
            let sequence = &self.scheduler.running()[planned.sequence];
            let token = 1000 * (sequence.id as u32 + 1) + sequence.tokens.len() as u32;
            let prompt = sequence.tokens[..sequence.prompt_len].to_vec();
            sampled.push(planned.samples.then(|| Ok(TokenEvent::unscored(token))));
            if planned.prompt_logits {
                for row in planned.start..planned.start + planned.len {
                    if let Some(&token) = prompt.get(row + 1) {
                        let event = TokenEvent::unscored(token);
                        self.scheduler.prompt_scored(&planned, row, event);
                    }
                }
            }
        }
        self.scheduler.commit(&self.plan, &mut sampled, &mut self.book, self.now);
        let holders = self.scheduler.running().iter().map(|s| &s.pages[..]);
        self.book.check(holders);
    }

    fn step(&mut self) -> Vec<(u64, usize, usize)> {
        let rows = self.plan();
        self.commit();
        rows
    }

    fn run_to_the_end(&mut self) {
        while !self.scheduler.is_empty() {
            self.step();
        }
    }

    fn preemptions(&mut self) -> usize {
        self.scheduler.notices().filter(|n| *n == Notice::Preempted).count()
    }
}

fn next(stream: &mut EventStream) -> Option<Event> {
    stream.next().now_or_never().flatten()
}

/// (prompt tokens told, output tokens, last event) of a stream that has ended.
fn read(stream: &mut EventStream) -> (Vec<u32>, Vec<u32>, Event) {
    let (mut told, mut output) = (vec![], vec![]);
    loop {
        match next(stream).expect("a last event") {
            Event::Prompt(event) => told.push(event.token),
            Event::Token(event) => output.push(event.token),
            last => return (told, output, last),
        }
    }
}

fn code(event: Event) -> &'static str {
    match event {
        Event::Failed(error) => error.code,
        event => panic!("{event:?}"),
    }
}

#[test]
fn sequences_of_one_prompt_compute_it_once() {
    let mut rig = Rig::new(budgets());
    let streams: Vec<_> = (0..4).map(|_| rig.submit(ask(&prompt(0, 40), 2))).collect();
    assert_eq!(rig.step(), [(0, 0, 40)]);
    assert_eq!(rig.step(), [(0, 40, 1), (1, 32, 8), (2, 32, 8), (3, 32, 8)]);
    rig.run_to_the_end();
    for (i, mut stream) in streams.into_iter().enumerate() {
        let Event::Finished { cached_tokens, .. } = read(&mut stream).2 else { panic!() };
        assert_eq!(cached_tokens, if i == 0 { 0 } else { 32 });
    }
}

#[test]
fn a_long_prompt_in_chunks_is_computed_once_too() {
    let mut rig = Rig::new(Budgets { rows_max: 50, ..budgets() });
    let _streams: Vec<_> = (0..2).map(|_| rig.submit(ask(&prompt(0, 120), 9))).collect();
    assert_eq!(rig.step(), [(0, 0, 50)]);
    assert_eq!(rig.step(), [(0, 50, 50)]);
    assert_eq!(rig.step(), [(0, 100, 20)]);
    assert_eq!(rig.step(), [(0, 120, 1), (1, 112, 8)]);
}

#[test]
fn a_prompt_found_whole_still_computes_its_last_page() {
    let mut rig = Rig::new(budgets());
    let _first = rig.submit(ask(&prompt(0, 32), 1));
    rig.run_to_the_end();
    let _second = rig.submit(ask(&prompt(0, 32), 1));
    assert_eq!(rig.step(), [(1, 16, 16)]);
}

#[test]
fn an_answer_is_found_again_as_the_next_prompt() {
    let mut rig = Rig::new(budgets());
    let mut stream = rig.submit(ask(&prompt(0, 10), 30));
    rig.run_to_the_end();
    let mut longer = prompt(0, 10);
    longer.extend(read(&mut stream).1);
    let _next = rig.submit(ask(&longer, 1));
    assert_eq!(rig.step(), [(1, 32, 8)]);
}

#[test]
fn nothing_is_found_across_identities() {
    let mut rig = Rig::new(budgets());
    let base = ask(&prompt(0, 40), 1);
    let mut acme = base.clone();
    acme.tenant = "acme".into();
    let adapted = |number| Request { lease: Some(lease(number).into()), ..base.clone() };
    for (request, start) in [
        (base.clone(), 0),
        (adapted(1), 0),
        (adapted(2), 0),
        (acme.clone(), 0),
        (base.clone(), 32),
        (adapted(1), 32),
        (adapted(2), 32),
        (acme, 32),
    ] {
        let _stream = rig.submit(request);
        assert_eq!(rig.step()[0].1, start);
        rig.run_to_the_end();
    }
}

#[test]
fn the_newest_is_preempted_and_its_stream_goes_on_unchanged() {
    let alone = |first| {
        let mut rig = Rig::new(budgets());
        rig.next_id = first;
        let mut stream = rig.submit(ask(&prompt(100 * first as u32, 30), 60));
        rig.run_to_the_end();
        read(&mut stream).1
    };
    // Two of six pages each, at the end; seven in all.
    let mut rig = Rig::new(Budgets { pages: 7, ..budgets() });
    let mut streams: Vec<_> = (0..2).map(|i| rig.submit(ask(&prompt(100 * i, 30), 60))).collect();
    while rig.scheduler.running().len() != 1 {
        rig.step();
    }
    assert_eq!(rig.scheduler.running()[0].id, 0, "the oldest goes on");
    assert_eq!(rig.scheduler.waiting()[0].id, 1);
    assert_eq!(rig.preemptions(), 1);
    rig.run_to_the_end();
    for (i, stream) in streams.iter_mut().enumerate() {
        assert_eq!(read(stream).1, alone(i as u64));
    }
}

#[test]
fn nobody_overtakes_one_that_waits_for_pages() {
    let mut rig = Rig::new(Budgets { pages: 6, ..budgets() });
    let _small = rig.submit(ask(&prompt(0, 40), 5));
    let _big = rig.submit(ask(&prompt(100, 80), 5));
    let _tiny = rig.submit(ask(&prompt(300, 3), 5));
    for _ in 0..5 {
        assert_eq!(rig.step().len(), 1, "the tiny one would fit, but it came last");
    }
    assert_eq!(rig.step()[0], (1, 0, 64));
}

#[test]
fn prefill_never_starves_decode() {
    let mut rig = Rig::new(Budgets { rows_max: 8, ..budgets() });
    let _streams: Vec<_> = (0..3).map(|i| rig.submit(ask(&[i], 20))).collect();
    rig.step();
    let _long = rig.submit(ask(&prompt(10, 100), 5));
    for chunk in 0..10 {
        let start = 5 * chunk;
        assert_eq!(rig.step()[2..], [(2, 1 + chunk, 1), (3, start, 5)]);
    }
}

#[test]
fn no_more_run_than_get_a_row_each_step() {
    let mut rig = Rig::new(Budgets { logit_rows_max: 3, ..budgets() });
    let _streams: Vec<_> = (0..6).map(|i| rig.submit(ask(&[i], 20))).collect();
    for _ in 0..20 {
        assert_eq!(rig.step().len(), 3);
    }
}

#[test]
fn prompt_logprobs_take_no_hits_and_stay_within_the_logit_rows() {
    let mut rig = Rig::new(budgets());
    let _first = rig.submit(ask(&prompt(0, 40), 1));
    rig.run_to_the_end();
    let mut echo = ask(&prompt(0, 40), 1);
    echo.sampling.prompt_logprobs = Some(0);
    let mut stream = rig.submit(echo);
    assert_eq!(rig.step(), [(1, 0, 16)]);
    assert_eq!(rig.step(), [(1, 16, 16)]);
    assert_eq!(rig.step(), [(1, 32, 8)]);
    let (told, output, _) = read(&mut stream);
    assert_eq!((told, output.len()), (prompt(0, 40), 1));
}

#[test]
fn prompt_events_are_told_once_though_the_prompt_is_computed_twice() {
    let mut rig = Rig::new(Budgets { pages: 8, logit_rows_max: 2, ..budgets() });
    let _old = rig.submit(ask(&prompt(0, 16), 80));
    let mut echo = ask(&prompt(200, 70), 2);
    echo.sampling.prompt_logprobs = Some(0);
    let mut stream = rig.submit(echo);
    rig.run_to_the_end();
    assert!(rig.preemptions() > 0, "the echo was sent back on its way");
    let (told, output, last) = read(&mut stream);
    assert_eq!((told, output.len()), (prompt(200, 70), 2));
    assert!(matches!(last, Event::Finished { cached_tokens: 0, .. }));
}

#[test]
fn a_failed_step_ends_its_own_sequences_only_and_leaves_no_prefix() {
    let mut rig = Rig::new(Budgets { sequences_max: 1, ..budgets() });
    let mut first = rig.submit(ask(&prompt(0, 40), 5));
    let mut second = rig.submit(ask(&prompt(0, 40), 5));
    assert_eq!(rig.plan(), [(0, 0, 40)]);
    rig.scheduler.abort_planned(&rig.plan, &mut rig.book, &Error::fault("planted"));
    assert_eq!(code(read(&mut first).2), "internal_error");
    assert_eq!(rig.step(), [(1, 0, 40)], "what the failed step wrote is not found");
    rig.run_to_the_end();
    assert!(matches!(read(&mut second).2, Event::Finished { .. }));
}

#[test]
fn a_cancelled_sequence_gives_everything_back_before_the_next_step() {
    let mut rig = Rig::new(Budgets { sequences_max: 1, ..budgets() });
    let leases = [lease(1), lease(2)];
    let adapted =
        |i: usize| Request { lease: Some(leases[i].clone().into()), ..ask(&prompt(0, 40), 50) };
    let [running, waiting] = [rig.submit(adapted(0)), rig.submit(adapted(1))];
    rig.step();
    let versions = leases.map(|lease| lease.version().clone());
    drop((running, waiting));
    assert_eq!(rig.plan(), []);
    assert!(rig.scheduler.is_empty());
    assert_eq!((rig.book.used(), rig.scheduler.queued()), (0, (0, 0)));
    for version in versions {
        assert_eq!(std::sync::Arc::strong_count(&version), 1);
    }
}

#[test]
fn a_slow_reader_loses_its_stream_and_nobody_elses() {
    let mut rig = Rig::new(budgets());
    let mut slow = rig.submit_with_room(ask(&[1], 20), 3);
    let mut quick = rig.submit(ask(&[2], 20));
    rig.run_to_the_end();
    assert_eq!(code(read(&mut slow).2), "stream_too_slow");
    assert_eq!(read(&mut quick).1.len(), 20);
}

#[test]
fn a_stream_ends_at_a_stop_token_or_at_its_length_or_at_the_context() {
    let mut rig = Rig::new(budgets());
    let mut stops = ask(&[1, 2], 20);
    stops.stop_tokens = vec![1005];
    let mut stopped = rig.submit(stops);
    let mut long = rig.submit(ask(&[1, 2], 20));
    let mut full = rig.submit(ask(&[1, 2], 1_000));
    rig.run_to_the_end();
    for (stream, tokens, end) in [
        (&mut stopped, 4, FinishReason::Stop),
        (&mut long, 20, FinishReason::Length),
        (&mut full, CONTEXT - 2, FinishReason::Length),
    ] {
        let (_, output, last) = read(stream);
        let Event::Finished { reason, completion_tokens, .. } = last else { panic!("{last:?}") };
        assert_eq!((output.len(), completion_tokens as usize, reason), (tokens, tokens, end));
    }
}

#[test]
fn stop_tokens_are_banned_until_tokens_min() {
    let (sender, _stream) = channel(1);
    let request = Request { tokens_min: 1, stop_tokens: vec![7], ..ask(&[1], 5) };
    let mut sequence = Sequence::new(0, request, &BASE, CONTEXT, sender, Instant::now());
    assert_eq!(sequence.history().banned, [7]);
    sequence.tokens.push(3);
    assert_eq!(sequence.history().banned, [0; 0]);
}

#[test]
fn a_stream_that_lost_an_event_sends_no_other_after_it() {
    let mut rig = Rig::new(budgets());
    let mut echo = ask(&prompt(0, 8), 5);
    echo.sampling.prompt_logprobs = Some(0);
    let mut stream = rig.submit_with_room(echo, 4);
    rig.plan();
    let planned = rig.plan.entries()[0];
    for row in 0..7 {
        let event = TokenEvent::unscored(row as u32 + 1);
        rig.scheduler.prompt_scored(&planned, row, event);
        if row == 5 {
            next(&mut stream); // too late: two are lost
        }
    }
    let mut sampled = vec![Some(Ok(TokenEvent::unscored(1)))];
    rig.scheduler.commit(&rig.plan, &mut sampled, &mut rig.book, rig.now);
    let (told, output, last) = read(&mut stream);
    assert_eq!((told, output), (vec![1, 2, 3], vec![]));
    assert_eq!(code(last), "stream_too_slow");
}

#[test]
fn a_newcomer_leaves_each_running_sequence_a_page_to_grow() {
    for (pages, admitted) in [(5, 1), (6, 2)] {
        let mut rig = Rig::new(Budgets { pages, ..budgets() });
        let _old = rig.submit(ask(&prompt(0, 30), 20));
        let _new = rig.submit(ask(&prompt(100, 48), 20));
        rig.step();
        assert_eq!(rig.scheduler.running().len(), admitted, "of {pages} pages");
    }
}
