//! Stop strings across token borders.
//!
//! Owns the few characters that may be the start of a stop string. Never sees tokens. The thing to
//! know: the match that is complete first wins, and of those complete at the same character the
//! longest; so the outcome does not depend on how the text was cut into pieces.

/// Watches the text of one sequence for stop strings; holds back what might be the start of one.
pub struct StopStrings {
    stops: Vec<String>,
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
    /// `include`: the stop string itself is shown too. Empty strings never match.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            include,
            held: String::new(),
            stopped: false,
        }
    }

    /// Text after a match is dropped.
    pub fn push(&mut self, text: &str) -> Stopped {
        if self.stopped {
            return Stopped::No(String::new());
        }
        self.held.push_str(text);
        if let Some((start, stop)) = self.find() {
            self.stopped = true;
            let shown = match self.include {
                true => start + stop.len(),
                false => start,
            };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(shown);
            return Stopped::Yes { text, stop };
        }
        let rest = self.held.split_off(self.held.len() - self.begun());
        Stopped::No(std::mem::replace(&mut self.held, rest))
    }

    /// The held-back rest when the sequence ends otherwise.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The match that ends first, the longest of those: (start, stop).
    fn find(&self) -> Option<(usize, String)> {
        self.stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start, stop)))
            .min_by_key(|(start, stop)| (start + stop.len(), *start))
            .map(|(start, stop)| (start, stop.clone()))
    }

    /// Bytes of the longest end of `held` that is a start of a stop string. A stop string starts at
    /// a character's first byte, so does what is held.
    fn begun(&self) -> usize {
        let held = self.held.as_bytes();
        self.stops
            .iter()
            .filter_map(|stop| {
                let stop = stop.as_bytes();
                (1..=held.len().min(stop.len() - 1)).rev().find(|&n| held.ends_with(&stop[..n]))
            })
            .max()
            .unwrap_or(0)
    }
}
