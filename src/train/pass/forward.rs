//! The forward half: the ops of serving's decoder, and what backward needs of each layer kept.
//!
//! Owns the order of what an op does. Never reads a gradient. The thing to know: what a block made
//! is added to h by the norm that comes next, as in serving.

use super::buffers::{Buffers, copy};
use super::ops::{Ops, site};
use super::stage::Stage;
use crate::shape::{Norm, Projection};
use crate::train::adapter::Adapter;
use polylora_kernels::{
    Act, Error, Plane, Residual, Segments, add_norm, attention_lse, embed, glu, linear, rope_store,
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
            Stage::GateUp => self.gate_up(b, layer, adapters),
            Stage::Glu => self.glu(b, layer),
            Stage::Down => self.down(b, layer, adapters),
        }
        Ok(())
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
        let kept = &mut b.layers[self.place(layer)];
        let [q, k, v] = [Projection::Q, Projection::K, Projection::V].map(|p| site(layer, p));
        let mut outs = [
            self.decoder.linear(q, &mut kept.q),
            self.decoder.linear(k, &mut b.k),
            self.decoder.linear(v, &mut b.v),
        ];
        let (x, rows, none) = (&b.x, self.rows(), Segments::none());
        linear(self.dev, x, rows, &mut outs, none, &mut b.scratch);
        self.adapt(adapters, q, x, &mut kept.q, &mut b.u);
        self.adapt(adapters, k, x, &mut b.k, &mut b.u);
        self.adapt(adapters, v, x, &mut b.v, &mut b.u);
        if let Some([q, k]) = &mut kept.unnormed {
            copy(self.dev, &mut kept.q, rows, q)?;
            copy(self.dev, &mut b.k, rows, k)?;
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
        let kept = &mut b.layers[self.place(layer)];
        let y = kept.made.as_mut().map_or(&mut b.y, |[attention, _]| attention);
        let o = site(layer, Projection::O);
        let mut outs = [self.decoder.linear(o, y)];
        let none = Segments::none();
        linear(self.dev, &kept.found, self.rows(), &mut outs, none, &mut b.scratch);
        self.adapt(adapters, o, &kept.found, y, &mut b.u);
    }

    fn mlp_norm(&self, b: &mut Buffers, layer: usize) -> Result<(), Error> {
        let Buffers { layers, h, x, y, .. } = b;
        let kept = &mut layers[self.place(layer)];
        let made = kept.made.as_ref().map_or(&*y, |[attention, _]| attention);
        let made = Some((made, self.shape().norm_after_attention(layer)));
        self.add_norm(h, made, self.shape().norm_before_mlp(layer), x);
        copy(self.dev, h, self.rows(), &mut kept.h_mlp)
    }

    fn gate_up(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) {
        let kept = &mut b.layers[self.place(layer)];
        let [gate, up] = [Projection::Gate, Projection::Up].map(|p| site(layer, p));
        let mut outs =
            [self.decoder.linear(gate, &mut kept.gate), self.decoder.linear(up, &mut kept.up)];
        linear(self.dev, &b.x, self.rows(), &mut outs, Segments::none(), &mut b.scratch);
        self.adapt(adapters, gate, &b.x, &mut kept.gate, &mut b.u);
        self.adapt(adapters, up, &b.x, &mut kept.up, &mut b.u);
    }

    /// gated = act(gate) ∘ up; backward makes it again.
    pub fn glu(&self, b: &mut Buffers, layer: usize) {
        let kept = &b.layers[self.place(layer)];
        let gate = self.decoder.gate();
        glu(self.dev, gate, &kept.gate, &kept.up, self.rows(), &mut b.gated);
    }

    fn down(&self, b: &mut Buffers, layer: usize, adapters: &[Adapter]) {
        let kept = &mut b.layers[self.place(layer)];
        let y = kept.made.as_mut().map_or(&mut b.y, |[_, mlp]| mlp);
        let down = site(layer, Projection::Down);
        let mut outs = [self.decoder.linear(down, y)];
        linear(self.dev, &b.gated, self.rows(), &mut outs, Segments::none(), &mut b.scratch);
        self.adapt(adapters, down, &b.gated, y, &mut b.u);
    }
}
