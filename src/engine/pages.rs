//! (engine/pages)
