//! Bodies of the routes that are other servers' own.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadLora {
    pub lora_name: Option<String>,
    /// A directory below one of `adapter_dirs`.
    pub lora_path: Option<String>,
    /// Makes a new version of a name that is loaded. Default false.
    pub load_inplace: Option<bool>,
    /// Only `false`.
    pub is_3d_lora_weight: Option<bool>,
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UnloadLora {
    pub lora_name: Option<String>,
}

/// An error in vLLM's words.
#[derive(Serialize, ToSchema)]
pub struct PeerErrorBody {
    pub error: PeerError,
}

#[derive(Serialize, ToSchema)]
pub struct PeerError {
    pub message: String,
    /// `InvalidUserInput`, `NotFoundError` or `InternalServerError`
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub param: Option<String>,
    /// The status again.
    pub code: u16,
}
