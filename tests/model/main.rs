//! Models that compute in this process, and what must come out: the right logits, the right tokens,
//! the same bits with whatever neighbours.

mod checkpoint;
mod cold;
mod continued;
mod decoder;
mod engine;
mod golden;
mod merged;
mod methods;
mod neighbours;
mod trainer;
mod training;
mod verify;
