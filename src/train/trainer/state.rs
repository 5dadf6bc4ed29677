//! The state of a job in a file, at the border of an optimizer step: written, and read back bit by
//! bit.
//!
//! Owns the file's form: safetensors of factors and moments, the rest in its metadata. Never writes
//! over a good file with half a one. The thing to know: what is not in it is a function of the spec
//! and the data.

use super::{Phase, Trainer};
use crate::database::write_failed;
use crate::error::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

/// The key in the file's metadata.
const KEY: &str = "polylora_training";

/// What is not a tensor, and what the job is known by.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    base: String,
    /// As JSON: numbers keep their bits.
    spec: String,
    examples: usize,
    tokens: u64,
    step: u64,
    skipped: u32,
    updates: i32,
}

impl Trainer {
    fn record(&self) -> Result<Record> {
        let spec = serde_json::to_string(&self.spec);
        Ok(Record {
            base: self.weights.digest.to_string(),
            spec: spec.map_err(|e| Error::fault(format!("the spec as JSON: {e}")))?,
            examples: self.data.len(),
            tokens: self.data.tokens(),
            step: self.step,
            skipped: self.skipped,
            updates: self.optimiser.state().1,
        })
    }

    /// Writes the state of the last border between two steps: what the step at hand has done so far
    /// is not in it. Errors: `storage_full`, or `internal_error` when the file cannot be written,
    /// and in the midst of an update.
    pub fn save(&self, file: &Path) -> Result<()> {
        if matches!(self.phase, Phase::Update(..)) {
            return Err(Error::fault("a job's state is saved in the midst of an update"));
        }
        let record = serde_json::to_string(&self.record()?);
        let record = record.map_err(|e| Error::fault(format!("the state as JSON: {e}")))?;
        let moments = self.optimiser.state().0.iter().map(|(name, values)| (*name, &values[..]));
        let all = std::iter::once(("values", &self.adapters[0].values[..])).chain(moments);
        let bytes: Vec<(&str, Vec<u8>)> = all
            .map(|(name, values)| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let views = bytes.iter().map(|(name, bytes)| {
            Ok((*name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?))
        });
        let views: Result<Vec<_>, SafeTensorError> = views.collect();
        let fault = |e: SafeTensorError| Error::fault(format!("a training state: {e}"));
        let metadata = HashMap::from([(KEY.to_owned(), record)]);
        let all = safetensors::serialize(views.map_err(fault)?, Some(metadata)).map_err(fault)?;
        let new = file.with_extension("new");
        let written = std::fs::write(&new, all)
            .and_then(|()| File::open(&new)?.sync_all())
            .and_then(|()| std::fs::rename(&new, file));
        written.map_err(|e| write_failed(&format!("cannot write {}", file.display()), &e))
    }

    /// Goes on where a job of the same spec, base and data was saved, whatever this one has done.
    /// Errors: `internal_error` for a file that cannot be read, or is of another job.
    pub fn restore(&mut self, file: &Path) -> Result<()> {
        let wrong = |what: String| Error::fault(format!("{}: {what}", file.display()));
        let bytes = std::fs::read(file).map_err(|e| wrong(e.to_string()))?;
        let read = |e: SafeTensorError| wrong(e.to_string());
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(read)?;
        let record = header.metadata().as_ref().and_then(|all| all.get(KEY));
        let record = record.ok_or_else(|| wrong("it is no state of a training job".into()))?;
        let record: Record = serde_json::from_str(record).map_err(|e| wrong(e.to_string()))?;
        let Record { step, skipped, updates, .. } = record;
        let ours = Record { step, skipped, updates, ..self.record()? };
        if record != ours || step > self.steps() {
            return Err(wrong("it is the state of another job".into()));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(read)?;
        let adapter = &mut self.adapters[0];
        let (moments, own_updates) = self.optimiser.state_mut();
        let moments = moments.iter_mut().map(|(name, values)| (*name, &mut values[..]));
        for (name, values) in std::iter::once(("values", &mut adapter.values[..])).chain(moments) {
            let tensor = tensors.tensor(name).map_err(read)?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [values.len()] {
                return Err(wrong(format!("{name} is of another job")));
            }
            let (words, _) = tensor.data().as_chunks::<4>();
            values.iter_mut().zip(words).for_each(|(v, word)| *v = f32::from_le_bytes(*word));
        }
        *own_updates = updates;
        adapter.gradients.fill(0.0);
        adapter.narrow(self.spec.rank);
        (self.step, self.skipped) = (step, skipped);
        self.report = Default::default();
        self.sketch = None;
        self.phase = Phase::Measure(0);
        Ok(())
    }
}
