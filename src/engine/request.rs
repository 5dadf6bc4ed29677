//! What comes to the engine and what leaves it: requests, events, and the bounded stream between.
//!
//! Owns the types both sides share. Never interprets text. The thing to know: the stream is a fixed
//! ring; the engine never waits for its reader, and dropping the reader is the cancellation.

use crate::adapters::composition::Composition;
use crate::ending::FinishReason;
use crate::error::Error;
use std::time::Duration;

/// How the next token is chosen. Checked at the edge; the engine trusts it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    pub min_p: f32,
    pub seed: u64,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// 1 is off. Over prompt and output, as Hugging Face does it.
    pub repetition_penalty: f32,
    /// (token, bias) added to the logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Top alternatives per generated token; `None`: no logprobs at all.
    pub logprobs: Option<u8>,
    /// The same for the prompt's tokens (echo).
    pub prompt_logprobs: Option<u8>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// One sequence to generate.
#[derive(Clone)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    /// Most tokens to generate, at least 1. prompt + tokens_max fits the context (checked at the
    /// edge).
    pub tokens_max: u32,
    /// No stop token may be sampled before this many.
    pub tokens_min: u32,
    /// Tokens that end the sequence (eos and the client's stop ids); the token itself is not shown
    /// as text.
    pub stop_tokens: Vec<u32>,
    /// `None` is the base model.
    pub lease: Option<Composition>,
    /// Whose turn is taken; empty for whoever has no tenant.
    pub tenant: String,
    /// Share of the tenant against others, at least 1.
    pub weight: u32,
}

/// Alternatives kept per token, at most.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// A token and what else might have stood there. Fixed size: events are written into a ring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenEvent {
    pub token: u32,
    /// Natural log of its probability before temperature and filters; NaN where not asked for (or
    /// the first prompt token).
    pub logprob: f32,
    pub top: [(u32, f32); TOP_LOGPROBS_MAX],
    pub top_len: u8,
}

#[derive(Debug, Clone)]
pub enum Event {
    /// A prompt token's logprobs (echo), in order, before the first `Token`.
    Prompt(TokenEvent),
    Token(TokenEvent),
    /// Last event of a stream that went well.
    Finished {
        reason: FinishReason,
        prompt_tokens: u32,
        cached_tokens: u32,
        completion_tokens: u32,
    },
    /// Last event of one that did not.
    Failed(Error),
}

/// What is known once a sequence is in its first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// Since its submission.
    pub waited: Duration,
}

pub use stream::{Admission, EventSender, EventStream};

mod stream {
    //! A ring with one writer that never waits and one reader that may.
    use super::{Admitted, Event};
    use crossbeam_queue::ArrayQueue;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, OnceLock};
    use tokio::sync::Notify;

    struct Ring {
        events: ArrayQueue<Event>,
        arrived: Notify,
        /// Beside the events, so that it needs no room among them.
        admitted: OnceLock<Admitted>,
        admission: Notify,
        reader_gone: AtomicBool,
        writer_gone: AtomicBool,
    }

    /// The engine's end.
    pub struct EventSender {
        ring: Arc<Ring>,
    }

    /// The client's end; dropping it cancels the sequence.
    pub struct EventStream {
        ring: Arc<Ring>,
    }

    /// Whether a stream's sequence is still in the queue. Holding it keeps nothing alive: only the
    /// stream's own end cancels.
    #[derive(Clone)]
    pub struct Admission {
        ring: Arc<Ring>,
    }

    impl Admission {
        /// `None` while the sequence has not been in a step.
        pub fn get(&self) -> Option<Admitted> {
            self.ring.admitted.get().copied()
        }
        /// Waits until it is, or its stream is over without.
        pub async fn wait(&self) {
            while self.get().is_none() && !self.ring.writer_gone.load(Ordering::Acquire) {
                self.ring.admission.notified().await;
            }
        }
    }

    /// A stream of at most `capacity` unread events.
    pub fn channel(capacity: usize) -> (EventSender, EventStream) {
        let ring = Arc::new(Ring {
            events: ArrayQueue::new(capacity),
            arrived: Notify::new(),
            admitted: OnceLock::new(),
            admission: Notify::new(),
            reader_gone: AtomicBool::new(false),
            writer_gone: AtomicBool::new(false),
        });
        (EventSender { ring: ring.clone() }, EventStream { ring })
    }

    impl EventSender {
        /// False when the reader is gone or too slow: the sequence is to be given up.
        pub fn send(&self, event: Event) -> bool {
            if self.is_cancelled() {
                return false;
            }
            let sent = self.ring.events.push(event).is_ok();
            self.ring.arrived.notify_one();
            sent
        }
        /// Says, once, that the sequence is in a step.
        pub fn admit(&self, admitted: Admitted) {
            if self.ring.admitted.set(admitted).is_ok() {
                self.ring.admission.notify_one();
            }
        }
        /// Replaces the oldest unread event if the ring is full: the last word always arrives.
        pub fn finish(self, event: Event) {
            self.ring.events.force_push(event);
        }
        pub fn is_cancelled(&self) -> bool {
            self.ring.reader_gone.load(Ordering::Acquire)
        }
    }

    impl Drop for EventSender {
        fn drop(&mut self) {
            self.ring.writer_gone.store(true, Ordering::Release);
            self.ring.arrived.notify_one();
            self.ring.admission.notify_one();
        }
    }

    impl EventStream {
        pub fn admission(&self) -> Admission {
            Admission { ring: self.ring.clone() }
        }
        /// The next event; `None` once the writer is gone and all was read.
        pub async fn next(&mut self) -> Option<Event> {
            loop {
                let gone = self.ring.writer_gone.load(Ordering::Acquire);
                if let Some(event) = self.ring.events.pop() {
                    return Some(event);
                }
                if gone {
                    return None;
                }
                self.ring.arrived.notified().await;
            }
        }
    }

    impl Drop for EventStream {
        fn drop(&mut self) {
            self.ring.reader_gone.store(true, Ordering::Release);
        }
    }
}
pub use stream::channel;
