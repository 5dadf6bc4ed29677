//! The forward half: the ops of serving's decoder, and what backward needs of each layer kept.
//!
//! Owns the order of what an op does. Never reads a gradient. The thing to know: what a block made
//! is added to h by the norm that comes next, as in serving.

use super::buffers::{Buffers, Kept, copy};
use super::ops::{Made, Ops, site};
use super::stage::Stage;
use crate::shape::{Norm, Projection};
use crate::train::adapter::Adapter;
use polylora_kernels::{
    Act, Error, Plane, Residual, Segments, add_norm, attention_lse, embed, glu, rope_store,
};

impl Ops<'_> {
    /// h = the table's rows of the tokens.
    pub fn embed(&self, b: &mut Buffers) {
        let (table, scale) = (self.decoder.weights.embedding(), self.shape().embedding_scale);
        embed(self.dev, table, self.batch.tokens(), scale, Segments::none(), &mut b.h);
    }

    /// One op of a layer.
    pub fn forward(
        &self,
        b: &mut Buffers,
        (layer, stage): (usize, Stage),
        adapters: &[Adapter],
    ) -> Result<(), Error> {
        match stage {
            Stage::Norm => self.norm(b, layer)?,
            Stage::Qkv => self.qkv(b, layer, adapters)?,
            Stage::Rope => self.rope(b, layer),
            Stage::Attention => self.attention(b, layer),
            Stage::O => self.o(b, layer, adapters),
            Stage::MlpNorm => self.mlp_norm(b, layer)?,
            Stage::Up => self.up(b, layer, adapters),
            Stage::Gate => self.gate(b, layer, adapters),
            Stage::Glu => self.glu(b, layer),
            Stage::Down => self.down(b, layer, adapters),
        }
        Ok(())
    }

    /// Adds Σ (x·Aᵀ)ᵀ·x to the gradient of A of a stage's sites, after its op.
    pub fn calibrate(
        &self,
        b: &mut Buffers,
        (layer, stage): (usize, Stage),
        adapters: &mut [Adapter],
    ) {
        let Buffers { layers, x, gated, u, .. } = b;
        let x = match stage {
            Stage::O => &layers[self.place(layer)].found,
            Stage::Down => gated,
            _ => x,
        };
        for projection in stage.projections() {
            self.sketch(adapters, site(layer, *projection), x, u);
        }
    }

    /// h += what the last layer made, normed where the family does so; h is left whole for the
    /// head.
    pub fn last_norm(&self, b: &mut Buffers) {
        let Buffers { layers, h, x, y, .. } = b;
        let last = self.shape().layers - 1;
        let made = layers[self.place(last)].made.as_ref().map_or(&*y, |[_, mlp]| mlp);
        let made = Some((made, self.shape().norm_after_mlp(last)));
        self.add_norm(h, made, Norm::Final, x);
    }

    /// h += made, by way of its norm; then x = norm(h).
    pub fn add_norm(
        &self,
        h: &mut Plane,
        made: Option<(&Plane, Option<Norm>)>,
        norm: Norm,
        x: &mut Act,
    ) {
        let residual =
            made.map(|(y, post)| Residual { y, post: post.map(|n| self.decoder.norm(n)) });
        let (norm, eps) = (self.decoder.norm(norm), self.shape().norm_eps);
        add_norm(self.dev, h, self.rows(), residual, norm, eps, Segments::none(), x);
    }

    fn norm(&self, b: &mut Buffers, layer: usize) -> Result<(), Error> {
        let Buffers { layers, h, x, y, .. } = b;
        let made = layer.checked_sub(1).map(|before| {
            let made = layers[self.place(before)].made.as_ref().map_or(&*y, |[_, mlp]| mlp);
            (made, self.shape().norm_after_mlp(before))
        });
        self.add_norm(h, made, Norm::Input(layer), x);
        copy(self.dev, h, self.rows(), &mut layers[self.place(layer)].h)
    }

    fn qkv(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) -> Result<(), Error> {
        let Buffers { layers, x, k, v, u, scratch, .. } = b;
        let Kept { q, unnormed, z: [z_q, z_k, z_v, ..], .. } = &mut layers[self.place(layer)];
        let outs = [
            Made { site: site(layer, Projection::Q), y: q, z: z_q.as_mut() },
            Made { site: site(layer, Projection::K), y: k, z: z_k.as_mut() },
            Made { site: site(layer, Projection::V), y: v, z: z_v.as_mut() },
        ];
        self.sites_forward(adapters, outs, x, u, scratch);
        if let Some([q_kept, k_kept]) = unnormed {
            copy(self.dev, q, self.rows(), q_kept)?;
            copy(self.dev, k, self.rows(), k_kept)?;
        }
        Ok(())
    }

    fn rope(&self, b: &mut Buffers, layer: usize) {
        let place = self.place(layer);
        let q = &mut b.layers[place].q;
        let rotation = self.decoder.rotation(layer, [q, &mut b.k], &b.v, place);
        rope_store(self.dev, rotation, self.batch.page_rows(), Segments::none(), &mut b.kv);
    }

    fn attention(&self, b: &mut Buffers, layer: usize) {
        let (shape, place) = (self.shape(), self.place(layer));
        let kept = &mut b.layers[place];
        attention_lse(
            self.dev,
            &kept.q,
            shape.heads,
            &b.kv,
            place,
            self.batch.page_rows(),
            shape.attention_scale,
            shape.windows[layer],
            &mut kept.found,
            &mut kept.lse,
            &mut b.parts,
        );
    }

    fn o(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) {
        let Buffers { layers, y, u, scratch, .. } = b;
        let Kept { found, made, z: [_, _, _, z, ..], .. } = &mut layers[self.place(layer)];
        let y = made.as_mut().map_or(y, |[attention, _]| attention);
        let out = Made { site: site(layer, Projection::O), y, z: z.as_mut() };
        self.sites_forward(adapters, [out], found, u, scratch);
    }

    fn mlp_norm(&self, b: &mut Buffers, layer: usize) -> Result<(), Error> {
        let Buffers { layers, h, x, y, .. } = b;
        let kept = &mut layers[self.place(layer)];
        let made = kept.made.as_ref().map_or(&*y, |[attention, _]| attention);
        let made = Some((made, self.shape().norm_after_attention(layer)));
        self.add_norm(h, made, self.shape().norm_before_mlp(layer), x);
        copy(self.dev, h, self.rows(), &mut kept.h_mlp)
    }

    fn gate(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) {
        let Buffers { layers, x, u, scratch, .. } = b;
        let Kept { gate, z: [_, _, _, _, z, ..], .. } = &mut layers[self.place(layer)];
        let out = Made { site: site(layer, Projection::Gate), y: gate, z: z.as_mut() };
        self.sites_forward(adapters, [out], x, u, scratch);
    }

    fn up(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) {
        let Buffers { layers, x, u, scratch, .. } = b;
        let Kept { up, z: [_, _, _, _, _, z, _], .. } = &mut layers[self.place(layer)];
        let out = Made { site: site(layer, Projection::Up), y: up, z: z.as_mut() };
        self.sites_forward(adapters, [out], x, u, scratch);
    }

    /// gated = act(gate) ∘ up; backward makes it again.
    pub fn glu(&self, b: &mut Buffers, layer: usize) {
        let kept = &b.layers[self.place(layer)];
        let gate = self.decoder.gate();
        glu(self.dev, gate, &kept.gate, &kept.up, self.rows(), &mut b.gated);
    }

    fn down(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) {
        let Buffers { layers, gated, y, u, scratch, .. } = b;
        let Kept { made, z: [.., z], .. } = &mut layers[self.place(layer)];
        let y = made.as_mut().map_or(y, |[_, mlp]| mlp);
        let out = Made { site: site(layer, Projection::Down), y, z: z.as_mut() };
        self.sites_forward(adapters, [out], gated, u, scratch);
    }
}
