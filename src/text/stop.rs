//! Stop strings across token borders.
//!
//! Owns the few characters that may be the start of a stop string. Never sees tokens. The thing to
//! know: the match that is complete first wins, and of those complete at the same character the
//! longest; so the outcome does not depend on how the text was cut into pieces, and a byte is
//! looked at once for each stop string however long they are.

use std::sync::Arc;

/// Stop strings, made ready once and shared by all choices of a request.
#[derive(Clone)]
pub struct Stops(Arc<[Needle]>);

/// A stop string and, for each of its beginnings, how long a shorter one is that it ends with
/// (Knuth, Morris and Pratt).
struct Needle {
    text: String,
    shorter: Vec<u32>,
}

impl Stops {
    /// Empty strings never match.
    pub fn new(stops: Vec<String>) -> Self {
        Self(stops.into_iter().filter(|s| !s.is_empty()).map(Needle::new).collect())
    }
}

impl Needle {
    fn new(text: String) -> Self {
        let mut needle = Self { shorter: vec![0; text.len()], text };
        for at in 1..needle.text.len() {
            let begun = needle.shorter[at - 1];
            needle.shorter[at] = needle.next(begun, needle.text.as_bytes()[at]);
        }
        needle
    }

    /// How much of it stands at the end of a text that goes on with `byte`, where `begun` bytes,
    /// not all, stood there before.
    fn next(&self, mut begun: u32, byte: u8) -> u32 {
        let text = self.text.as_bytes();
        while text[begun as usize] != byte {
            if begun == 0 {
                return 0;
            }
            begun = self.shorter[begun as usize - 1];
        }
        begun + 1
    }
}

/// Watches the text of one sequence for stop strings; holds back what might be the start of one.
pub struct StopStrings {
    stops: Stops,
    /// How much of each stands at the end of the text.
    begun: Vec<u32>,
    include: bool,
    /// The longest end of the text so far that some stop string starts with.
    held: String,
    stopped: bool,
}

/// What may be shown after a piece of text came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Show this; nothing matched yet.
    No(String),
    /// Show this and end: `stop` matched (and is left out unless `include`).
    Yes { text: String, stop: String },
}

impl StopStrings {
    /// `include`: the stop string itself is shown too.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self::of(&Stops::new(stops), include)
    }

    /// The same with stop strings that others share.
    pub fn of(stops: &Stops, include: bool) -> Self {
        let begun = vec![0; stops.0.len()];
        Self { stops: stops.clone(), begun, include, held: String::new(), stopped: false }
    }

    /// Text after a match is dropped.
    pub fn push(&mut self, text: &str) -> Stopped {
        if self.stopped {
            return Stopped::No(String::new());
        }
        let before = self.held.len();
        self.held.push_str(text);
        if let Some((read, stop)) = self.find(text.as_bytes()) {
            self.stopped = true;
            let end = before + read;
            let shown = if self.include { end } else { end - stop.len() };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(shown);
            return Stopped::Yes { text, stop };
        }
        // A stop string starts at a character's first byte, so does what is held.
        let begun = self.begun.iter().copied().max().unwrap_or(0) as usize;
        let rest = self.held.split_off(self.held.len() - begun);
        Stopped::No(std::mem::replace(&mut self.held, rest))
    }

    /// The held-back rest when the sequence ends otherwise.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The match that ends first, the longest of those: (bytes of `text` up to its end, stop).
    fn find(&mut self, text: &[u8]) -> Option<(usize, String)> {
        for (at, &byte) in text.iter().enumerate() {
            let mut longest: Option<&Needle> = None;
            for (needle, begun) in self.stops.0.iter().zip(&mut self.begun) {
                *begun = needle.next(*begun, byte);
                let whole = *begun as usize == needle.text.len();
                if whole && longest.is_none_or(|other| other.text.len() < needle.text.len()) {
                    longest = Some(needle);
                }
            }
            if let Some(needle) = longest {
                return Some((at + 1, needle.text.clone()));
            }
        }
        None
    }
}
