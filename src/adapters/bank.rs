//! The bank: adapters resident for the step, in slots.
//!
//! Owned by the engine thread as a plain field; others send `BankCommand`s. Never reads files or
//! names: a slot is known by its digest. The thing to know: a slot is rewritten only when no
//! running sequence uses it, and whole.

use super::Digest;
use crate::error::Result;
use polylora_kernels::{Delta, EmbedDelta};

/// Index of a resident adapter in the bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

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
