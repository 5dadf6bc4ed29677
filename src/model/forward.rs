//! The path of a row through the decoder, in the kernels' ops.
//!
//! Owns the order of ops and the step's buffers. Never allocates after `Buffers::new`. The thing to
//! know: a block's output `y` is not added to `h` where it is made, but by the norm that comes
//! next, in one pass over both.

use super::batch::{Batch, ModelOptions};
use super::decoder::Decoder;
use super::weights::Weights;
use crate::adapters::format::config::RANK_MAX;
use crate::shape::{ModelShape, Norm, Projection, Site};
use polylora_kernels::{
    Act, AttentionScratch, Device, Error, KvCache, LoraScratch, Memory, Plane, Residents, Residual,
    Rows, Segments, add_norm, add_norm_rows, attention, embed, glu, linear, rope_store,
};

/// Memory of one step, taken at start. T = rows_max, S' = logit_rows_max.
pub(super) struct Buffers {
    /// The residual stream. `[T, H]`
    h: Plane,
    /// What a block reads: `h`, normed. `[T, H]`
    x: Act,
    q: Plane, // [T, N·D]
    k: Plane, // [T, K·D]
    v: Plane, // [T, K·D]
    /// What attention found. `[T, N·D]`
    found: Act,
    /// What a block made, not yet added to `h`. `[T, H]`
    y: Plane,
    gate: Plane,   // [T, F]
    up: Plane,     // [T, F]
    gated: Act,    // [T, F]
    last: Act,     // [S', H]
    logits: Plane, // [S', V]
    scratch: LoraScratch,
    parts: AttentionScratch,
}

impl Buffers {
    pub fn new(memory: &Memory, weights: &Weights, o: &ModelOptions) -> Result<Self, Error> {
        let shape = &weights.shape;
        let act = |rows: usize, width: usize| weights.activation(memory, rows, width);
        let (rows, q, kv) = (o.rows_max, shape.q_width(), shape.kv_width());
        let plane = |width: usize| Plane::new(memory, rows, width);
        Ok(Self {
            h: plane(shape.hidden)?,
            x: act(rows, shape.hidden)?,
            q: plane(q)?,
            k: plane(kv)?,
            v: plane(kv)?,
            found: act(rows, q)?,
            y: plane(shape.hidden)?,
            gate: plane(shape.ffn)?,
            up: plane(shape.ffn)?,
            gated: act(rows, shape.ffn)?,
            last: act(o.logit_rows_max, shape.hidden)?,
            logits: Plane::new(memory, o.logit_rows_max, shape.vocab)?,
            scratch: LoraScratch::new(memory, rows.max(o.logit_rows_max), RANK_MAX)?,
            parts: AttentionScratch::new(
                memory,
                o.threads,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                o.context,
            )?,
        })
    }

    /// Upper bound of what `new` takes: activations as f32 with a bf16 copy, and bytes for integer
    /// weights.
    pub fn bytes(shape: &ModelShape, o: &ModelOptions) -> usize {
        let q = shape.q_width();
        let plain = 2 * shape.hidden + q + 2 * shape.kv_width() + 2 * shape.ffn;
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

/// Everything a step reads.
pub(super) struct Step<'a> {
    pub batch: &'a Batch,
    pub residents: &'a Residents,
    pub decoder: Decoder<'a>,
    pub device: &'a Device,
}

impl<'a> Step<'a> {
    /// The logits of the rows that are sampled, or what the device failed at first.
    pub fn run<'b>(&self, b: &'b mut Buffers, kv: &mut KvCache) -> Result<&'b mut [f32], Error> {
        let shape = self.shape();
        let (table, scale) = (self.decoder.weights.embedding(), shape.embedding_scale);
        embed(self.device, table, &self.batch.tokens, scale, self.segments(), &mut b.h);
        for layer in 0..shape.layers {
            let before = layer.checked_sub(1);
            self.add_norm(b, before.map(|l| shape.norm_after_mlp(l)), Norm::Input(layer));
            self.attend(b, kv, layer);
            self.add_norm(b, Some(shape.norm_after_attention(layer)), shape.norm_before_mlp(layer));
            self.mlp(b, layer);
        }
        self.logits(b);
        b.logits.read(self.device, self.batch.logit_rows.len())
    }

    fn shape(&self) -> &'a ModelShape {
        self.decoder.shape()
    }

    fn rows(&self) -> usize {
        self.batch.tokens.len()
    }

    fn segments(&self) -> Segments<'a> {
        let Batch { segment_indptr: indptr, segment_mixes: mixes, .. } = self.batch;
        Segments { indptr, mixes, residents: self.residents }
    }

    /// Over `logit_rows`.
    fn logit_segments(&self) -> Segments<'a> {
        let Batch { logit_indptr: indptr, logit_mixes: mixes, .. } = self.batch;
        Segments { indptr, mixes, residents: self.residents }
    }

    fn page_rows(&self) -> Rows<'a> {
        Rows {
            positions: &self.batch.positions,
            sequences: &self.batch.sequences,
            pages: &self.batch.pages,
            page_indptr: &self.batch.page_indptr,
        }
    }

    /// h += y (normed by the inner norm, where there is one), then x = norm(h). `made` None: there
    /// is no y yet.
    fn add_norm(&self, b: &mut Buffers, made: Option<Option<Norm>>, norm: Norm) {
        let residual =
            made.map(|post| Residual { y: &b.y, post: post.map(|n| self.decoder.norm(n)) });
        add_norm(
            self.device,
            &mut b.h,
            self.rows(),
            residual,
            self.decoder.norm(norm),
            self.shape().norm_eps,
            self.segments(),
            &mut b.x,
        );
    }

    /// y = attention(x)
    fn attend(&self, b: &mut Buffers, kv: &mut KvCache, layer: usize) {
        let (dev, shape, rows, segments) =
            (self.device, self.shape(), self.rows(), self.segments());
        let site = |p| Site::Layer(layer, p);
        let mut outs = [
            self.decoder.linear(site(Projection::Q), &mut b.q),
            self.decoder.linear(site(Projection::K), &mut b.k),
            self.decoder.linear(site(Projection::V), &mut b.v),
        ];
        linear(dev, &b.x, rows, &mut outs, segments, &mut b.scratch);

        let store = self.decoder.rotation(layer, [&mut b.q, &mut b.k], &b.v, layer);
        rope_store(dev, store, self.page_rows(), segments, kv);
        attention(
            dev,
            &b.q,
            shape.heads,
            kv,
            layer,
            self.page_rows(),
            shape.attention_scale,
            shape.windows[layer],
            &mut b.found,
            &mut b.parts,
        );
        let mut outs = [self.decoder.linear(site(Projection::O), &mut b.y)];
        linear(dev, &b.found, rows, &mut outs, segments, &mut b.scratch);
    }

    /// y = down(act(gate(x)) ∘ up(x))
    fn mlp(&self, b: &mut Buffers, layer: usize) {
        let (dev, rows, segments) = (self.device, self.rows(), self.segments());
        let site = |p| Site::Layer(layer, p);
        let mut outs = [
            self.decoder.linear(site(Projection::Gate), &mut b.gate),
            self.decoder.linear(site(Projection::Up), &mut b.up),
        ];
        linear(dev, &b.x, rows, &mut outs, segments, &mut b.scratch);
        glu(dev, self.decoder.gate(), &b.gate, &b.up, rows, &mut b.gated);
        let mut outs = [self.decoder.linear(site(Projection::Down), &mut b.y)];
        linear(dev, &b.gated, rows, &mut outs, segments, &mut b.scratch);
    }

    /// The head on the rows that are sampled. `[S', V]`
    fn logits(&self, b: &mut Buffers) {
        let rows = &self.batch.logit_rows;
        if rows.is_empty() {
            return;
        }
        let inner = self.shape().norm_after_mlp(self.shape().layers - 1);
        let residual = Residual { y: &b.y, post: inner.map(|n| self.decoder.norm(n)) };
        add_norm_rows(
            self.device,
            &b.h,
            rows,
            Some(residual),
            self.decoder.norm(Norm::Final),
            self.shape().norm_eps,
            self.segments(),
            &mut b.last,
        );
        let mut outs = [self.decoder.linear(Site::Head, &mut b.logits)];
        let (segments, scratch) = (self.logit_segments(), &mut b.scratch);
        linear(self.device, &b.last, rows.len(), &mut outs, segments, scratch);
    }
}
