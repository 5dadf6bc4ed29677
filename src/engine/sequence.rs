//! (engine/sequence)
