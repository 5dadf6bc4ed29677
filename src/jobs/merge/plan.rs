//! A merge with its sources open: a merge that can be advanced.
//!
//! Owns the way from kept versions to a merge and from its result to files. Never waits for
//! anybody. The thing to know: it is made at submission too, so that what cannot be merged is
//! refused before there is a job.

use super::spec::MergeSpec;
use crate::adapters::format::factors::OpenAdapter;
use crate::adapters::format::write;
use crate::adapters::registry::{PinnedSource, Registry};
use crate::error::{Error, Kind, Result};
use crate::jobs::stage::Progress;
use crate::merge::compatibility::CompatibilityReport;
use crate::merge::{Merge, check_sources, picture};
use std::path::Path;

/// Work of one order's clustering, about two minutes of a core: restarts times units times rank,
/// over all sites.
const COMPARISONS_MAX: u64 = 1 << 30;

/// A merge with its sources.
pub struct Plan {
    merge: Merge,
    adapters: Vec<OpenAdapter>,
    base_model: Option<String>,
}

impl Plan {
    /// Opens the sources and plans. Blocking. Errors: `corrupt_adapter`, `upload_too_large`,
    /// `invalid_merge` (too many restarts), and
    /// those of [`check_sources`] and [`Merge::new`].
    pub fn new(spec: &MergeSpec, registry: &Registry, kept: &[PinnedSource]) -> Result<Self> {
        let open = |k: &PinnedSource| registry.open_factors(k);
        let adapters = kept.iter().map(open).collect::<Result<Vec<_>>>()?;
        let base_model = check_sources(&spec.spec, &adapters, spec.any_base)?;
        let modules: Vec<_> = adapters.iter().map(OpenAdapter::modules).collect();
        let merge = Merge::new(spec.spec.clone(), &modules)?;
        let (bytes, max) = (4 * merge.parameters() as u64, registry.upload_bytes_max());
        if bytes > max {
            let message = format!("the result would have {bytes} bytes; the limit is {max}");
            let too_large = Error::new(Kind::TooLarge, "upload_too_large", message);
            return Err(too_large.param("options.rank"));
        }
        let comparisons = merge.comparisons();
        if comparisons > COMPARISONS_MAX {
            let message = format!(
                "clustering would compare {comparisons} units with centroids; the limit is \
                 {COMPARISONS_MAX}: fewer `restarts`, or a smaller `rank`"
            );
            return Err(Error::invalid("invalid_merge", message).param("options.restarts"));
        }
        Ok(Self { merge, adapters, base_model })
    }

    /// Merges the next site.
    pub fn step(&mut self) -> Result<Progress> {
        let adapters = &self.adapters;
        let progress = self.merge.step(1, &mut |source, place| adapters[source].read(place))?;
        Ok(progress.into())
    }

    /// Looks at the next site without merging it.
    pub fn look(&mut self) -> Result<Progress> {
        let adapters = &self.adapters;
        let progress = self.merge.look(1, &mut |source, place| adapters[source].read(place))?;
        Ok(progress.into())
    }

    /// What looking has shown.
    pub fn compatibility(self) -> CompatibilityReport {
        self.merge.compatibility()
    }

    /// Writes the merged adapter into `dir`; its report as JSON and as SVG.
    pub fn finish(self, dir: &Path) -> Result<(String, String)> {
        let merged = self.merge.finish()?;
        write::write(dir, &merged.modules, self.base_model.as_deref())?;
        let report = serde_json::to_string(&merged.report)
            .map_err(|e| Error::fault(format!("the report: {e}")))?;
        Ok((report, picture::heat_map(&merged.report)))
    }
}

impl From<crate::merge::Progress> for Progress {
    fn from(sites: crate::merge::Progress) -> Self {
        Self { done: sites.done, total: sites.total }
    }
}
