//! (engine/sampler)
