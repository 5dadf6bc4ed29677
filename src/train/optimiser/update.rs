//! What an optimiser's formula reads of one tensor and one update.
//!
//! Owns nothing. Never computes.

/// A tensor that is updated.
pub(super) struct Update<'a> {
    pub values: &'a mut [f32],
    /// Not clipped yet.
    pub gradients: &'a [f32],
    pub dims: [usize; 2],
    pub lr: f64,
    /// What a value is multiplied by beside its update.
    pub shrink: f32,
    /// What a gradient is multiplied by first.
    pub clip: f32,
    /// Updates, this one counted.
    pub number: i32,
}
