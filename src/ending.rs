//! How a sequence or a request ended: one type for the engine, the metrics and the usage log.
//!
//! Owns the words of our own pages. Never speaks another's: a wire format has its own mapping. The
//! thing to know: a client is told a [`FinishReason`] only, for it gets an error otherwise.

/// How one ended that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token was sampled, or a stop string found.
    Stop,
    /// Its tokens, or the context, were used up.
    Length,
}

/// How one ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndReason {
    Finished(FinishReason),
    /// Its client went away.
    Cancelled,
    Failed,
}

impl EndReason {
    pub const ALL: [Self; 4] = [
        Self::Finished(FinishReason::Stop),
        Self::Finished(FinishReason::Length),
        Self::Cancelled,
        Self::Failed,
    ];

    /// The word of metrics, usage records and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Finished(FinishReason::Stop) => "stop",
            Self::Finished(FinishReason::Length) => "length",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Whose word this is.
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == word)
    }

    /// Where it is in [`ALL`](Self::ALL): for a counter each, looked up once.
    pub fn index(self) -> usize {
        match self {
            Self::Finished(reason) => reason as usize,
            Self::Cancelled => 2,
            Self::Failed => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_word_and_a_place_of_its_own() {
        for (at, reason) in EndReason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), at, "{reason:?}");
            assert_eq!(EndReason::named(reason.name()), Some(reason));
        }
        assert_eq!(EndReason::named("tool_calls"), None);
    }
}
