//! What resident adapters change, in slots, and which sum of them a segment is computed with.
//!
//! Owns factors, replaced norms and changes of the table. Never knows an adapter's name or digest.
//! The thing to know: ops look a segment's slots up here, so a slot that a step names must stay
//! filled until the step is done.

use crate::{Delta, EmbedDelta, PARTS_MAX, Vector};

/// Index of a resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// What rows are computed with: the sum of what some residents change, each times its weight.
/// Ordered so that equals are neighbours when sorted; a copy allocates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdapterMix {
    /// Slots and the bits of their weights; unused ones are zero.
    parts: [(Slot, u32); PARTS_MAX],
    len: u32,
}

impl AdapterMix {
    /// In this order, which is that of the sum.
    ///
    /// # Panics
    /// On more than `PARTS_MAX`.
    pub fn new(weighted: impl IntoIterator<Item = (Slot, f32)>) -> AdapterMix {
        let mut mix = AdapterMix { parts: [(Slot(0), 0); PARTS_MAX], len: 0 };
        for (slot, weight) in weighted {
            let len = mix.len as usize;
            assert!(len < PARTS_MAX, "{} deltas, at most {PARTS_MAX}", len + 1);
            mix.parts[len] = (slot, weight.to_bits());
            mix.len += 1;
        }
        mix
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

impl From<Slot> for AdapterMix {
    /// One resident as it is.
    fn from(slot: Slot) -> AdapterMix {
        AdapterMix::new([(slot, 1.0)])
    }
}

/// What one adapter changes. What its lists do not reach it leaves as it is.
#[derive(Default)]
pub struct Resident {
    /// By the caller's index of a site.
    pub deltas: Vec<Option<Delta>>,
    /// Replaced norm weights, by the caller's index of a norm.
    pub norms: Vec<Option<Vector>>,
    pub embedding: Option<EmbedDelta>,
}

impl Resident {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.deltas.iter().flatten().map(Delta::bytes).sum::<usize>()
            + self.norms.iter().flatten().map(Vector::bytes).sum::<usize>()
            + self.embedding.as_ref().map_or(0, EmbedDelta::bytes)
    }
}

/// See the module page.
#[derive(Default)]
pub struct Residents {
    slots: Vec<Option<Resident>>,
}

impl Residents {
    /// Room for `slots_max`.
    pub fn new(slots_max: usize) -> Residents {
        Residents { slots: (0..slots_max).map(|_| None).collect() }
    }

    /// Room for none.
    pub(crate) const fn empty() -> Residents {
        Residents { slots: Vec::new() }
    }

    /// Fills the first free slot; gives the resident back when every slot is taken.
    pub fn install(&mut self, resident: Resident) -> Result<Slot, Resident> {
        match self.slots.iter().position(Option::is_none) {
            Some(slot) => {
                self.slots[slot] = Some(resident);
                Ok(Slot(slot as u32))
            }
            None => Err(resident),
        }
    }

    /// Empties a slot.
    ///
    /// # Panics
    /// On a slot that there is not.
    pub fn remove(&mut self, slot: Slot) -> Option<Resident> {
        self.slots[slot.0 as usize].take()
    }

    /// What is in a slot.
    pub fn get(&self, slot: Slot) -> Option<&Resident> {
        self.slots.get(slot.0 as usize)?.as_ref()
    }

    /// # Panics
    /// On an empty slot.
    fn of(&self, slot: Slot) -> &Resident {
        self.get(slot).expect("a slot stays resident while a batch names it")
    }

    /// What a resident changes at a site.
    pub(crate) fn delta(&self, slot: Slot, site: usize) -> Option<&Delta> {
        self.of(slot).deltas.get(site)?.as_ref()
    }

    /// The norm weight that a resident brings.
    pub(crate) fn norm(&self, slot: Slot, norm: usize) -> Option<&Vector> {
        self.of(slot).norms.get(norm)?.as_ref()
    }

    /// What a resident changes of the table.
    pub(crate) fn embedding(&self, slot: Slot) -> Option<&EmbedDelta> {
        self.of(slot).embedding.as_ref()
    }
}
