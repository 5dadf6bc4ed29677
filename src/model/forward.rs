//! The path of a row through the decoder, in the kernels' ops.
//!
//! Owns the order of ops and the step's buffers. Never allocates after `Buffers::new`. The thing to
//! know: a block's output `y` is not added to `h` where it is made, but by the norm that comes
//! next, in one pass over both.

use super::batch::{Batch, ModelOptions};
use super::weights::Weights;
use crate::adapters::bank::{Bank, Blend, Prepared, Slot};
use crate::adapters::format::config::RANK_MAX;
use crate::shape::{Activation, ModelShape, Norm, Projection, Site};
use polylora_kernels::{
    Act, Add, AddEmbed, AttentionScratch, Device, Dtype, Gate, KvCache, Linear, LoraScratch,
    NormWeight, Residual, RopeStore, RopeTable, Rows, Segments, WeightDtype, add_norm,
    add_norm_rows, attention, embed, glu, linear_sum, rope_store,
};

/// Memory of one step, taken at start. T = rows_max, S' = logit_rows_max.
pub(super) struct Buffers {
    /// The residual stream. `[T, H]`
    h: Vec<f32>,
    /// What a block reads: `h`, normed. `[T, H]`
    x: Act,
    q: Vec<f32>, // [T, N, D]
    k: Vec<f32>, // [T, K, D]
    v: Vec<f32>, // [T, K, D]
    /// What attention found. `[T, N·D]`
    found: Act,
    /// What a block made, not yet added to `h`. `[T, H]`
    y: Vec<f32>,
    gate: Vec<f32>,   // [T, F]
    up: Vec<f32>,     // [T, F]
    gated: Act,       // [T, F]
    last: Act,        // [S', H]
    logits: Vec<f32>, // [S', V]
    scratch: LoraScratch,
    parts: AttentionScratch,
}

impl Buffers {
    pub fn new(weights: &Weights, o: &ModelOptions) -> Self {
        let shape = &weights.shape;
        let dtypes = weights.dtypes();
        let dtype = match dtypes.contains(&WeightDtype::Bf16) {
            true => Dtype::Bf16,
            false => Dtype::F32,
        };
        let integers = dtypes.iter().any(|d| d.group().is_some());
        let act = |rows: usize, width: usize| match Act::new(dtype, rows, width) {
            act if integers => act.with_bytes(),
            act => act,
        };
        let (rows, q, kv) = (o.rows_max, shape.heads * shape.head_dim, kv_width(shape));
        let zeros = |width: usize| vec![0.0; rows * width];
        Self {
            h: zeros(shape.hidden),
            x: act(rows, shape.hidden),
            q: zeros(q),
            k: zeros(kv),
            v: zeros(kv),
            found: act(rows, q),
            y: zeros(shape.hidden),
            gate: zeros(shape.ffn),
            up: zeros(shape.ffn),
            gated: act(rows, shape.ffn),
            last: act(o.logit_rows_max, shape.hidden),
            logits: vec![0.0; o.logit_rows_max * shape.vocab],
            scratch: LoraScratch::new(rows.max(o.logit_rows_max), RANK_MAX),
            parts: AttentionScratch::new(
                o.threads,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                o.context,
            ),
        }
    }

    /// Upper bound of what `new` takes: activations as f32 with a bf16 copy, and bytes for integer
    /// weights.
    pub fn bytes(shape: &ModelShape, o: &ModelOptions) -> usize {
        let q = shape.heads * shape.head_dim;
        let plain = 2 * shape.hidden + q + 2 * kv_width(shape) + 2 * shape.ffn;
        let acts: usize = [shape.hidden, q, shape.ffn].map(Act::row_bytes).iter().sum();
        let row = LoraScratch::row_bytes(RANK_MAX);
        let scratch = o.rows_max.max(o.logit_rows_max) * row;
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        scratch
            + AttentionScratch::bytes(o.threads, heads, kv_heads, dim, o.context)
            + o.rows_max * (4 * plain + acts)
            + o.logit_rows_max * (4 * shape.vocab + Act::row_bytes(shape.hidden))
    }
}

fn kv_width(shape: &ModelShape) -> usize {
    shape.kv_heads * shape.head_dim
}

/// What the adapters of a step change, by segment. (Apart from `Step`, since worker threads ask
/// it.)
#[derive(Clone, Copy)]
struct Adapters<'a> {
    batch: &'a Batch,
    bank: &'a Bank,
    shape: &'a ModelShape,
}

impl<'a> Adapters<'a> {
    fn of_slot(&self, slot: Slot) -> &'a Prepared {
        let adapter = self.bank.get(slot);
        adapter.expect("a slot stays resident while a batch names it")
    }

    fn add(&self, blend: &Blend, site: Site, add: Add<'_, 'a>) {
        for (slot, weight) in blend.parts() {
            if let Some(delta) = &self.of_slot(slot).deltas[self.shape.site_index(site)] {
                add(delta, weight);
            }
        }
    }

    fn deltas(&self, segment: usize, site: Site, add: Add<'_, 'a>) {
        self.add(&self.batch.segment_blends[segment], site, add);
    }

    /// Of the head, by segment of `logit_rows`.
    fn head(&self, segment: usize, add: Add<'_, 'a>) {
        self.add(&self.batch.logit_blends[segment], Site::Head, add);
    }

    fn embedding(&self, segment: usize, add: AddEmbed<'_, 'a>) {
        for (slot, weight) in self.batch.segment_blends[segment].parts() {
            if let Some(delta) = &self.of_slot(slot).embedding {
                add(delta, weight);
            }
        }
    }

    /// Only an adapter alone may replace norms.
    fn norm(&self, segment: usize, norm: Norm) -> Option<&'a [f32]> {
        let slot = self.batch.segment_blends[segment].alone()?;
        self.of_slot(slot).norms[self.shape.norm_index(norm)].as_deref()
    }
}

/// Everything a step reads.
pub(super) struct Step<'a> {
    pub batch: &'a Batch,
    pub bank: &'a Bank,
    pub weights: &'a Weights,
    pub device: &'a Device,
    pub rope: &'a RopeTable,
    pub rope_local: Option<&'a RopeTable>,
}

impl<'a> Step<'a> {
    pub fn run<'b>(&self, b: &'b mut Buffers, kv: &mut KvCache) -> &'b mut [f32] {
        let shape = self.shape();
        let adapters = self.adapters();
        let embedding = |g: usize, add: AddEmbed<'_, 'a>| adapters.embedding(g, add);
        let h = &mut b.h[..self.rows() * shape.hidden];
        embed(
            self.device,
            self.weights.embedding(),
            &self.batch.tokens,
            shape.embedding_scale,
            self.segments(),
            &embedding,
            h,
        );
        for layer in 0..shape.layers {
            let before = layer.checked_sub(1);
            self.add_norm(b, before.map(|l| self.after_mlp(l)), Norm::Input(layer));
            self.attend(b, kv, layer);
            let (post, next) = match shape.post_norms {
                true => (Some(Norm::PostAttention(layer)), Norm::PreFeedforward(layer)),
                false => (None, Norm::PostAttention(layer)),
            };
            self.add_norm(b, Some(post), next);
            self.mlp(b, layer);
        }
        self.logits(b)
    }

    fn shape(&self) -> &'a ModelShape {
        &self.weights.shape
    }

    fn rows(&self) -> usize {
        self.batch.tokens.len()
    }

    fn adapters(&self) -> Adapters<'a> {
        Adapters { batch: self.batch, bank: self.bank, shape: self.shape() }
    }

    fn segments(&self) -> Segments<'a> {
        let indptr = &self.batch.segment_indptr;
        Segments { indptr }
    }

    fn page_rows(&self) -> Rows<'a> {
        Rows {
            positions: &self.batch.positions,
            sequences: &self.batch.sequences,
            pages: &self.batch.pages,
            page_indptr: &self.batch.page_indptr,
        }
    }

    /// The norm on the MLP's output of a layer, where the family has one.
    fn after_mlp(&self, layer: usize) -> Option<Norm> {
        let post = self.shape().post_norms;
        post.then_some(Norm::PostFeedforward(layer))
    }

    /// h += y (normed by the inner norm, where there is one), then x = norm(h). `made` None: there
    /// is no y yet.
    fn add_norm(&self, b: &mut Buffers, made: Option<Option<Norm>>, norm: Norm) {
        let (hidden, adapters) = (self.shape().hidden, self.adapters());
        let post = made.flatten().unwrap_or(norm);
        let post_replaced = |g: usize| adapters.norm(g, post);
        let replaced = |g: usize| adapters.norm(g, norm);
        let residual = made.map(|inner| Residual {
            y: &b.y[..self.rows() * hidden],
            post: inner
                .map(|n| NormWeight { base: self.weights.norm(n), replaced: &post_replaced }),
        });
        let weight = NormWeight { base: self.weights.norm(norm), replaced: &replaced };
        add_norm(
            self.device,
            &mut b.h[..self.rows() * hidden],
            self.rows(),
            residual,
            weight,
            self.shape().norm_eps,
            self.segments(),
            &mut b.x,
        );
    }

    /// y = attention(x)
    fn attend(&self, b: &mut Buffers, kv: &mut KvCache, layer: usize) {
        let (shape, rows, adapters) = (self.shape(), self.rows(), self.adapters());
        let site = |p| Site::Layer(layer, p);
        let (q_width, kv_width) = (shape.heads * shape.head_dim, kv_width(shape));
        let q = &mut b.q[..rows * q_width];
        let k = &mut b.k[..rows * kv_width];
        let v = &mut b.v[..rows * kv_width];
        let mut outs = [
            self.linear(site(Projection::Q), q),
            self.linear(site(Projection::K), k),
            self.linear(site(Projection::V), v),
        ];
        let read = [Projection::Q, Projection::K, Projection::V].map(site);
        let deltas = |i: usize, g: usize, add: Add<'_, 'a>| adapters.deltas(g, read[i], add);
        let segments = self.segments();
        linear_sum(self.device, &b.x, rows, &mut outs, segments, &deltas, &mut b.scratch);

        let window = shape.windows[layer];
        let local = self.rope_local.filter(|_| window.is_some());
        let q_replaced = |g: usize| adapters.norm(g, Norm::Query(layer));
        let k_replaced = |g: usize| adapters.norm(g, Norm::Key(layer));
        let head_norm = |norm, replaced| NormWeight { base: self.weights.norm(norm), replaced };
        let store = RopeStore {
            q,
            k,
            v,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            q_norm: shape.qk_norm.then(|| head_norm(Norm::Query(layer), &q_replaced)),
            k_norm: shape.qk_norm.then(|| head_norm(Norm::Key(layer), &k_replaced)),
            eps: shape.norm_eps,
            rope: local.unwrap_or(self.rope),
            layer,
        };
        rope_store(self.device, store, self.page_rows(), segments, kv);
        attention(
            self.device,
            &b.q[..rows * q_width],
            shape.heads,
            kv,
            layer,
            self.page_rows(),
            shape.attention_scale,
            window,
            &mut b.found,
            &mut b.parts,
        );
        let y = &mut b.y[..rows * shape.hidden];
        self.one_linear(&b.found, rows, site(Projection::O), y, &mut b.scratch);
    }

    /// y = down(act(gate(x)) ∘ up(x))
    fn mlp(&self, b: &mut Buffers, layer: usize) {
        let (shape, rows, adapters) = (self.shape(), self.rows(), self.adapters());
        let site = |p| Site::Layer(layer, p);
        let gate = &mut b.gate[..rows * shape.ffn];
        let up = &mut b.up[..rows * shape.ffn];
        let mut outs =
            [self.linear(site(Projection::Gate), gate), self.linear(site(Projection::Up), up)];
        let read = [Projection::Gate, Projection::Up].map(site);
        let deltas = |i: usize, g: usize, add: Add<'_, 'a>| adapters.deltas(g, read[i], add);
        let segments = self.segments();
        linear_sum(self.device, &b.x, rows, &mut outs, segments, &deltas, &mut b.scratch);
        let kind = match shape.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        glu(self.device, kind, gate, up, rows, &mut b.gated);
        let y = &mut b.y[..rows * shape.hidden];
        self.one_linear(&b.gated, rows, site(Projection::Down), y, &mut b.scratch);
    }

    fn linear<'y>(&self, site: Site, y: &'y mut [f32]) -> Linear<'y>
    where
        'a: 'y,
    {
        Linear { weight: self.weights.site(site), bias: self.weights.bias(site), y }
    }

    fn one_linear(
        &self,
        x: &Act,
        rows: usize,
        site: Site,
        y: &mut [f32],
        scratch: &mut LoraScratch,
    ) {
        let adapters = self.adapters();
        let deltas = |_: usize, g: usize, add: Add<'_, 'a>| adapters.deltas(g, site, add);
        let mut outs = [self.linear(site, y)];
        linear_sum(self.device, x, rows, &mut outs, self.segments(), &deltas, scratch);
    }

    /// The head on the rows that are sampled. `[S', V]`
    fn logits<'b>(&self, b: &'b mut Buffers) -> &'b mut [f32] {
        let shape = self.shape();
        let rows = self.batch.logit_rows.len();
        let logits = &mut b.logits[..rows * shape.vocab];
        if rows == 0 {
            return logits;
        }
        let adapters = self.adapters();
        let inner = self.after_mlp(shape.layers - 1);
        let post_replaced = |g: usize| inner.and_then(|n| adapters.norm(g, n));
        let replaced = |g: usize| adapters.norm(g, Norm::Final);
        let residual = Residual {
            y: &b.y[..self.rows() * shape.hidden],
            post: inner
                .map(|n| NormWeight { base: self.weights.norm(n), replaced: &post_replaced }),
        };
        let weight = NormWeight { base: self.weights.norm(Norm::Final), replaced: &replaced };
        add_norm_rows(
            self.device,
            &b.h[..self.rows() * shape.hidden],
            &self.batch.logit_rows,
            Some(residual),
            weight,
            shape.norm_eps,
            self.segments(),
            &mut b.last,
        );
        let deltas = |_: usize, g: usize, add: Add<'_, 'a>| adapters.head(g, add);
        let segments = Segments { indptr: &self.batch.logit_indptr };
        let mut outs = [self.linear(Site::Head, logits)];
        linear_sum(self.device, &b.last, rows, &mut outs, segments, &deltas, &mut b.scratch);
        logits
    }
}
