//! What requests may hold before they are queued: bytes, and permits to work.
//!
//! Owns the pools and the bounds that follow from `request_bytes_max`. Never does the work. The
//! thing to know: bounds are such that one request's worst case is less than the half that a tenant
//! may hold alone, so on an idle server nothing is refused for want of bytes.

use crate::access::Caller;
use crate::blocking::{blocking, on_own_thread};
use crate::config::{Config, limits};
use crate::error::{Error, Kind, Result};
use crate::share::{Permit, Pool};
use crate::text::Text;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a value of a parsed tree takes beside its text, measured: an object of one field, and its
/// share of a list that grows.
const TREE_VALUE_BYTES: u64 = 350;
/// What a token id takes in a list that grows.
const ID_BYTES: u64 = 12;
/// What the tokenizer takes for a byte of text and, besides, for each token of it. Measured on 15
/// kinds of text of 400 kB: 63 to 84 bytes where tokens are long, 380 where each byte is one.
const TEXT_BYTE_BYTES: u64 = 100;
const TOKEN_BYTES: u64 = 320;
/// Values in all of a body that is no list of token ids.
const TREE_VALUES_MAX: u64 = 65_536;
/// Texts up to so many bytes are encoded at the priority of everything else.
pub const SHORT_TEXT_BYTES: usize = 16 << 10;
/// Bodies up to so many bytes are parsed where they arrive.
pub const SHORT_BODY_BYTES: usize = 16 << 10;
/// Of a larger one, what follows these bytes is read in pieces, in turns.
pub const LONG_BODY_BYTES: usize = 256 << 10;
/// What is read in one turn, and how long it takes at least: a body of 4 MiB takes 60 ms, and all
/// of a tenant's together come no faster.
const TURN_BYTES: usize = 64 << 10;
const TURN_TIME: Duration = Duration::from_millis(1);
/// Processes that render templates of adapters at once. A tenant alone has two of them.
pub const RENDERS_MAX: u64 = 3;
/// What an upload may hold at once of what it sends: heads of parts, and chunks on their way to the
/// disk.
pub const UPLOAD_BYTES: u64 = 2 << 20;

/// So many bytes taken leave enough pages behind to be worth giving back.
const BUSY_BYTES: u64 = 8 << 20;

/// How much one request may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    pub body_bytes: usize,
    /// Values of a body, but for lists of token ids.
    pub tree_values: u64,
    /// Values of lists of token ids.
    pub ids: u64,
    /// Of a text to be encoded: no more bytes can be tokens of one context.
    pub text_bytes: usize,
    /// Whether `request_bytes_max` says so rather than the context.
    pub held_down: bool,
    pub context: usize,
}

impl Bounds {
    /// `token_bytes_max`: the longest text that a token can stand for.
    pub fn new(config: &Config, context: usize, token_bytes_max: usize) -> Self {
        let half = config.request_bytes_max.0 / 2;
        // 3/8 of the half for a body (itself, a copy of its fields, and their texts), a quarter for
        // its values, an eighth for ids; the parsed texts stay while they are encoded, and what
        // parsing took besides is free again by then.
        let body_bytes = config.body_bytes_max(context).min(half / 8);
        let encoding = half - 2 * body_bytes;
        let fixed = TOKEN_BYTES * counted_max(context);
        let affordable = match encoding.checked_sub(fixed) {
            Some(rest) if rest > encoding / 4 => rest / TEXT_BYTE_BYTES,
            _ => encoding / (TEXT_BYTE_BYTES + TOKEN_BYTES),
        };
        let fitting = (context as u64 + 64).saturating_mul(token_bytes_max as u64);
        let choices = limits::CHOICES_MAX as u64;
        Self {
            body_bytes: body_bytes as usize,
            tree_values: TREE_VALUES_MAX.min(half / 4 / TREE_VALUE_BYTES),
            ids: ((context as u64 + 1) * choices).min(half / 8 / ID_BYTES),
            text_bytes: usize::try_from(fitting.min(affordable)).unwrap_or(usize::MAX),
            held_down: affordable < fitting,
            context,
        }
    }

    /// Refuses a text that cannot be encoded within a context. Errors: `context_length_exceeded`.
    pub fn fits(&self, bytes: usize, param: &str) -> Result<()> {
        if bytes <= self.text_bytes {
            return Ok(());
        }
        Err(self.exceeded(&format!("the text has {bytes} bytes")).param(param))
    }

    /// Refuses more token ids than a context holds. Errors: `context_length_exceeded`.
    pub fn fit(&self, tokens: usize, param: &str) -> Result<()> {
        if tokens <= self.context {
            return Ok(());
        }
        let message = format!("the context is {} tokens; `{param}` has {tokens}", self.context);
        Err(Error::invalid("context_length_exceeded", message).param(param))
    }

    pub fn exceeded(&self, what: &str) -> Error {
        let (bytes, context) = (self.text_bytes, self.context);
        let why = match self.held_down {
            true => "request_bytes_max lets one request encode",
            false => "a context can hold",
        };
        let message = format!(
            "the context is {context} tokens; {what}, and {bytes} bytes are the most that {why}"
        );
        Error::invalid("context_length_exceeded", message)
    }

    /// Bytes that encoding a text takes at its peak.
    pub fn encoding(&self, bytes: usize) -> u64 {
        let bytes = bytes as u64;
        TEXT_BYTE_BYTES * bytes + TOKEN_BYTES * bytes.min(counted_max(self.context))
    }
}

/// Tokens that a text may turn out to have when it is encoded whole: longer ones were counted piece
/// by piece before, and refused.
fn counted_max(context: usize) -> u64 {
    (crate::text::bounded::surely_too_many(context) + SHORT_TEXT_BYTES) as u64
}

/// Bytes that reading a body's fields takes: the values of trees, and token ids.
pub fn parsing(body_bytes: usize, tree_values: u64, ids: u64) -> u64 {
    2 * body_bytes as u64 + TREE_VALUE_BYTES * tree_values + ID_BYTES * ids
}

/// The pools. A tenant may hold as much of each as it leaves free.
pub struct Intake {
    bytes: Arc<Pool>,
    /// Bytes taken since somebody asked.
    taken: AtomicU64,
    /// Turns to read a piece of a long body.
    readers: Arc<Pool>,
    /// Short texts being encoded.
    encoders: Arc<Pool>,
    /// Long texts being encoded, and large bodies being parsed: a tenant alone has half of the
    /// cores for them, so that the other half is there at once for what serves.
    long: Arc<Pool>,
    /// Templates of adapters being rendered.
    pub renders: Arc<Pool>,
    /// Uploads being received.
    uploads: Arc<Pool>,
    pub bounds: Bounds,
}

impl Intake {
    pub fn new(config: &Config, context: usize, text: &Text) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from) as u64;
        Self {
            bytes: Pool::new(config.request_bytes_max.0),
            taken: AtomicU64::new(0),
            readers: Pool::new(2),
            encoders: Pool::new((2 * cores).clamp(4, 12)),
            long: Pool::new(cores.clamp(2, 12)),
            renders: Pool::new(RENDERS_MAX),
            uploads: Pool::new(limits::UPLOADS_MAX as u64),
            bounds: Bounds::new(config, context, text.token_bytes_max()),
        }
    }

    /// Bytes for a request of `caller`, given back when dropped. Errors:
    /// `request_memory_exhausted`.
    pub fn hold(&self, caller: &Caller, bytes: u64) -> Result<Held> {
        self.took(bytes);
        Held::of(&self.bytes, caller.tenant().unwrap_or_default(), bytes)
    }

    /// A permit for one more upload. Errors: `uploads_busy`.
    pub fn upload(&self, caller: &Caller) -> Result<Permit> {
        let (uploads, tenant) = (&self.uploads, caller.tenant().unwrap_or_default());
        let busy = |what: String| {
            let message = format!("{what} are being received; try again");
            Error::new(Kind::Busy, "uploads_busy", message)
        };
        let own = caller.limits().uploads_max.filter(|_| !tenant.is_empty());
        if let Some(most) = own.filter(|most| uploads.held_by(tenant) >= *most) {
            return Err(busy(format!("{most} uploads of your tenant, which is your key's limit,")));
        }
        uploads.try_take(tenant, 1).ok_or_else(|| {
            let share = if tenant.is_empty() { "" } else { ", or your tenant's share of them," };
            busy(format!("{} uploads{share}", uploads.size()))
        })
    }

    /// A permit for work on a request of `caller`.
    pub async fn permit(&self, caller: &Caller, long: bool) -> Permit {
        let pool = if long { &self.long } else { &self.encoders };
        pool.take(caller.tenant().unwrap_or_default()).await
    }

    /// Waits for `caller`'s turns to have read so many bytes of a long body. Nothing is held while
    /// its client sends.
    pub async fn read_turns(&self, caller: &Caller, bytes: usize) {
        let _turn = self.readers.take(caller.tenant().unwrap_or_default()).await;
        tokio::time::sleep(TURN_TIME * bytes.div_ceil(TURN_BYTES) as u32).await;
    }

    /// Takes note of bytes that will be free again, and may then stay with the allocator.
    pub fn took(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether much was taken since this was asked last: the allocator keeps pages of it.
    pub fn was_busy(&self) -> bool {
        self.taken.swap(0, Ordering::Relaxed) >= BUSY_BYTES
    }
}

/// What a request holds of the bytes.
pub struct Held {
    permit: Permit,
    bytes: u64,
    pool: Arc<Pool>,
}

impl Held {
    /// Bytes of `pool` for `tenant`. Errors: `request_memory_exhausted`.
    pub fn of(pool: &Arc<Pool>, tenant: &str, bytes: u64) -> Result<Self> {
        match pool.try_take(tenant, bytes) {
            Some(permit) => Ok(Self { permit, bytes, pool: pool.clone() }),
            None => Err(exhausted(pool, tenant)),
        }
    }

    /// Holds so many bytes from now on. Errors: `request_memory_exhausted`.
    pub fn resize(&mut self, bytes: u64) -> Result<()> {
        if bytes > self.bytes && !self.permit.try_grow(bytes - self.bytes) {
            return Err(exhausted(&self.pool, self.permit.tenant()));
        }
        self.permit.shrink_to(bytes);
        self.bytes = bytes;
        Ok(())
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn exhausted(pool: &Pool, tenant: &str) -> Error {
    let size = pool.size();
    let whose = match tenant {
        "" => format!("requests hold {} of request_bytes_max = {size} bytes", pool.held()),
        _ => format!(
            "your tenant's requests may hold as much of request_bytes_max = {size} bytes as is \
             left free"
        ),
    };
    let message = format!("there is no memory for this request now: {whose}; try again");
    let error = Error::new(Kind::Busy, "request_memory_exhausted", message);
    Error { retry_after: Some(1), ..error }
}

/// Runs `work` where it delays no other request: on a blocking thread, or, when it is `long`, on
/// one of its own that the machine runs after everything that serves. The permit is kept as long
/// as the work, so that clients who hang up cannot pile up more of it.
pub async fn apart<T: Send + 'static>(
    permit: Permit,
    long: bool,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let work = move || {
        let _permit = permit;
        work()
    };
    if !long {
        let span = tracing::Span::current();
        return blocking(move || span.in_scope(work)).await;
    }
    let give_way = || {
        if !polylora_kernels::give_way() {
            tracing::debug!("an encoding thread keeps its priority");
        }
    };
    on_own_thread("encode", give_way, work).await.unwrap_or_else(|e| {
        Err(Error::new(Kind::Busy, "request_memory_exhausted", format!("no thread: {e}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Given;
    use futures::FutureExt;

    #[test]
    fn one_requests_worst_case_is_within_half_of_the_bytes() {
        for bytes in [16u64 << 20, 64 << 20, 1 << 30] {
            for context in [512, 8192, 32_768, 131_072] {
                for token_bytes in [1, 16, 256] {
                    let given = Given::of(&[("request_bytes_max", &bytes.to_string())]);
                    let config = Config::load(None, given).expect("good settings");
                    let bounds = Bounds::new(&config, context, token_bytes);
                    let body = bounds.body_bytes as u64;
                    let parsed = parsing(bounds.body_bytes, bounds.tree_values, bounds.ids);
                    assert!(body + parsed <= bytes / 2, "{bounds:?}");
                    let text = bounds.text_bytes;
                    assert!(2 * body + bounds.encoding(text) <= bytes / 2, "{bounds:?}");
                    assert!(bounds.fits(text, "x").is_ok() && bounds.fits(text + 1, "x").is_err());
                }
            }
        }
    }

    /// A tenant's encoders are as many as it leaves free, and clients who hang up take none back
    /// before the work is over.
    #[tokio::test]
    async fn encoders_of_one_tenant_leave_another_its_permits() {
        let encoders = Pool::new(4);
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        for long in [false, true] {
            let (permit, held) = (encoders.take("mallory").await, held.clone());
            let work = move || {
                let _ = held.lock().map(|held| held.recv());
                Ok(())
            };
            // Begun, and then given up by its client.
            assert!(apart(permit, long, work).now_or_never().is_none());
        }
        assert_eq!(encoders.held_by("mallory"), 2, "of four");
        let mut third = Box::pin(encoders.take("mallory"));
        assert!((&mut third).now_or_never().is_none(), "it waits for one of its own");
        let permit = encoders.take("canary").now_or_never().expect("one that mallory left");
        assert_eq!(apart(permit, true, || Ok(7)).await.ok(), Some(7));
        release.send(()).expect("the first work waits");
        assert_eq!(third.await.tenant(), "mallory");
        assert_eq!(encoders.held_by("canary"), 0);
    }
}
