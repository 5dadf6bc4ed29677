//! The bank: adapters resident for the step, in slots.
//!
//! Owned by the engine thread as a plain field; others send `BankCommand`s. Never reads files or
//! names: a slot is known by its digest. The thing to know: a slot is rewritten only when no
//! running sequence uses it, and whole.

use super::Digest;
use crate::error::Result;
pub use polylora_kernels::PARTS_MAX;
use polylora_kernels::{Delta, EmbedDelta};

/// Index of a resident adapter in the bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// What rows are computed with: the sum of what some residents change, each times its weight.
/// Ordered so that equals are neighbours when sorted; a copy allocates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blend {
    /// Slots and the bits of their weights; unused ones are zero.
    parts: [(Slot, u32); PARTS_MAX],
    len: u32,
}

impl Blend {
    /// In this order, which is that of the sum.
    ///
    /// # Panics
    /// On more than `PARTS_MAX`.
    pub fn new(weighted: impl IntoIterator<Item = (Slot, f32)>) -> Self {
        let mut blend = Self { parts: [(Slot(0), 0); PARTS_MAX], len: 0 };
        for (slot, weight) in weighted {
            blend.parts[blend.len as usize] = (slot, weight.to_bits());
            blend.len += 1;
        }
        blend
    }

    /// Slots and weights, in the order in which they are summed.
    pub fn parts(&self) -> impl Iterator<Item = (Slot, f32)> {
        let used = &self.parts[..self.len as usize];
        used.iter().map(|&(slot, weight)| (slot, f32::from_bits(weight)))
    }

    /// The slot, where it is one resident as it is.
    pub fn alone(&self) -> Option<Slot> {
        let mut parts = self.parts();
        parts.next().filter(|(_, weight)| self.len == 1 && *weight == 1.0).map(|(slot, _)| slot)
    }

    /// Whether a slot is in it.
    pub fn has(&self, slot: Slot) -> bool {
        self.parts().any(|(part, _)| part == slot)
    }
}

impl From<Slot> for Blend {
    /// One resident as it is.
    fn from(slot: Slot) -> Self {
        Self::new([(slot, 1.0)])
    }
}

/// An adapter ready to multiply with: made off the engine thread, owned by the bank.
pub struct Prepared {
    pub digest: Digest,
    /// By `ModelShape::site_index`.
    pub deltas: Vec<Option<Delta>>,
    /// Replaced norm weights by `ModelShape::norm_index` (Gemma's +1 already folded).
    pub norms: Vec<Option<Box<[f32]>>>,
    pub embedding: Option<EmbedDelta>,
    /// Bytes of all of the above.
    pub bytes: usize,
}

/// What the probe saw: the largest |logit with adapter − logit of base| over fixed prompts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Probe {
    pub logit_change_max: f32,
}

/// Work for the engine thread on its bank.
pub enum BankCommand {
    /// Puts the adapter in a free slot and runs the probe when asked.
    Install {
        prepared: Box<Prepared>,
        probe: bool,
        reply: tokio::sync::oneshot::Sender<Result<(Slot, Option<Probe>)>>,
    },
    /// Frees a slot. The registry sends it only when no lease is left; the engine replies when no
    /// sequence uses it.
    Remove { slot: Slot, digest: Digest, reply: tokio::sync::oneshot::Sender<Result<()>> },
}

/// How the registry reaches the engine thread. Fails when the engine is gone.
pub type BankSender = std::sync::Arc<dyn Fn(BankCommand) -> Result<()> + Send + Sync>;

/// Slots of resident adapters.
#[derive(Default)]
pub struct Bank {
    slots: Vec<Option<Prepared>>,
}

impl Bank {
    /// A bank with room for `slots_max` adapters.
    pub fn new(slots_max: usize) -> Self {
        Self { slots: (0..slots_max).map(|_| None).collect() }
    }
    /// Puts an adapter into a free slot; gives it back when every slot is taken.
    pub fn install(&mut self, prepared: Prepared) -> Result<Slot, Box<Prepared>> {
        match self.slots.iter().position(Option::is_none) {
            Some(i) => {
                self.slots[i] = Some(prepared);
                Ok(Slot(i as u32))
            }
            None => Err(Box::new(prepared)),
        }
    }
    pub fn remove(&mut self, slot: Slot) -> Option<Prepared> {
        self.slots[slot.0 as usize].take()
    }
    pub fn get(&self, slot: Slot) -> Option<&Prepared> {
        self.slots.get(slot.0 as usize)?.as_ref()
    }
    pub fn digest(&self, slot: Slot) -> Option<Digest> {
        self.get(slot).map(|p| p.digest)
    }
}
