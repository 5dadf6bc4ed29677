//! (engine/batch)
