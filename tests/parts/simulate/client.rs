//! A client: what it asked for, what it must get, and what it got.
//!
//! Owns the reader's end of a stream and a count of what was sent into it. Never looks at the
//! scheduler. The thing to know: `foresee` computes the whole stream alone, before it is submitted.

use crate::simulate::mix;
use futures::FutureExt;
use polylora::adapters::version::Version;
use polylora::ending::EndReason;
use polylora::engine::request::{Event, EventStream, Request};
use std::collections::BTreeMap;
use std::sync::Arc;

pub const VOCAB: u32 = 6;

/// The "keys and values" of a token after `before`.
pub fn kv_after(before: u64, token: u32) -> u64 {
    mix(before ^ mix(u64::from(token) + 1))
}

/// The "model and sampler": what follows a token with these keys and values.
pub fn next_token(kv: u64, seed: u64, index: usize, banned: &[u32]) -> u32 {
    let mut token = (mix(kv ^ mix(seed) ^ index as u64) % u64::from(VOCAB)) as u32;
    while banned.contains(&token) {
        token = (token + 1) % VOCAB;
    }
    token
}

#[derive(Clone, Copy, PartialEq)]
pub enum Place {
    Queue,
    Admitted,
    Gone(EndReason),
}

/// One client: what it asked for, what it must get, and what it got.
pub struct Client {
    pub request: Request,
    pub len_max: usize,
    pub version: Option<Arc<Version>>,
    /// What stands before its first token in the model's KV memory.
    pub identity: u64,
    /// Prompt and all output, computed alone; and the KV of each.
    pub tokens: Vec<u32>,
    pub kv: Vec<u64>,
    pub stops: bool,
    pub place: Place,
    pub stream: Option<EventStream>,
    /// Unread events that fit, and how many there are.
    pub capacity: usize,
    pub unread: usize,
    pub too_slow: bool,
    pub prompt_told: usize,
    pub got: Vec<u32>,
    pub got_prompt: Vec<u32>,
    pub ended: bool,
    /// The step by which it must be gone.
    pub deadline: usize,
    /// Its tokens computed so far, each counted once.
    pub paid: usize,
    /// What each tenant had when it came.
    pub before: BTreeMap<String, u64>,
}

impl Client {
    /// Who asks for `request` of adapter number `adapter`, with room for `capacity` unread events.
    pub fn new(
        request: Request,
        adapter: u8,
        context: usize,
        stream: EventStream,
        capacity: usize,
    ) -> Self {
        let tenant = request.tenant.len() as u64;
        let mut client = Self {
            len_max: context.min(request.prompt.len() + request.tokens_max as usize),
            version: None,
            identity: mix(u64::from(adapter) * 100 + tenant + 1),
            tokens: Vec::new(),
            kv: Vec::new(),
            stops: false,
            place: Place::Queue,
            stream: Some(stream),
            capacity,
            unread: 0,
            too_slow: false,
            prompt_told: 0,
            got: Vec::new(),
            got_prompt: Vec::new(),
            ended: false,
            deadline: 0,
            paid: 0,
            before: BTreeMap::new(),
            request,
        };
        foresee(&mut client);
        client
    }

    pub fn alive(&self) -> bool {
        !matches!(self.place, Place::Gone(_))
    }
    pub fn cancelled(&self) -> bool {
        self.stream.is_none()
    }
    /// One event goes into the ring, if there is room and nothing was lost before.
    pub fn deliver(&mut self) {
        if self.unread == self.capacity {
            self.too_slow = true;
        }
        if !self.too_slow {
            self.unread += 1;
        }
    }
    /// The last event of a stream that failed takes the place of an unread one if it must.
    pub fn fail(&mut self) {
        self.unread = self.capacity.min(self.unread + 1);
        self.place = Place::Gone(EndReason::Failed);
    }
    /// Prompt tokens known to the reader once rows up to `computed` are.
    pub fn tell_prompt(&mut self, computed: usize) {
        while self.prompt_told < self.request.prompt.len().min(computed + 1) {
            self.prompt_told += 1;
            self.deliver();
        }
    }

    /// Reads one event, and checks it.
    pub fn read(&mut self) -> bool {
        let Some(stream) = &mut self.stream else {
            return false;
        };
        let Some(event) = stream.next().now_or_never() else {
            assert_eq!(self.unread, 0, "events were sent that do not arrive");
            return false;
        };
        let Some(event) = event else {
            assert!(self.ended && !self.alive(), "a stream ended without a last event");
            return false;
        };
        assert!(!self.ended, "an event after the last one");
        assert!(self.unread > 0, "more events than were sent");
        self.unread -= 1;
        match event {
            Event::Prompt(event) => {
                assert!(self.got.is_empty(), "prompt events come first");
                self.got_prompt.push(event.token);
            }
            Event::Token(event) => self.got.push(event.token),
            Event::Finished { prompt_tokens, cached_tokens, completion_tokens, reason } => {
                let end = EndReason::Finished(reason);
                assert!(self.place == Place::Gone(end), "finished as {reason:?}");
                self.ended = true;
                assert!(!self.too_slow, "a broken stream says it is whole");
                assert_eq!(prompt_tokens as usize, self.request.prompt.len());
                assert!(cached_tokens < prompt_tokens, "the last prompt row is computed");
                assert_eq!(completion_tokens as usize, self.got.len());
                assert_eq!(self.got, self.tokens[self.request.prompt.len()..], "whole output");
            }
            Event::Failed(_) => {
                self.ended = true;
                assert!(self.place == Place::Gone(EndReason::Failed), "failed for no reason");
            }
        }
        self.check_order();
        true
    }

    /// What was read is the beginning of what must come; in a stream that failed one unread event
    /// may have made room for the failure.
    fn check_order(&self) {
        let lost_max = usize::from(self.place == Place::Gone(EndReason::Failed));
        let output = &self.tokens[self.request.prompt.len()..];
        for (got, all) in [(&self.got, output), (&self.got_prompt, &self.request.prompt[..])] {
            let whole = all.starts_with(got);
            let lost = (0..got.len()).any(|i| {
                all.starts_with(&got[..i])
                    && all.get(i + 1..).is_some_and(|a| a.starts_with(&got[i..]))
            });
            assert!(whole || (lost_max == 1 && lost), "got {got:?} of {all:?}");
        }
    }
}

/// The whole stream of a client, computed alone.
fn foresee(client: &mut Client) {
    let request = &client.request;
    client.tokens = request.prompt.clone();
    let mut kv = client.identity;
    for position in 0.. {
        kv = kv_after(kv, client.tokens[position]);
        client.kv.push(kv);
        if position + 1 < client.tokens.len() {
            continue;
        }
        let index = client.tokens.len() - request.prompt.len();
        let early = index < request.tokens_min as usize;
        let banned = if early { &request.stop_tokens[..] } else { &[] };
        let token = next_token(kv, request.sampling.seed, index, banned);
        client.tokens.push(token);
        client.stops = request.stop_tokens.contains(&token);
        if client.stops || client.tokens.len() == client.len_max {
            return;
        }
    }
}
