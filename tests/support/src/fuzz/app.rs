//! The API's router in this process, over a real engine on a tiny model: for what has to be called
//! more often than a socket allows.
//!
//! The engine takes no requests: one that is sound gets as far as `shutting_down`.

use crate::tiny;
use polylora::api::router;
use polylora::assembly::assemble;
use polylora::config::{Config, Given};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// Name of the base.
pub const BASE: &str = "tiny";

/// Serves from `dir`, which must be empty.
pub async fn in_process(dir: &Path) -> axum::Router {
    let model = dir.join("model");
    std::fs::create_dir(&model).expect("a directory");
    let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
    tiny::write(&model, &case, tiny::Storage::F32, 1);
    let given = Given::of(&[
        ("model", &model.display().to_string()),
        ("served_name", BASE),
        ("data_dir", &dir.join("data").display().to_string()),
        ("threads", "1"),
        ("context", "128"),
        ("kv_bytes", "1MiB"),
        ("adapter_bytes_max", "16MiB"),
        ("upload_bytes_max", "1MiB"),
        ("request_bytes_max", "16MiB"),
        ("versions_kept", "1"),
    ]);
    let config = Config::load(None, given).expect("a configuration");
    let (api, _) = assemble(config).await.expect("a server");
    api.engine.drain(Duration::ZERO).await;
    router(std::sync::Arc::new(api))
}
