//! (engine/scheduler)
