//! Attacks on the real program by a tenant, a web page, or a disk, each judged by what others see:
//! a canary of another tenant, the books after a restart, the memory of the process.
//!
//! By default each attack runs small and is judged by counts. `make soak` sets `POLYLORA_SOAK`:
//! then they run long, on the demo model, and latencies and memory are judged as well.

#[path = "../common/mod.rs"]
mod common;

mod admission;
mod canary;
mod port;
mod storage;
mod tenants;

use common::live;

/// Whether this is the long run, on a machine that does nothing else.
fn soak() -> bool {
    std::env::var_os("POLYLORA_SOAK").is_some()
}
