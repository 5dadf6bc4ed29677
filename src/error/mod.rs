//! What can go wrong, sorted by whose turn it is to act.
//!
//! Owns the one error type that crosses modules. Never decides an HTTP status line or prints: `api`
//! and `cli` do. The thing to know: `Invalid` is the caller's to mend, `Busy` and `Capacity` pass
//! with time, `Fault` is ours.

pub mod codes;

use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with a stable machine-readable code and a message that names the offending thing.
#[derive(Debug, Clone)]
pub struct Error {
    pub kind: Kind,
    /// Stable snake_case code, e.g. `model_not_found`; has a row in [`codes`].
    pub code: &'static str,
    /// One sentence for a person; names the field, tensor, shape or digest.
    pub message: String,
    /// The request field to blame, if one is.
    pub param: Option<String>,
    /// Seconds after which trying again makes sense, where that is known.
    pub retry_after: Option<u64>,
}

/// Whose turn it is to act, in the words of HTTP statuses that clients know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 400: the request is malformed or asks for what cannot be.
    Invalid,
    /// 401
    Unauthorized,
    /// 403
    Forbidden,
    /// 404
    NotFound,
    /// 409: the state it assumes is not the state there is.
    Conflict,
    /// 412: the caller said what it expects, and it is not so.
    Precondition,
    /// 413
    TooLarge,
    /// 422: well-formed, but cannot be applied in full (adapters).
    Unprocessable,
    /// 429: queues are full; try again after a while.
    Busy,
    /// 503: shutting down, not ready, or the stream was given up.
    Unavailable,
    /// 507: no room for what was asked.
    Capacity,
    /// 500: ours.
    Fault,
}

/// Parsers quote their input, and input can be megabytes: no more of it is kept or copied.
const MESSAGE_BYTES_MAX: usize = 8 << 10;

impl Error {
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        debug_assert!(codes::known(code), "{code} has no row in error/codes.rs");
        let mut message = message.into();
        if message.len() > MESSAGE_BYTES_MAX {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
            message.push('…');
            message.shrink_to_fit();
        }
        Self { kind, code, message, param: None, retry_after: None }
    }
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, code, message)
    }
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, code, message)
    }
    pub fn unprocessable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Unprocessable, code, message)
    }
    pub fn fault(message: impl Into<String>) -> Self {
        Self::new(Kind::Fault, "internal_error", message)
    }
    /// Names the request field to blame.
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Characters of a client's text that a message repeats.
const SHOWN_CHARS: usize = 160;

/// A client's text as a message repeats it: its beginning, if it is long.
pub fn brief(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).collect()
}

/// Cuts a text of ours to so many characters, and shows that it did.
pub fn cut(text: &mut String, chars_max: usize) {
    if let Some((end, _)) = text.char_indices().nth(chars_max) {
        text.truncate(end);
        text.push('…');
    }
}

impl From<polylora_kernels::Error> for Error {
    /// What a device refuses or fails at is nothing that a request could mend.
    fn from(error: polylora_kernels::Error) -> Self {
        Self::fault(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_bounded_where_it_is_made() {
        let error = Error::fault("ä".repeat(10_000_000));
        assert!(error.message.len() < MESSAGE_BYTES_MAX + 10 && error.message.ends_with('…'));
        assert!(error.message.capacity() < 2 * MESSAGE_BYTES_MAX);
        assert_eq!(Error::fault("short").message, "short");
    }

    #[test]
    fn a_text_is_cut_between_characters_and_shows_it() {
        let cut = |text: &str| {
            let mut text = text.to_owned();
            cut(&mut text, 3);
            text
        };
        assert_eq!([cut(""), cut("äöü"), cut("äöüß")], ["", "äöü", "äöü…"]);
        assert_eq!(brief(&"ä".repeat(1000)).chars().count(), SHOWN_CHARS);
    }
}
