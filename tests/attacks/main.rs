//! Attacks on the real program by a tenant, an adapter, a web page, or a disk, each judged by what
//! others see: a canary of another tenant, the books after a restart, the memory of the process.
//!
//! By default each attack runs small and is judged by counts. `make soak` sets `POLYLORA_SOAK`:
//! then they run long, on the demo model, and latencies and memory are judged as well.

mod admission;
mod canary;
mod hostile;
mod overload;
mod port;
mod sandbox;
mod storage;
mod tenants;
