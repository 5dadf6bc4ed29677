//! Merges that are looked at before there is a job.
//!
//! Owns the check of one that came in, and the survey that makes nothing. Never queues.

use super::plan::Plan;
use super::spec::MergeSpec;
use crate::adapters::registry::PinnedSource;
use crate::blocking::blocking;
use crate::engine::shutting_down;
use crate::error::{Error, Kind, Result};
use crate::jobs::{Jobs, pace};
use crate::merge::compatibility::CompatibilityReport;
use std::sync::Arc;

impl Jobs {
    /// Checks a merge as far as it can be without merging: sources, options, sizes. Errors: those
    /// of the merge, `model_not_found`, `corrupt_adapter`.
    pub async fn check_merge(
        &self,
        spec: &MergeSpec,
        sources: Arc<Vec<PinnedSource>>,
        tenant: &str,
    ) -> Result<()> {
        let _place = self.inner.checks.take(tenant).await;
        let (spec, registry) = (spec.clone(), self.inner.registry.clone());
        blocking(move || Plan::new(&spec, &registry, &sources).map(drop)).await
    }

    /// Says how much the sources are in each other's way, merging nothing. Errors: as
    /// `check_merge`; `merges_busy` while others are looked at.
    pub async fn merge_compatibility(
        &self,
        spec: &MergeSpec,
        sources: Arc<Vec<PinnedSource>>,
        tenant: &str,
    ) -> Result<CompatibilityReport> {
        let _place = self.inner.surveys.try_take(tenant, 1).ok_or_else(|| {
            Error::new(Kind::Busy, "merges_busy", "other surveys are being made; try again")
        })?;
        let (spec, registry) = (spec.clone(), self.inner.registry.clone());
        let (pace, tenant) = (self.inner.pace.clone(), tenant.to_owned());
        pace::apart(move || {
            let _active = pace.enter(&tenant);
            let mut plan = Plan::new(&spec, &registry, &sources)?;
            loop {
                let (progress, worked) = pace.compute(&tenant, || plan.look());
                let progress = progress?;
                if progress.done == progress.total {
                    return Ok(plan.compatibility());
                }
                if pace.is_stopping() {
                    return Err(shutting_down());
                }
                pace.rest(worked);
            }
        })
        .await
    }
}
