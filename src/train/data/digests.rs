//! Digests of lines: which lines are equal, and which files had a line.
//!
//! Owns the digest's form. Never keeps a line. The thing to know: it is of what a line says, so
//! spaces and the order of keys make no difference.

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::cmp::Ordering;

/// The first 16 bytes of SHA-256 over a line's JSON, without spaces and with all keys sorted.
pub type Digest = [u8; 16];

/// Of a line of JSON; of another text as it is.
pub fn digest(line: &str) -> Digest {
    serde_json::from_str(line).map_or_else(|_| hashed(line), digest_of)
}

/// The same of a line that was read.
pub fn digest_of(mut line: Value) -> Digest {
    line.sort_all_objects();
    hashed(&line.to_string())
}

fn hashed(text: &str) -> Digest {
    let whole: [u8; 32] = Sha256::digest(text.as_bytes()).into();
    whole.first_chunk().copied().unwrap_or_default()
}

/// Sorts, keeps one of each, and says how many were left out.
pub fn distinct(digests: &mut Vec<Digest>) -> u64 {
    let all = digests.len();
    digests.sort_unstable();
    digests.dedup();
    (all - digests.len()) as u64
}

/// How many different lines two files share, of their sorted digests.
pub fn shared(a: &[Digest], b: &[Digest]) -> u64 {
    let (mut i, mut k, mut both) = (0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(k)) {
        match x.cmp(y) {
            Ordering::Less => i += 1,
            Ordering::Greater => k += 1,
            Ordering::Equal => (i, k, both) = (i + 1, k + 1, both + 1),
        }
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_digest_is_of_what_a_line_says() {
        let line = r#"{"prompt": "à", "completion": {"b": [1, 2], "a": null}}"#;
        let other = r#"{"completion":{"a":null,"b":[1,2]},"prompt":"\u00e0"}"#;
        assert_eq!(digest(line), digest(other));
        assert_eq!(digest(line), digest_of(serde_json::from_str(other).unwrap()));
        // By Python: hashlib.sha256(b'{"a":1}').digest()[:16].hex()
        assert_eq!(hex::encode(digest(" {\"a\" : 1}")), "015abd7f5cc57a2dd94b7590f04ad808");
        assert_ne!(digest_of(json!({"a": [1, 2]})), digest_of(json!({"a": [2, 1]})));
        assert_ne!(digest("no json"), digest("no  json"));
    }
}
