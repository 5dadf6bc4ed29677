//! What the wire shows of an adapter's version.
//!
//! Owns which of it a caller may know. Never asks the registry.

use crate::access::Caller;
use crate::adapters::format::generation::Generation;
use crate::adapters::version::{
    Entry, FileRecord, Lineage, Parent, State as AdapterState, TrainingRecord,
};
use crate::api::wire::{
    AdapterGeneration, AdapterLineage, AdapterParent, AdapterProbe, AdapterSummary,
    AdapterTraining, AdapterVersion, TrainedFile,
};

/// The state as the wire says it.
pub fn state_word(state: AdapterState) -> &'static str {
    match state {
        AdapterState::Ready => "ready",
        AdapterState::Ineffective => "ineffective",
        AdapterState::Draining => "draining",
    }
}

pub fn version(entry: &Entry, caller: &Caller) -> AdapterVersion {
    let v = &entry.version;
    AdapterVersion {
        object: "adapter.version",
        id: v.id(),
        name: v.name.clone(),
        version: v.number,
        owner: owner(&entry.owner, caller),
        digest: v.digest.to_string(),
        state: state_word(entry.state),
        current: entry.current,
        pinned: entry.pinned,
        resident: entry.resident,
        leases: entry.leases,
        created: v.created,
        file_bytes: v.file_bytes,
        resident_bytes: v.resident_bytes,
        forced: v.forced,
        lineage: lineage(&v.lineage, caller),
        probe: AdapterProbe { logit_change_max: v.logit_change_max },
        summary: AdapterSummary {
            method: v.summary.method.clone(),
            rank_max: v.summary.rank_max,
            sites: v.summary.sites,
            targets: v.summary.targets.clone(),
            parameters: v.summary.parameters,
            base_model: v.summary.base_model.clone(),
            chat_template: v.summary.chat_template,
            generation: generation(&v.summary.generation),
        },
    }
}

fn trained_with(record: &TrainingRecord) -> AdapterTraining {
    let file = |file: &FileRecord| TrainedFile { id: file.id.clone(), digest: file.digest.clone() };
    AdapterTraining {
        spec: record.spec.clone(),
        base: record.base.clone(),
        training_file: file(&record.training_file),
        validation_file: record.validation_file.as_ref().map(file),
        seed: record.seed,
        steps: record.steps,
    }
}

/// The owner of a name as `caller` may know it: itself, and an operator knows all.
pub fn owner(owner: &str, caller: &Caller) -> Option<String> {
    let told = caller.tenant().is_none_or(|tenant| tenant == owner) && !owner.is_empty();
    told.then(|| owner.to_owned())
}

fn generation(own: &Generation) -> Option<AdapterGeneration> {
    (!own.is_empty()).then(|| AdapterGeneration {
        temperature: own.temperature,
        top_p: own.top_p,
        top_k: own.top_k,
        min_p: own.min_p,
        repetition_penalty: own.repetition_penalty,
        max_tokens: own.tokens_max,
        eos_token_ids: own.stop_tokens.clone(),
        stop_token_ids: own.stop_tokens_more.clone(),
        stop: own.stops.clone(),
    })
}

/// Parents that the caller may not know of are left out.
fn lineage(lineage: &Lineage, caller: &Caller) -> AdapterLineage {
    let seen = |p: &&Parent| caller.sees_version(&p.id);
    let parent =
        |p: &Parent| AdapterParent { id: p.id.clone(), digest: p.digest.clone(), weight: p.weight };
    match lineage {
        Lineage::Uploaded { by, files } => {
            AdapterLineage::Uploaded { by: by.clone(), files: files.clone() }
        }
        Lineage::Merged { method, from, job, .. } => AdapterLineage::Merged {
            method: method.clone(),
            job: job.clone(),
            from: from.iter().filter(seen).map(parent).collect(),
        },
        Lineage::Trained { from, job, step, record, .. } => AdapterLineage::Trained {
            from: from.as_ref().filter(seen).map(parent),
            job: job.clone(),
            step: *step,
            record: record.as_deref().map(trained_with),
        },
    }
}
