//! The bank: adapters resident for the step, in slots.
//!
//! Owned by the engine thread as a plain field; others send `BankCommand`s. Never reads files or
//! names: a slot is known by its digest. The thing to know: a slot is rewritten only when no
//! running sequence uses it, and whole.

use super::Digest;
use crate::error::Result;
pub use polylora_kernels::{AdapterMix, PARTS_MAX, Slot};
use polylora_kernels::{Resident, Residents};

/// An adapter ready to multiply with: made off the engine thread, owned by the bank.
pub struct Prepared {
    pub digest: Digest,
    /// Deltas by `ModelShape::site_index`; replaced norms by `ModelShape::norm_index`, Gemma's +1
    /// already folded.
    pub resident: Resident,
    /// Bytes of it.
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

/// Slots of resident adapters: what they change is in the kernels' `Residents`, who they are here.
#[derive(Default)]
pub struct Bank {
    residents: Residents,
    /// By slot.
    digests: Vec<Option<Digest>>,
}

impl Bank {
    /// A bank with room for `slots_max` adapters.
    pub fn new(slots_max: usize) -> Self {
        Self { residents: Residents::new(slots_max), digests: vec![None; slots_max] }
    }
    /// Puts an adapter into a free slot; gives it back when every slot is taken.
    pub fn install(&mut self, prepared: Prepared) -> Result<Slot, Box<Prepared>> {
        let Prepared { digest, resident, bytes } = prepared;
        match self.residents.install(resident) {
            Ok(slot) => {
                self.digests[slot.0 as usize] = Some(digest);
                Ok(slot)
            }
            Err(resident) => Err(Box::new(Prepared { digest, resident, bytes })),
        }
    }
    /// Empties a slot.
    pub fn remove(&mut self, slot: Slot) {
        self.residents.remove(slot);
        self.digests[slot.0 as usize] = None;
    }
    pub fn digest(&self, slot: Slot) -> Option<Digest> {
        *self.digests.get(slot.0 as usize)?
    }
    /// What the ops look up.
    pub fn residents(&self) -> &Residents {
        &self.residents
    }
}
