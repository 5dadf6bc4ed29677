//! Stop strings across token borders.

/// Watches the text of one sequence for stop strings; holds back what might be the start of one.
pub struct StopStrings {
    _stops: Vec<String>,
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
    pub fn new(stops: Vec<String>, _include: bool) -> Self {
        Self { _stops: stops }
    }
    pub fn push(&mut self, _text: &str) -> Stopped {
        unimplemented!()
    }
    /// The held-back rest when the sequence ends otherwise.
    pub fn finish(&mut self) -> String {
        unimplemented!()
    }
}
