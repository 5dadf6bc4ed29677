//! The base model's weights, packed for the kernels, read-only after load.
//!
//! Owns every matrix, norm and bias by the dense indices of `ModelShape`. Never computes with them.
//! The thing to know: a load needs the model and little more, since threads read, pack and forget
//! 16 rows at a time while another hashes the files; a tied head is the embedding table itself.

use crate::adapters::{BaseBias, BaseRows, Digest};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::Scratch;
use crate::checkpoint::{invalid, unsupported};
use crate::error::{Error, Result};
use crate::shape::{ModelShape, Norm, Projection, Site};
use polylora_kernels::{Act, Device, Dtype, Matrix, Memory, Vector, WeightDtype};
use std::collections::HashSet;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Immutable; shared by the engine thread and by adapter loaders (DoRA norms).
pub struct Weights {
    pub shape: ModelShape,
    /// The floats beside the weights: what KV pages and factors are stored as, if nobody says.
    pub dtype: Dtype,
    pub digest: Digest,
    /// `[V, H]`
    embedding: Matrix,
    /// By site index; the head is `None` where it is tied.
    sites: Vec<Option<Matrix>>,
    /// By site index. `[O]`
    biases: Vec<Option<Vector>>,
    /// By norm index, +1 folded in; empty where the family has no such norm.
    norms: Vec<Vector>,
}

/// Told of bytes that are read and hashed, and of how many there are; from several threads.
pub type Told<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Bytes of the files count twice: once when they are hashed, once when they are packed.
struct Progress<'a> {
    done: AtomicU64,
    bytes: u64,
    told: Told<'a>,
}

impl Progress<'_> {
    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Relaxed) + bytes;
        (self.told)((done / 2).min(self.bytes), self.bytes);
    }
}

/// Reads tensors and remembers which, to find those that nothing asked for.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    /// What was asked for.
    dtype: Option<WeightDtype>,
    floats: Dtype,
    read: HashSet<String>,
    /// By thread.
    scratch: Vec<Mutex<Scratch>>,
    progress: &'a Progress<'a>,
}

impl Weights {
    /// Reads and packs every tensor, on all threads of the device and one more for the digest.
    /// `dtype` None: integers stay as they are stored; floats become bf16 unless the checkpoint
    /// stores f32. With 4-bit integers the table and the head have 8, as is usual: they are felt
    /// most. Errors: `invalid_model` names a tensor that is missing or of the wrong shape, or a
    /// file that was changed meanwhile; `unsupported_model` a tensor that the decoder would leave
    /// unused.
    pub fn load(
        c: &Checkpoint,
        dtype: Option<WeightDtype>,
        device: &Device,
        told: Told<'_>,
    ) -> Result<Self> {
        let progress = &Progress { done: AtomicU64::new(0), bytes: c.bytes(), told };
        let go_on = &AtomicBool::new(true);
        let weights = std::thread::scope(|scope| -> Result<Self> {
            let digest = scope.spawn(move || {
                c.digest_told(&|bytes| {
                    progress.add(bytes);
                    go_on.load(Relaxed)
                })
            });
            let packed = Self::packed(c, dtype, device, progress);
            go_on.store(packed.is_ok(), Relaxed);
            let digest = digest.join().unwrap_or_else(|panic| resume_unwind(panic));
            let mut weights = packed?;
            weights.digest = digest?;
            Ok(weights)
        })?;
        c.check_unchanged()?;
        Ok(weights)
    }

    /// All but the digest.
    fn packed(
        c: &Checkpoint,
        dtype: Option<WeightDtype>,
        device: &Device,
        progress: &Progress<'_>,
    ) -> Result<Self> {
        let shape = &c.shape;
        let floats = match dtype {
            Some(WeightDtype::F32) => Dtype::F32,
            None if c.stored_f32() => Dtype::F32,
            _ => Dtype::Bf16,
        };
        let mut loader = Loader {
            checkpoint: c,
            device,
            dtype,
            floats,
            read: HashSet::new(),
            scratch: (0..device.threads()).map(|_| Mutex::default()).collect(),
            progress,
        };
        let embedding = loader.matrix("model.embed_tokens.weight", shape.vocab, shape.hidden)?;
        let mut sites = Vec::with_capacity(shape.sites());
        let mut biases = Vec::with_capacity(shape.sites());
        for site in all_sites(shape) {
            let module = module(site);
            let (inputs, outputs) = shape.site_dims(site);
            let tied = site == Site::Head && shape.tied_head;
            sites.push(match tied {
                true => None,
                false => Some(loader.matrix(&format!("{module}.weight"), outputs, inputs)?),
            });
            biases.push(match has_bias(shape, site) {
                true => Some(loader.vector(&format!("{module}.bias"), outputs, 0.0)?),
                false => None,
            });
        }
        let mut norms: Vec<Vector> = (0..shape.norms()).map(|_| Vector::default()).collect();
        let more = if shape.norm_plus_one { 1.0 } else { 0.0 };
        for norm in all_norms(shape) {
            let (name, width) = norm_tensor(shape, norm);
            norms[shape.norm_index(norm)] = loader.vector(&name, width, more)?;
        }
        loader.refuse_unused(shape)?;
        let (shape, digest) = (shape.clone(), Digest([0; 32]));
        Ok(Self { shape, dtype: floats, digest, embedding, sites, biases, norms })
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.sites.iter().flatten().chain([&self.embedding])
    }

    /// What the matrices are stored as, that with the most bytes first.
    pub fn dtypes(&self) -> Vec<WeightDtype> {
        let mut kinds: Vec<(WeightDtype, usize)> = Vec::new();
        for matrix in self.matrices() {
            match kinds.iter_mut().find(|(dtype, _)| *dtype == matrix.dtype()) {
                Some((_, bytes)) => *bytes += matrix.bytes(),
                None => kinds.push((matrix.dtype(), matrix.bytes())),
            }
        }
        kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        kinds.into_iter().map(|(dtype, _)| dtype).collect()
    }

    /// Zeros for `rows` rows that these weights can read: `[rows, width]`. Errors: what the device
    /// has no room or no operation for.
    pub fn activation(
        &self,
        memory: &Memory,
        rows: usize,
        width: usize,
    ) -> Result<Act, polylora_kernels::Error> {
        let dtypes = self.dtypes();
        let dtype = match dtypes.contains(&WeightDtype::Bf16) {
            true => Dtype::Bf16,
            false => Dtype::F32,
        };
        match dtypes.iter().any(|d| d.group().is_some()) {
            true => Act::with_bytes(memory, dtype, rows, width),
            false => Act::new(memory, dtype, rows, width),
        }
    }

    /// Bytes of everything here.
    pub fn bytes(&self) -> usize {
        let vectors = self.norms.iter().chain(self.biases.iter().flatten());
        self.matrices().map(Matrix::bytes).sum::<usize>()
            + vectors.map(Vector::bytes).sum::<usize>()
    }

    /// The embedding table `[V, H]`.
    pub fn embedding(&self) -> &Matrix {
        &self.embedding
    }

    /// The matrix `[O, I]` of a site; the embedding table where the head is tied.
    pub fn site(&self, site: Site) -> &Matrix {
        let own = &self.sites[self.shape.site_index(site)];
        own.as_ref().unwrap_or(&self.embedding)
    }

    /// The weight of a norm, +1 folded in; empty where the family has no such norm.
    pub fn norm(&self, norm: Norm) -> &Vector {
        &self.norms[self.shape.norm_index(norm)]
    }

    /// Row `row` of a site's matrix as f32. out `[I]`
    pub fn read_row(&self, site: Site, row: usize, out: &mut [f32]) {
        self.site(site).read_row(row, out);
    }

    /// The bias of a site, where it has one. `[O]`
    pub fn bias(&self, site: Site) -> Option<&Vector> {
        self.biases[self.shape.site_index(site)].as_ref()
    }

    pub fn base_rows(self: &Arc<Self>) -> BaseRows {
        let w = self.clone();
        Arc::new(move |site, row, out| w.read_row(site, row, out))
    }

    pub fn base_bias(self: &Arc<Self>) -> BaseBias {
        let w = self.clone();
        Arc::new(move |site| w.bias(site).map(|bias| bias.values().to_vec()))
    }
}

impl Loader<'_> {
    fn matrix(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Matrix> {
        self.read.insert(name.to_owned());
        let stored = self.checkpoint.stored(name, [outputs, inputs])?;
        let stored = stored.ok_or_else(|| missing(name))?;
        let (dtype, as_stored) = match self.dtype {
            None => match stored.kept_as() {
                Some(kept) => (kept, true),
                None => (self.floats.into(), false),
            },
            Some(dtype) => {
                let table = matches!(name, "model.embed_tokens.weight" | "lm_head.weight");
                let four = matches!(dtype, WeightDtype::Int4 | WeightDtype::Int4Min);
                (if table && four { WeightDtype::Int8 } else { dtype }, false)
            }
        };
        let told = |bytes| self.progress.add(bytes);
        stored.packed(self.device, (dtype, as_stored), &self.scratch, &told)
    }

    /// Norms and biases stay f32: they are small, and their rounding would be felt everywhere.
    /// `more` is added to each value, unless it is nothing: -0 stays as it is.
    fn vector(&mut self, name: &str, width: usize, more: f32) -> Result<Vector> {
        self.read.insert(name.to_owned());
        let values = self.checkpoint.values(name, &[width])?;
        let mut values = values.ok_or_else(|| missing(name))?;
        if more != 0.0 {
            values.iter_mut().for_each(|value| *value += more);
        }
        Ok(Vector::new(self.device.memory(), values)?)
    }

    /// A tensor that nothing asked for would change the model's arithmetic without our doing it.
    fn refuse_unused(&self, shape: &ModelShape) -> Result<()> {
        let unused = |name: &String| {
            let tied = shape.tied_head && name == "lm_head.weight";
            !tied && !self.read.contains(name)
        };
        let names = self.checkpoint.names();
        match names.into_iter().filter(unused).min() {
            None => Ok(()),
            Some(name) => Err(unsupported(format!(
                "tensor {name} has no place in a {} model as this server knows it",
                shape.family
            ))),
        }
    }
}

fn missing(name: &str) -> Error {
    invalid(format!("tensor {name} is missing from the model's files"))
}

/// In the order of `ModelShape::site_index`.
fn all_sites(shape: &ModelShape) -> impl Iterator<Item = Site> {
    let layer = |l| Projection::ALL.map(|p| Site::Layer(l, p));
    (0..shape.layers).flat_map(layer).chain([Site::Head])
}

fn all_norms(shape: &ModelShape) -> impl Iterator<Item = Norm> {
    let (post, qk) = (shape.post_norms, shape.qk_norm);
    let layer = move |l| {
        let gemma = [Norm::PreFeedforward(l), Norm::PostFeedforward(l)];
        let heads = [Norm::Query(l), Norm::Key(l)];
        [Norm::Input(l), Norm::PostAttention(l)]
            .into_iter()
            .chain(gemma.into_iter().filter(move |_| post))
            .chain(heads.into_iter().filter(move |_| qk))
    };
    (0..shape.layers).flat_map(layer).chain([Norm::Final])
}

fn module(site: Site) -> String {
    match site {
        Site::Layer(l, p) => format!("model.layers.{l}.{}", p.module()),
        Site::Head => "lm_head".to_owned(),
    }
}

fn has_bias(shape: &ModelShape, site: Site) -> bool {
    match site {
        Site::Layer(_, Projection::Q | Projection::K | Projection::V) => shape.qkv_bias,
        Site::Layer(_, Projection::O) => shape.o_bias,
        Site::Layer(..) => shape.mlp_bias,
        Site::Head => false,
    }
}

/// Tensor name and width of a norm.
fn norm_tensor(shape: &ModelShape, norm: Norm) -> (String, usize) {
    let (layer, part, width) = match norm {
        Norm::Final => return ("model.norm.weight".to_owned(), shape.hidden),
        Norm::Input(l) => (l, "input_layernorm", shape.hidden),
        Norm::PostAttention(l) => (l, "post_attention_layernorm", shape.hidden),
        Norm::PreFeedforward(l) => (l, "pre_feedforward_layernorm", shape.hidden),
        Norm::PostFeedforward(l) => (l, "post_feedforward_layernorm", shape.hidden),
        Norm::Query(l) => (l, "self_attn.q_norm", shape.head_dim),
        Norm::Key(l) => (l, "self_attn.k_norm", shape.head_dim),
    };
    (format!("model.layers.{layer}.{part}.weight"), width)
}
