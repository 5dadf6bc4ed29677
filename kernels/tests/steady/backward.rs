//! A training step's ops, each once or more, on memory that is taken before.

use super::{DIM, HEADS, HIDDEN, ROWS, values};
use polylora_kernels::{
    Accumulate, Act, AttentionBackward, AttentionBackwardScratch, AttentionScratch, Device,
    DoraFactors, DoraScratch, Dtype, Error, Factor, FactorGradient, Gate, GluBackward, HeadNorm,
    KvCache, LinearBackward, Magnitude, MagnitudeGradient, Matrix, NormBackward, Plane,
    ResidualBackward, RopeTable, Rows, Scored, Vector, add_norm_backward, add_norm_rows_backward,
    attention_backward, attention_lse, cross_entropy_backward, dora, dora_backward, dora_norms,
    expand, glu_backward, linear_backward, outer, rope_backward, score, shrink, weight_squares,
};

const RANK: usize = 5;

pub struct Training {
    weight: Matrix,
    norm: Vector,
    rope: RopeTable,
    kv: KvCache,
    parts: AttentionScratch,
    scratch: AttentionBackwardScratch,
    norms: DoraScratch,
    planes: [Plane; 3],
    u: Plane,
    lse: Plane,
    d_out: Plane,
    acts: [Act; 3],
    factor: Vec<f32>,
    gradient: Vec<f32>,
    of_outputs: [Vec<f32>; 3],
    scored: Vec<Scored>,
}

impl Training {
    pub fn new(dev: &Device) -> Result<Training, Error> {
        let (memory, square) = (dev.memory(), values(HIDDEN * HIDDEN));
        let plane = || Plane::new(memory, ROWS, HIDDEN);
        let act = || Act::new(memory, Dtype::Bf16, ROWS, HIDDEN);
        let threads = dev.threads();
        Ok(Training {
            weight: Matrix::from_f32(memory, Dtype::Bf16, HIDDEN, HIDDEN, &square)?,
            norm: Vector::new(memory, values(HIDDEN))?,
            rope: RopeTable::new(memory, 64, HIDDEN, &[1.0; HIDDEN / 2], 1.0)?,
            kv: KvCache::new(memory, Dtype::Bf16, 1, ROWS, HEADS, DIM)?,
            parts: AttentionScratch::new(memory, threads, HEADS, HEADS, DIM, 64)?,
            scratch: AttentionBackwardScratch::new(memory, threads, ROWS, HEADS, DIM)?,
            norms: DoraScratch::new(memory, threads, RANK)?,
            planes: [plane()?, plane()?, plane()?],
            u: Plane::new(memory, ROWS, RANK)?,
            lse: Plane::new(memory, ROWS, HEADS)?,
            d_out: plane()?,
            acts: [act()?, act()?, act()?],
            factor: values(RANK * HIDDEN),
            gradient: values(RANK * HIDDEN),
            of_outputs: [values(HIDDEN), values(HIDDEN), values(HIDDEN)],
            scored: vec![Scored::default(); ROWS],
        })
    }

    pub fn run(&mut self, dev: &Device) {
        self.adapters(dev);
        self.attention(dev);
        let index: [u32; ROWS] = std::array::from_fn(|i| i as u32);
        let [x, y, dh] = &mut self.planes;
        let [dg, du, dy] = &mut self.acts;
        let sites = [&*dg, du].map(|dy| LinearBackward { weight: &self.weight, dy });
        linear_backward(dev, &sites, ROWS, dh, Accumulate::Add);
        let norm = NormBackward { x, weight: &self.norm, eps: 1e-5, dy: y };
        let post = Some((&*y, &self.norm, 1e-5));
        let residual = Some(ResidualBackward { post, dy: &mut *dy });
        add_norm_backward(dev, Some(norm), ROWS, dh, residual);
        add_norm_rows_backward(dev, norm, &index[3..], dh);
        let norm = HeadNorm { x, weight: &self.norm, eps: 1e-5 };
        rope_backward(dev, y, 1, &index, &self.rope, Some(norm), dy);
        let of = GluBackward { gate: Gate::Silu, g: x, u: y, da: dh };
        glu_backward(dev, of, ROWS, dg, du);
        score(dev, x, &index, &mut self.scored);
        let k = &self.of_outputs[0][..ROWS];
        cross_entropy_backward(dev, x, &index, k, dy, &mut self.scored);
    }

    fn adapters(&mut self, dev: &Device) {
        let ([_, y, dh], [dg, ..]) = (&mut self.planes, &mut self.acts);
        let rows = 1..ROWS;
        let values = &self.factor;
        let segments = [Factor { rows: rows.clone(), rank: RANK, values, scale: 0.5 }];
        shrink(dev, dg, &segments, &mut self.u);
        expand(dev, &self.u, &segments, dh);
        let values = &mut self.gradient;
        let of = FactorGradient { rows: rows.clone(), rank: RANK, values, scale: 1e-6 };
        outer(dev, &self.u, dg, &mut [of]);
        let [squares, norms, gradient] = &mut self.of_outputs;
        weight_squares(dev, &self.weight, squares);
        let (a, b) = (&self.factor, &self.factor);
        let factors = DoraFactors { rank: RANK, a, b, scale: 0.1 };
        dora_norms(dev, &self.weight, squares, factors, norms, &mut self.norms);
        let of = Magnitude { rows, values: squares, norms };
        dora(dev, dh, ROWS, std::slice::from_ref(&of), Some(&self.norm), y);
        dora_backward(dev, dh, &mut [MagnitudeGradient { of, gradient }], dg);
    }

    fn attention(&mut self, dev: &Device) {
        let [q, dk, dq] = &mut self.planes;
        let [out, dv, _] = &mut self.acts;
        let positions: [u32; ROWS] = std::array::from_fn(|i| i as u32);
        let (sequences, pages) = (&[0; ROWS], &[1, 0]);
        let rows = Rows { positions: &positions, sequences, pages, page_indptr: &[0, 2] };
        let (scale, window, lse) = (0.25, Some(9), &mut self.lse);
        attention_lse(dev, q, HEADS, &self.kv, 0, rows, scale, window, out, lse, &mut self.parts);
        let of = AttentionBackward {
            q,
            heads: HEADS,
            kv: &self.kv,
            layer: 0,
            rows,
            scale,
            window,
            out,
            lse,
            d_out: &self.d_out,
        };
        attention_backward(dev, of, dq, dk, dv, &mut self.scratch);
    }
}
