//! `/v1/aliases`: names over weighted versions.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// An alias as it is to be.
#[derive(Deserialize, ToSchema)]
pub struct AliasFields {
    /// `name@version` to its share of the sum, from 1 to 1000000; with `adapter`, the key may be
    /// the version alone. At most 16.
    #[schema(example = json!({"7": 95, "8": 5}))]
    pub weights: BTreeMap<String, u32>,
    /// The adapter whose versions are meant by bare numbers.
    #[schema(example = "acme")]
    pub adapter: Option<String>,
}

/// Body of a promotion.
#[derive(Deserialize, ToSchema)]
pub struct PromoteFields {
    /// The version that gets everything: its number, or `name@version`.
    pub version: VersionOrId,
}

/// A number, or `name@version`.
#[derive(Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a version's number or name@version")]
pub enum VersionOrId {
    Version(u64),
    Id(String),
}

#[derive(Serialize, ToSchema)]
pub struct AliasList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// By name.
    pub data: Vec<AliasShown>,
}

/// One alias.
#[derive(Serialize, ToSchema)]
pub struct AliasShown {
    #[schema(example = "alias")]
    pub object: &'static str,
    pub name: String,
    /// The tenant that owns it; null: an operator, or another tenant than yours.
    pub owner: Option<String>,
    pub targets: Vec<AliasTarget>,
    /// What a rollback would bring back.
    pub previous: Option<Vec<AliasTarget>>,
    /// Unix seconds
    pub created: u64,
    /// Unix seconds
    pub updated: u64,
}

#[derive(Serialize, ToSchema)]
pub struct AliasTarget {
    /// `name@version`
    pub id: String,
    pub name: String,
    /// The one that the name means now, or the one that was asked for.
    pub version: u64,
    /// Share of requests, beside the other targets' weights.
    pub weight: u32,
    /// Of all requests, 0 to 1.
    pub share: f64,
}

#[derive(Serialize, ToSchema)]
pub struct AliasDeleted {
    #[schema(example = "alias")]
    pub object: &'static str,
    pub name: String,
    pub deleted: bool,
}
