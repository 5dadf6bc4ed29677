//! From checked tensors to what the bank multiplies with: scale folded in, DoRA gains computed.
//!
//! Owns the arithmetic between the file and the kernel. Never decides what is allowed: `Parsed` has
//! been checked. The thing to know: DoRA's norm needs the base, row by row, and is summed in f64.

use super::large;
use super::parsed::{BaseCopy, Factors, Layout, Parsed, SiteParts, Table};
use crate::adapters::bank::Prepared;
use crate::adapters::{BaseBias, BaseRows, Digest};
use crate::error::{Error, Result};
use crate::shape::{ModelShape, Site};
use polylora_kernels::{Delta, EmbedDelta, FactorDtype, Memory, Resident, Vector};

/// A copy beside factors may differ from the served table by this much of a row's norm: the
/// rounding of 8-bit storage.
const FROZEN_COPY_TOLERANCE: f64 = 1.0 / 64.0;
/// A copy that training could have changed may differ by the rounding of bf16 only.
const PLAIN_COPY_TOLERANCE: f64 = 1.0 / 256.0;

/// Where prepared factors go.
pub struct Target<'a> {
    pub shape: &'a ModelShape,
    pub dtype: FactorDtype,
    /// The memory of the device that multiplies with them.
    pub memory: &'a Memory,
    pub rows: &'a BaseRows,
    pub bias: &'a BaseBias,
}

/// Reads the values and makes the deltas. Errors: `non_finite_values`, `base_weights_changed`.
pub fn prepare(parsed: &Parsed, digest: Digest, to: &Target<'_>) -> Result<Prepared> {
    let shape = to.shape;
    let mut deltas: Vec<Option<Delta>> = (0..shape.sites()).map(|_| None).collect();
    let sites: Vec<_> = parsed.sites.iter().collect();
    let made = large::each(parsed.file.bytes(), &sites, |(site, parts)| {
        Ok((shape.site_index(**site), site_delta(parsed, **site, parts, to)?))
    });
    for (index, delta) in made? {
        deltas[index] = Some(delta);
    }
    let mut norms: Vec<Option<Vector>> = (0..shape.norms()).map(|_| None).collect();
    for (&norm, &id) in &parsed.norms {
        let mut weight = parsed.file.read(id)?;
        if shape.norm_plus_one {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        norms[shape.norm_index(norm)] = Some(Vector::new(to.memory, weight)?);
    }
    let embedding = match &parsed.embedding {
        None => None,
        Some(f) => {
            let (a, b) = read_factors(parsed, f)?;
            // PEFT multiplies the embedding's delta with the model's embedding scale too.
            let scale = f.scale * shape.embedding_scale;
            let (vocab, hidden) = (shape.vocab, shape.hidden);
            let rank = f.rank;
            Some(EmbedDelta::new(to.memory, to.dtype, rank, vocab, hidden, &a, &b, scale)?)
        }
    };
    for copy in &parsed.copies {
        check_copy(parsed, copy, to)?;
    }
    let resident = Resident { deltas, norms, embedding };
    Ok(Prepared { digest, bytes: resident.bytes(), resident })
}

fn site_delta(parsed: &Parsed, site: Site, parts: &SiteParts, to: &Target<'_>) -> Result<Delta> {
    let (inputs, outputs) = to.shape.site_dims(site);
    let (rank, scale) = parts.factors.as_ref().map_or((0, 1.0), |f| (f.rank, f.scale));
    let (a, b) = match &parts.factors {
        Some(f) => read_factors(parsed, f)?,
        None => (Vec::new(), Vec::new()),
    };
    let gain = match parts.magnitude {
        None => None,
        Some(id) => {
            let magnitude = parsed.file.read(id)?;
            let product = Product { a: &a, b: &b, rank, inputs, scale: f64::from(scale) };
            let gain = product.gains(&magnitude, |o, row| (to.rows)(site, o, row));
            if let Some(o) = gain.iter().position(|g| !g.is_finite()) {
                return Err(Error::unprocessable(
                    "non_finite_values",
                    format!("the DoRA norm of `{}` is not positive in row {o}", parts.path),
                ));
            }
            Some(gain)
        }
    };
    let bias = site_bias(parsed, site, parts, scale, to)?;
    let (memory, dtype) = (to.memory, to.dtype);
    Ok(Delta::new(memory, dtype, rank, inputs, outputs, &a, &b, scale, gain, bias)?)
}

/// scale · lora_B.bias + (trained bias − base bias)
fn site_bias(
    parsed: &Parsed,
    site: Site,
    parts: &SiteParts,
    scale: f32,
    to: &Target<'_>,
) -> Result<Option<Vec<f32>>> {
    let mut bias: Option<Vec<f32>> = None;
    if let Some(id) = parts.factor_bias {
        let mut values = parsed.file.read(id)?;
        values.iter_mut().for_each(|v| *v *= scale);
        bias = Some(values);
    }
    if let Some(id) = parts.base_bias {
        let mut values = parsed.file.read(id)?;
        let base = (to.bias)(site).ok_or_else(|| {
            Error::fault(format!("the base's bias of `{}` is not at hand", parts.path))
        })?;
        for (v, b) in values.iter_mut().zip(base) {
            *v -= b;
        }
        match &mut bias {
            Some(sum) => sum.iter_mut().zip(values).for_each(|(s, v)| *s += v),
            None => bias = Some(values),
        }
    }
    Ok(bias)
}

/// A `[R, I]` and B `[O, R]` as PEFT lays them.
pub(super) fn read_factors(parsed: &Parsed, f: &Factors) -> Result<(Vec<f32>, Vec<f32>)> {
    let (mut a, mut b) = (parsed.file.read(f.a)?, parsed.file.read(f.b)?);
    match f.layout {
        Layout::Peft => {}
        Layout::TransposedA => a = transposed(&a, f.rank),
        Layout::RotatedRows { heads } => b = unrotated(&b, f.rank, heads),
    }
    Ok((a, b))
}

/// `[I, R]` to `[R, I]`
fn transposed(a: &[f32], rank: usize) -> Vec<f32> {
    let inputs = a.len() / rank;
    (0..a.len()).map(|i| a[i % inputs * rank + i / inputs]).collect()
}

/// Rows of each head from GGUF's pairs (j, half) to Hugging Face's halves (half, j).
fn unrotated(b: &[f32], rank: usize, heads: usize) -> Vec<f32> {
    let head_dim = b.len() / rank / heads;
    let mut out = Vec::with_capacity(b.len());
    for head in 0..heads {
        for half in 0..2 {
            for j in 0..head_dim / 2 {
                let row = head * head_dim + j * 2 + half;
                out.extend_from_slice(&b[row * rank..(row + 1) * rank]);
            }
        }
    }
    out
}

/// scale · B · A beside a base weight W.
struct Product<'a> {
    /// `[R, I]`
    a: &'a [f32],
    /// `[O, R]`
    b: &'a [f32],
    rank: usize,
    inputs: usize,
    scale: f64,
}

impl Product<'_> {
    /// DoRA: magnitude / ‖W + scale·B·A‖ of each output row, without ever making the sum:
    /// ‖w + s·bA‖² = ‖w‖² + 2s·b·(A w) + s²·b (A Aᵀ) bᵀ.
    fn gains(&self, magnitude: &[f32], row: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
        let gram = self.gram();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let share = magnitude.len().div_ceil(threads).max(1);
        let mut gains = vec![0.0; magnitude.len()];
        std::thread::scope(|scope| {
            for (i, gains) in gains.chunks_mut(share).enumerate() {
                let (row, gram) = (&row, &gram);
                scope.spawn(move || {
                    let mut w = vec![0.0; self.inputs];
                    for (k, gain) in gains.iter_mut().enumerate() {
                        let o = i * share + k;
                        row(o, &mut w);
                        *gain = (f64::from(magnitude[o]) / self.norm(o, &w, gram)) as f32;
                    }
                });
            }
        });
        gains
    }

    /// A Aᵀ `[R, R]`
    fn gram(&self) -> Vec<f64> {
        let row = |r: usize| &self.a[r * self.inputs..(r + 1) * self.inputs];
        (0..self.rank * self.rank).map(|i| dot(row(i / self.rank), row(i % self.rank))).collect()
    }

    fn norm(&self, o: usize, w: &[f32], gram: &[f64]) -> f64 {
        let b = &self.b[o * self.rank..(o + 1) * self.rank];
        let mut cross = 0.0;
        let mut square = 0.0;
        for (r, &br) in b.iter().enumerate() {
            let br = f64::from(br);
            cross += br * dot(&self.a[r * self.inputs..(r + 1) * self.inputs], w);
            let row = gram[r * self.rank..(r + 1) * self.rank].iter().zip(b);
            square += br * row.map(|(g, &bq)| g * f64::from(bq)).sum::<f64>();
        }
        (dot(w, w) + self.scale * (2.0 * cross + self.scale * square)).max(0.0).sqrt()
    }
}

/// Σ x·y in f64, in eight lanes.
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    let (xs, x_rest) = x.as_chunks::<8>();
    let (ys, y_rest) = y.as_chunks::<8>();
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..8 {
            lanes[i] += f64::from(x[i]) * f64::from(y[i]);
        }
    }
    let rest = x_rest.iter().zip(y_rest);
    lanes.iter().sum::<f64>() + rest.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>()
}

/// Compares every row of a saved table with the base's. An untied embedding cannot be read through
/// `BaseRows`; its frozen copy is taken on its shape.
fn check_copy(parsed: &Parsed, copy: &BaseCopy, to: &Target<'_>) -> Result<()> {
    if copy.table == Table::Embedding && !to.shape.tied_head {
        return Ok(());
    }
    let tolerance = if copy.frozen { FROZEN_COPY_TOLERANCE } else { PLAIN_COPY_TOLERANCE };
    let hidden = to.shape.hidden;
    let block_rows = (1 << 20) / hidden.max(1) + 1;
    let mut base = vec![0.0; hidden];
    let mut block = Vec::new();
    for first in (0..to.shape.vocab).step_by(block_rows) {
        let end = to.shape.vocab.min(first + block_rows);
        parsed.file.read_values(copy.tensor, first * hidden..end * hidden, &mut block)?;
        for (i, row) in block.chunks_exact(hidden).enumerate() {
            (to.rows)(Site::Head, first + i, &mut base);
            let difference: f64 =
                row.iter().zip(&base).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            if difference.sqrt() > tolerance * dot(&base, &base).sqrt() + 1e-6 {
                return Err(Error::unprocessable(
                    "base_weights_changed",
                    format!(
                        "tensor `{}` differs from the served model in row {}: the adapter was \
                         made on other base weights",
                        parsed.file.tensor(copy.tensor).name,
                        first + i
                    ),
                ));
            }
        }
    }
    Ok(())
}
