//! The leading left singular vectors of a dense matrix, small or large.
//!
//! Owns both ways to them: a whole eigendecomposition of M·Mᵀ where that is cheap, else block
//! Lanczos on it (Golub & Underwood, 1977; from a random block as in Musco & Musco, arXiv
//! 1504.05477, whose bound needs no gap between singular values). Never forms M·Mᵀ in the second
//! way: M is multiplied with a few vectors at a time. The thing to know: the start is the same for
//! every matrix and faer computes on the caller's thread, so the same matrix gives the same bits.

use crate::error::{Error, Result};
use crate::random::Stream;
use faer::linalg::solvers::Qr;
use faer::{Mat, MatRef, Side};

/// Vectors more than asked for in a block: they take the slow directions at the cut.
const SPARE: usize = 8;
/// Fewer vectors in a product cost as much, since all of M must come from memory.
const BLOCK_MIN: usize = 32;
/// A matrix of no more rows than so many blocks is decomposed whole. A spectrum of noise needs
/// about thirty blocks, one with a signal in it about ten.
const BLOCKS: usize = 16;
/// ‖M·Mᵀ·U − U·Λ‖ at the end, as a share of the smallest value of Λ. A gap of 1 % of that leaves
/// U right within 1e-4; without any, no value of Λ is short of the best by more than that share.
/// Values under this share of the largest count as that much, else rounding would have to settle.
const RESIDUAL: f64 = 1e-6;
/// What is left of a vector, as a share of the largest, when it brings nothing but rounding.
const NOTHING: f64 = 1e-13;

/// Orthonormal `[O, rank]`: what M·Mᵀ has of largest eigenvalue, in rising order. M has no more
/// rows than columns and at least `rank`.
pub fn leading(matrix: MatRef<'_, f64>, rank: usize) -> Result<Mat<f64>> {
    let block = (rank + SPARE).max(BLOCK_MIN);
    if matrix.nrows() <= BLOCKS * block {
        let gram = matrix * matrix.transpose();
        let (_, vectors) = largest(&gram, rank)?;
        return Ok(vectors);
    }
    lanczos(matrix, rank, block)
}

/// Eigenvalues and vectors of a symmetric matrix, the `count` largest in rising order.
fn largest(matrix: &Mat<f64>, count: usize) -> Result<(Vec<f64>, Mat<f64>)> {
    let eigen = matrix.self_adjoint_eigen(Side::Upper).map_err(|e| failed(&e))?;
    let first = matrix.nrows() - count;
    let values = eigen.S().column_vector().iter().skip(first).copied().collect();
    Ok((values, eigen.U().subcols(first, count).to_owned()))
}

/// Grows an orthonormal basis Q by what M·Mᵀ makes of its last block, until the leading
/// eigenvectors of T = Qᵀ·M·Mᵀ·Q are as good as M·Mᵀ's own. At the latest Q spans everything.
fn lanczos(matrix: MatRef<'_, f64>, rank: usize, block: usize) -> Result<Mat<f64>> {
    let n = matrix.nrows();
    let mut q = orthonormal(&start(n, block));
    let (mut t, mut last, mut longest, mut check) = (Mat::<f64>::zeros(0, 0), block, 0.0f64, 0);
    loop {
        let width = q.ncols();
        let mut new = matrix * (matrix.transpose() * q.subcols(width - last, last));
        longest = new.col_iter().map(|c| c.norm_l2()).fold(longest, f64::max);
        let seen = taken(&q, &mut new);
        // Only the upper triangle of T is filled, and read.
        t.resize_with(width, width, |i, j| {
            if j < width - last { 0.0 } else { seen[(i, j + last - width)] }
        });
        let mut next = independent(&new, NOTHING * longest);
        let ends = next.ncols() == 0 || width + next.ncols() > n;
        if ends || width >= check {
            let (values, vectors) = largest(&t, rank)?;
            let missing = (new * vectors.subrows(width - last, last)).norm_l2();
            let floor = RESIDUAL * values[rank - 1];
            if ends || missing <= RESIDUAL * values[0].max(floor) {
                return Ok(q * vectors);
            }
            check = width + width / 4;
        }
        // Of a vector that was nearly taken whole, what is left leans towards the basis again.
        taken(&q, &mut next);
        let next = orthonormal(&next);
        last = next.ncols();
        q.resize_with(n, width + last, |i, j| next[(i, j - width)]);
    }
}

/// Takes off `vectors` what the basis has of them, and says how much that was.
fn taken(basis: &Mat<f64>, vectors: &mut Mat<f64>) -> Mat<f64> {
    let seen = basis.transpose() * &*vectors;
    *vectors -= basis * &seen;
    seen
}

fn start(rows: usize, columns: usize) -> Mat<f64> {
    let mut stream = Stream::new(&[]);
    Mat::from_fn(rows, columns, |_, _| stream.unit() - 0.5)
}

fn orthonormal(vectors: &Mat<f64>) -> Mat<f64> {
    Qr::new(vectors.as_ref()).compute_thin_Q()
}

/// An orthonormal basis of the vectors, without directions in which they are shorter than `least`.
fn independent(vectors: &Mat<f64>, least: f64) -> Mat<f64> {
    let qr = vectors.col_piv_qr();
    let r = qr.thin_R();
    let kept = (0..r.nrows()).take_while(|i| r[(*i, *i)].abs() > least).count();
    qr.compute_thin_Q().subcols(0, kept).to_owned()
}

/// A decomposition that did not come to an end.
pub fn failed(why: &dyn std::fmt::Debug) -> Error {
    Error::fault(format!("a singular value decomposition: {why:?}"))
}
