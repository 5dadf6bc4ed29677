//! Random numbers that are the same wherever a merge or a training job runs.
//!
//! Owns one small generator (SplitMix64) and how a part of a job becomes its seed. Never keeps
//! state between parts. The thing to know: a stream is named by words, so the numbers of a site, or
//! of an epoch, depend neither on the order of the others nor on threads.

/// A named stream of numbers.
pub struct Stream(u64);

impl Stream {
    /// The stream of these words; streams of different words are unrelated.
    pub fn new(words: &[u64]) -> Self {
        Self(words.iter().fold(0x243f_6a88_85a3_08d3, |state, word| mixed(state ^ mixed(*word))))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }

    /// Uniform in [0, 1), in steps of 2^-53.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A text as a word (FNV-1a).
pub fn word(text: &str) -> u64 {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

fn mixed(word: u64) -> u64 {
    let mut z = word;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
