//! Adapters into an engine's bank without a registry.
//!
//! Never keeps one there: the lease it gives holds nothing.

use polylora::adapters::bank::BankCommand;
use polylora::adapters::format;
use polylora::adapters::registry::Lease;
use polylora::engine::EngineHandle;
use polylora::model::weights::Weights;
use polylora_kernels::Dtype;
use std::path::Path;
use std::sync::Arc;

/// Installs and probes the adapter in `dir`, which must change something.
pub async fn install(
    engine: &EngineHandle,
    weights: &Arc<Weights>,
    dtype: Dtype,
    dir: &Path,
) -> Lease {
    let (rows, bias) = (weights.base_rows(), weights.base_bias());
    let (_, prepared) = format::prepare(dir, &weights.shape, dtype, &rows, &bias).expect("adapter");
    let digest = prepared.digest;
    let (reply, answer) = tokio::sync::oneshot::channel();
    let command = BankCommand::Install { prepared: Box::new(prepared), probe: true, reply };
    (engine.bank())(command).expect("engine");
    let (slot, probe) = answer.await.expect("answer").expect("installed");
    let change = probe.expect("probe").logit_change_max;
    assert!(change > 0.0, "a random adapter changes something");
    Lease::detached(&dir.display().to_string(), digest, slot)
}
