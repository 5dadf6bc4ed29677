//! The sources' factors at one site, side by side, and what their small cores say.
//!
//! Owns the one factorisation everything rests on: with A_sᵀ = Q_a·R_a and B = Q_b·R_b, any
//! weighted sum of the sources is Q_b·(R_b·D·R_aᵀ)·Q_aᵀ, where D holds the weights. Never makes an
//! O × I matrix. The thing to know: columns are ranks; a source owns a run of them, and D decides
//! what they are worth, so one factorisation serves every weighting.

use super::leading::{failed, leading};
use crate::adapters::format::factors::{FactorDims, ModuleFactors};
use crate::error::Result;
use faer::linalg::solvers::{Qr, Svd};
use faer::{Mat, MatRef};
use std::ops::Range;

/// What one source has at a site.
pub struct Part<'a> {
    /// Its number among all sources of the merge.
    pub source: usize,
    pub weight: f64,
    pub factors: &'a ModuleFactors,
}

impl Part<'_> {
    /// What the product of the factors counts: weight · scale.
    pub fn coefficient(&self) -> f64 {
        self.weight * f64::from(self.factors.scale)
    }
}

/// The stacked factors of a site, in f64.
pub struct Stack {
    pub inputs: usize,
    pub outputs: usize,
    /// Columns are rows of A: `[I, N]`.
    pub a: Mat<f64>,
    /// `[O, N]`
    pub b: Mat<f64>,
    /// Columns of each part.
    pub columns: Vec<Range<usize>>,
    qr_a: Qr<f64>,
    qr_b: Qr<f64>,
}

/// Singular values of a product, largest first, and where the vectors come from.
pub struct Core {
    pub svd: Svd<f64>,
}

impl Core {
    pub fn values(&self) -> Vec<f64> {
        self.svd.S().column_vector().iter().copied().collect()
    }
}

impl Stack {
    /// All parts must have the same inputs and outputs.
    pub fn new(parts: &[Part<'_>]) -> Self {
        let FactorDims { inputs, outputs, .. } = parts[0].factors.dims;
        let mut columns = Vec::with_capacity(parts.len());
        let mut ranks = 0;
        for part in parts {
            columns.push(ranks..ranks + part.factors.dims.rank);
            ranks += part.factors.dims.rank;
        }
        let (mut a, mut b) = (Mat::zeros(inputs, ranks), Mat::zeros(outputs, ranks));
        for (part, columns) in parts.iter().zip(&columns) {
            let rank = columns.len();
            for (r, n) in columns.clone().enumerate() {
                let row = &part.factors.a[r * inputs..(r + 1) * inputs];
                for (to, from) in a.col_as_slice_mut(n).iter_mut().zip(row) {
                    *to = f64::from(*from);
                }
                let column = part.factors.b.iter().skip(r).step_by(rank);
                for (to, from) in b.col_as_slice_mut(n).iter_mut().zip(column) {
                    *to = f64::from(*from);
                }
            }
        }
        let (qr_a, qr_b) = (a.qr(), b.qr());
        Self { inputs, outputs, a, b, columns, qr_a, qr_b }
    }

    pub fn ranks(&self) -> usize {
        self.a.ncols()
    }

    /// Aᵀ·A and Bᵀ·B of the columns, `[N, N]` both.
    pub fn grams(&self) -> (Mat<f64>, Mat<f64>) {
        let (r_a, r_b) = (self.qr_a.thin_R(), self.qr_b.thin_R());
        (r_a.transpose() * r_a, r_b.transpose() * r_b)
    }

    /// ⟨B_i·A_i, B_j·A_j⟩ of two parts, without their coefficients.
    pub fn inner(&self, i: usize, j: usize) -> f64 {
        let part = |r: faer::MatRef<'_, f64>, i: usize| {
            r.subcols(self.columns[i].start, self.columns[i].len()).to_owned()
        };
        let cross = |r| part(r, i).transpose() * part(r, j);
        let (a, b) = (cross(self.qr_a.thin_R()), cross(self.qr_b.thin_R()));
        let row = |n: usize| (0..a.ncols()).map(|m| a[(n, m)] * b[(n, m)]).sum::<f64>();
        (0..a.nrows()).map(row).sum()
    }

    /// R_b · D · R_aᵀ over the given columns, decomposed. `worth[n]` is D's entry of column n.
    pub fn core(&self, worth: &[f64]) -> Result<Core> {
        let mut weighted = self.qr_b.thin_R().to_owned();
        for (n, w) in worth.iter().enumerate() {
            weighted.col_mut(n).iter_mut().for_each(|v| *v *= w);
        }
        let core = weighted * self.qr_a.thin_R().transpose();
        Ok(Core { svd: decomposed(&core)? })
    }

    /// The best approximation of the weighted sum with `rank` ranks, both factors of equal norm.
    pub fn truncated(&self, worth: &[f64], rank: usize) -> Result<Product> {
        let svd = self.core(worth)?.svd;
        let rank = rank.min(svd.S().column_vector().nrows());
        let (mut left, mut right) =
            (svd.U().subcols(0, rank).to_owned(), svd.V().subcols(0, rank).to_owned());
        for (n, s) in svd.S().column_vector().iter().take(rank).enumerate() {
            let root = s.sqrt();
            left.col_mut(n).iter_mut().for_each(|v| *v *= root);
            right.col_mut(n).iter_mut().for_each(|v| *v *= root);
        }
        Ok(Product { a: self.qr_a.compute_thin_Q() * right, b: self.qr_b.compute_thin_Q() * left })
    }

    /// The part's columns of D; the others are worth nothing.
    pub fn worth(&self, coefficients: &[f64]) -> Vec<f64> {
        let mut worth = vec![0.0; self.ranks()];
        for (columns, c) in self.columns.iter().zip(coefficients) {
            worth[columns.clone()].fill(*c);
        }
        worth
    }

    /// Left and right singular vectors of one part's product in the basis of Q_b and Q_a, with its
    /// singular values: ((M, r), (M, r), r).
    pub fn directions(&self, part: usize) -> Result<(Mat<f64>, Mat<f64>, Vec<f64>)> {
        let columns = self.columns[part].clone();
        let pick = |r: faer::MatRef<'_, f64>| r.subcols(columns.start, columns.len()).to_owned();
        let (left, right) = (pick(self.qr_b.thin_R()), pick(self.qr_a.thin_R()));
        let (left, right) = (left.qr(), right.qr());
        let svd = decomposed(&(left.thin_R() * right.thin_R().transpose()))?;
        let values = svd.S().column_vector().iter().copied().collect();
        Ok((left.compute_thin_Q() * svd.U(), right.compute_thin_Q() * svd.V(), values))
    }
}

/// B·Aᵀ in factors: a is `[I, R]`, b is `[O, R]`.
pub struct Product {
    pub a: Mat<f64>,
    pub b: Mat<f64>,
}

impl Product {
    pub fn of(factors: &ModuleFactors) -> Self {
        let FactorDims { rank, inputs, outputs } = factors.dims;
        let scale = f64::from(factors.scale);
        let a = |i: usize, r: usize| f64::from(factors.a[r * inputs + i]);
        let b = |o: usize, r: usize| scale * f64::from(factors.b[o * rank + r]);
        Self { a: Mat::from_fn(inputs, rank, a), b: Mat::from_fn(outputs, rank, b) }
    }

    /// Rounded to f32, scale 1.
    pub fn rounded(&self) -> ModuleFactors {
        let (inputs, outputs, rank) = (self.a.nrows(), self.b.nrows(), self.a.ncols());
        let mut a = Vec::with_capacity(inputs * rank);
        for r in 0..rank {
            a.extend(self.a.col_as_slice(r).iter().map(|v| *v as f32));
        }
        let mut b = vec![0.0; outputs * rank];
        for r in 0..rank {
            for (o, v) in self.b.col_as_slice(r).iter().enumerate() {
                b[o * rank + r] = *v as f32;
            }
        }
        ModuleFactors { dims: FactorDims { rank, inputs, outputs }, a, b, scale: 1.0 }
    }

    /// Singular values, largest first.
    pub fn values(&self) -> Result<Vec<f64>> {
        let (left, right) = (self.b.qr(), self.a.qr());
        let svd = decomposed(&(left.thin_R() * right.thin_R().transpose()))?;
        Ok(svd.S().column_vector().iter().copied().collect())
    }

    /// The best rank-`rank` approximation of a matrix `[O, I]`: its projection on the leading
    /// singular vectors of its smaller side. Nothing is divided by a small value.
    pub fn nearest(matrix: MatRef<'_, f64>, rank: usize) -> Result<Self> {
        if matrix.nrows() > matrix.ncols() {
            let Self { a, b } = Self::nearest(matrix.transpose(), rank)?;
            return Ok(Self { a: b, b: a });
        }
        let mut b = leading(matrix, rank)?;
        let mut a = matrix.transpose() * &b;
        for r in 0..rank {
            let root = a.col(r).norm_l2().sqrt();
            if root > 0.0 {
                b.col_mut(r).iter_mut().for_each(|v| *v *= root);
                a.col_mut(r).iter_mut().for_each(|v| *v /= root);
            }
        }
        Ok(Self { a, b })
    }
}

fn decomposed(matrix: &Mat<f64>) -> Result<Svd<f64>> {
    matrix.thin_svd().map_err(|e| failed(&e))
}
