//! What a call of linears is given, and the checks of it that an arm makes where it looks.
//!
//! Owns the operands of one site and the bounds of a call. Never computes.

use crate::{Delta, Matrix, Plane, Vector};

/// Sites of one call at most.
pub const SITES_MAX: usize = 3;
/// Weighted deltas of one segment at most.
pub const PARTS_MAX: usize = 8;

/// One site: y = x·Wᵀ (+ segment deltas) (+ bias). `y` is `[T, O]`.
pub struct Linear<'a> {
    pub weight: &'a Matrix,
    pub bias: Option<&'a Vector>,
    /// Its index among a resident's deltas.
    pub site: usize,
    pub y: &'a mut Plane,
}

/// The check of a delta, where an arm lists it: to look at all deltas beforehand would be a pass
/// over memory that has left the caches.
pub(crate) fn check_delta(delta: &Delta, weight: &Matrix, i: usize, g: usize) {
    let (outputs, inputs) = (weight.outputs(), weight.inputs());
    assert!(
        delta.outputs() == outputs && delta.inputs() == inputs,
        "site {i}, segment {g}: a delta of [{}, {}] on W [{outputs}, {inputs}]",
        delta.outputs(),
        delta.inputs(),
    );
}

/// The same of the ranks that a segment's deltas at a site have in sum.
pub(crate) fn check_ranks(rank: usize, rank_max: usize) {
    assert!(rank <= rank_max, "rank {rank}, scratch for {rank_max}");
}
