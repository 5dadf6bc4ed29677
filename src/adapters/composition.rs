//! What a request is computed with: one adapter, or the weighted sum of several.
//!
//! Owns what may be summed and what a sum is called. Never merges factors: the parts are summed
//! row by row, from where they lie. The thing to know: the parts are in the order of their
//! contents, whatever was asked, so the same parts and weights are one identity and give the same
//! bits; one part of weight 1 is that adapter and nothing else.

use super::Digest;
use super::bank::{AdapterMix, Bank, PARTS_MAX};
use super::format::{Summary, config::RANK_MAX};
use super::registry::Lease;
use super::version::Version;
use crate::error::{Error, Result, brief};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;

/// Leased parts with their weights. Cheap to clone; the last drop lets all of them go.
#[derive(Clone)]
pub struct Composition {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Vec<Part>,
    mix: AdapterMix,
    digest: Digest,
}

/// One adapter of a composition and its weight.
pub struct Part {
    pub lease: Lease,
    pub weight: f32,
}

impl Part {
    fn version(&self) -> &Arc<Version> {
        self.lease.version()
    }

    /// `name@version`, with `:weight` where that is not 1.
    fn id(&self) -> String {
        let id = self.version().id();
        if self.weight == 1.0 { id } else { format!("{id}:{}", self.weight) }
    }
}

impl From<Lease> for Composition {
    /// The adapter alone, as it is.
    fn from(lease: Lease) -> Self {
        let digest = lease.version().digest;
        let mix = lease.slot().into();
        Self { inner: Arc::new(Inner { parts: vec![Part { lease, weight: 1.0 }], mix, digest }) }
    }
}

impl Composition {
    /// The sum of these, each times its weight, which [`weight`] made. Errors: `duplicate_adapter`,
    /// `not_composable`, `rank_out_of_range`.
    ///
    /// # Panics
    /// On no parts, or more than `PARTS_MAX`: checked before they were leased.
    pub fn new(mut parts: Vec<Part>) -> Result<Self> {
        assert!((1..=PARTS_MAX).contains(&parts.len()), "{} parts", parts.len());
        if let [Part { weight: 1.0, lease }] = &parts[..] {
            return Ok(lease.clone().into());
        }
        parts.sort_by_key(|part| part.version().digest.0);
        for two in parts.windows(2) {
            let [one, other] = [0, 1].map(|i| two[i].version());
            if one.digest == other.digest {
                return Err(duplicate(&one.id(), &other.id()));
            }
        }
        parts.iter().try_for_each(|part| check_part(part.version()))?;
        let ranks: usize = parts.iter().map(|part| part.version().summary.rank_max).sum();
        if ranks > RANK_MAX {
            let ids: Vec<String> = parts.iter().map(|part| part.version().id()).collect();
            let ids = ids.join("`, `");
            let message =
                format!("the ranks of `{ids}` add up to {ranks}; at most {RANK_MAX} can be summed");
            return Err(Error::unprocessable("rank_out_of_range", message));
        }
        let slots = parts.iter().map(|part| (part.lease.slot(), part.weight));
        let mix = AdapterMix::new(slots);
        let weighted = parts.iter().map(|part| (part.version().digest, part.weight));
        let digest = digest(weighted);
        Ok(Self { inner: Arc::new(Inner { parts, mix, digest }) })
    }

    /// In the order in which they are summed.
    pub fn parts(&self) -> &[Part] {
        &self.inner.parts
    }

    /// The version, where it is one adapter as it is.
    pub fn alone(&self) -> Option<&Arc<Version>> {
        match self.parts() {
            [part] if part.weight == 1.0 => Some(part.version()),
            _ => None,
        }
    }

    /// The versions, in the order in which they are summed.
    pub fn versions(&self) -> impl Iterator<Item = &Arc<Version>> {
        self.parts().iter().map(Part::version)
    }

    /// Identity of what it computes: the version's digest where it is one adapter as it is, else
    /// [`digest`].
    pub fn digest(&self) -> Digest {
        self.inner.digest
    }

    /// As a client may ask for it: `pirate@1:0.7+sql@2`, by name.
    pub fn id(&self) -> String {
        let mut ids: Vec<String> = self.parts().iter().map(Part::id).collect();
        ids.sort();
        ids.join("+")
    }

    /// Where its parts are in the bank.
    pub fn mix(&self) -> AdapterMix {
        self.inner.mix
    }

    /// Says why when the lease of a part is revoked.
    pub fn revoked(&self) -> Option<Error> {
        self.parts().iter().find_map(|part| part.lease.revoked())
    }

    /// # Panics
    /// When a part's slot holds another content than was leased: wrong weights are a loud bug.
    pub fn check_in(&self, bank: &Bank) {
        for part in self.parts() {
            let (slot, leased) = (part.lease.slot(), part.version().digest);
            assert_eq!(bank.digest(slot), Some(leased), "slot {slot:?} holds another adapter");
        }
    }
}

/// The identity of a sum of contents: of each one's digest and the bits of its weight, in the order
/// of the contents.
pub fn digest(parts: impl Iterator<Item = (Digest, f32)>) -> Digest {
    let mut parts: Vec<_> = parts.map(|(digest, weight)| (digest.0, weight.to_bits())).collect();
    parts.sort_unstable();
    let mut sha = Sha256::new();
    sha.update(b"polylora composition 1");
    for (digest, weight) in parts {
        sha.update(digest);
        sha.update(weight.to_le_bytes());
    }
    Digest(sha.finalize().into())
}

/// The weight of the part that was asked for as `part`. Errors: `invalid_weight`.
pub fn weight(part: &str, asked: f64) -> Result<f32> {
    let weight = asked as f32;
    if weight.is_finite() {
        // -0 and 0 weigh the same.
        return Ok(weight + 0.0);
    }
    let shown = brief(part);
    let message = format!("the weight of `{shown}` is {asked}, not a finite number");
    Err(Error::invalid("invalid_weight", message))
}

fn duplicate(one: &str, other: &str) -> Error {
    let message = match one == other {
        true => {
            format!("adapter `{one}` is named twice; name it once, with the sum of its weights")
        }
        false => format!("adapters `{one}` and `{other}` have the same content; name one of them"),
    };
    Error::invalid("duplicate_adapter", message)
}

/// Refuses what is no sum of products.
fn check_part(version: &Version) -> Result<()> {
    let what = if version.summary.method == "dora" {
        "DoRA scales the base's own rows".to_owned()
    } else if let Some(norm) = replaced_norm(&version.summary) {
        format!("it replaces `{norm}` whole")
    } else {
        return Ok(());
    };
    let message = format!(
        "adapter `{}` cannot be weighted or summed: {what}; it is served alone only",
        version.id()
    );
    Err(Error::unprocessable("not_composable", message))
}

/// A summary's targets are projections, the head, the embedding, and the norms that are replaced.
fn replaced_norm(summary: &Summary) -> Option<&str> {
    summary.targets.iter().map(String::as_str).find(|target| target.contains("norm"))
}
