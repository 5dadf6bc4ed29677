//! What rests on what was learnt: versions trained by a job, and those made of them.
//!
//! Owns the search, and how it is asked. Never removes anything. The thing to know: a version says
//! which training jobs it rests on, so it is found although what stood between is gone.

use super::Jobs;
use crate::adapters::version::Entry;
use crate::error::Result;
use crate::train::data::Digest;
use std::collections::BTreeSet;

/// Versions that rest on one of these training jobs, in their order.
pub fn resting_on(entries: Vec<Entry>, jobs: &BTreeSet<String>) -> Vec<Entry> {
    let learnt =
        |entry: &Entry| entry.version.lineage.training_jobs().any(|job| jobs.contains(job));
    let mut found: BTreeSet<String> =
        entries.iter().filter(|e| learnt(e)).map(|e| e.version.id()).collect();
    // Versions from before they said so name their parents only.
    loop {
        let more: Vec<String> = entries
            .iter()
            .filter(|e| e.version.lineage.parents().iter().any(|p| found.contains(&p.id)))
            .map(|e| e.version.id())
            .filter(|id| !found.contains(id))
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    entries.into_iter().filter(|entry| found.contains(&entry.version.id())).collect()
}

impl Jobs {
    /// Versions that rest on a line: a tenant's jobs learnt it, or, without a tenant, anybody's.
    /// Also these jobs.
    pub async fn seen(
        &self,
        tenant: Option<&str>,
        line: &Digest,
    ) -> Result<(Vec<String>, Vec<Entry>)> {
        let jobs = self.inner.journal.learners(tenant, line).await?;
        let set: BTreeSet<String> = jobs.iter().cloned().collect();
        Ok((jobs, resting_on(self.inner.registry.list(), &set)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::Digest;
    use crate::adapters::format::Summary;
    use crate::adapters::version::{Lineage, Parent, State, Version};
    use std::sync::Arc;

    fn entry(name: &str, lineage: Lineage) -> Entry {
        let version = Version {
            name: name.to_owned(),
            number: 1,
            digest: Digest([0; 32]),
            summary: Summary::default(),
            logit_change_max: 1.0,
            forced: false,
            created: 0,
            file_bytes: 0,
            resident_bytes: 0,
            lineage,
        };
        Entry {
            version: Arc::new(version),
            owner: "".into(),
            state: State::Ready,
            current: true,
            pinned: false,
            resident: false,
            leases: 0,
        }
    }

    fn merged(name: &str, from: &[&str], rests_on: &[&str]) -> Entry {
        let parent =
            |id: &&str| Parent { id: format!("{id}@1"), digest: String::new(), weight: None };
        let lineage = Lineage::Merged {
            method: "ties".into(),
            from: from.iter().map(parent).collect(),
            job: None,
            rests_on: rests_on.iter().map(|job| (*job).to_owned()).collect(),
        };
        entry(name, lineage)
    }

    #[test]
    fn what_rests_on_a_job_is_found_through_what_is_gone_and_through_parents() {
        let (from, step, rests_on, record) = (None, None, Vec::new(), None);
        let trained = Lineage::Trained { from, job: "one".into(), step, rests_on, record };
        let all = vec![
            merged("old-of-old", &["old"], &[]),
            merged("old", &["trained", "other"], &[]),
            merged("of-a-pruned-one", &["pruned"], &["one", "two"]),
            merged("other", &["upload"], &["two"]),
            entry("trained", trained),
            entry("upload", Lineage::default()),
        ];
        let found = resting_on(all, &BTreeSet::from(["one".to_owned()]));
        let names: Vec<&str> = found.iter().map(|e| e.version.name.as_str()).collect();
        assert_eq!(names, ["old-of-old", "old", "of-a-pruned-one", "trained"]);
    }
}
