//! The truncation of products made in full, on matrices too large to be decomposed whole, against
//! whole decompositions of matrices whose singular values are planted.

use crate::merge::sources::{Adapter, merged, merged_in_steps, place, spec};
use faer::{Mat, MatRef};
use polylora::adapters::format::factors::{FactorDims, ModuleFactors};
use polylora::merge::spec::{Method, Spec};
use polylora::shape::Projection;
use support::adapters::Noise;

/// More outputs and inputs than are decomposed whole at the ranks below.
const SIZE: (usize, usize) = (544, 576);

fn orthonormal(rows: usize, columns: usize, noise: &mut Noise) -> Mat<f64> {
    Mat::from_fn(rows, columns, |_, _| f64::from(noise.float()) - 0.5).qr().compute_thin_Q()
}

/// One source: U·diag(values) is B, Vᵀ is A.
fn planted((outputs, inputs): (usize, usize), values: &[f64], seed: u64) -> ModuleFactors {
    let (rank, noise) = (values.len(), &mut Noise(seed));
    let (u, v) = (orthonormal(outputs, rank, noise), orthonormal(inputs, rank, noise));
    let mut b = Vec::with_capacity(outputs * rank);
    for o in 0..outputs {
        b.extend(values.iter().enumerate().map(|(r, s)| (u[(o, r)] * s) as f32));
    }
    let a = (0..rank).flat_map(|r| v.col_as_slice(r).iter().map(|x| *x as f32)).collect();
    ModuleFactors { dims: FactorDims { rank, inputs, outputs }, a, b, scale: 1.0 }
}

fn product(f: &ModuleFactors) -> Mat<f64> {
    let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let (a, b, d) = (wide(&f.a), wide(&f.b), f.dims);
    MatRef::from_row_major_slice(&b, d.outputs, d.rank)
        * MatRef::from_row_major_slice(&a, d.rank, d.inputs)
}

/// Keeps every entry, so the product itself is truncated.
fn order(rank: usize) -> Spec {
    let mut order = spec(Method::MagnitudePruneSvd, &[1.0]);
    (order.options.density, order.options.rank) = (1.0, Some(rank));
    order
}

/// Truncates a planted matrix and compares the error with the best there is; where there is a gap
/// after `rank` values, also the result with the best.
fn check(name: &str, size: (usize, usize), values: &[f64], rank: usize) {
    let source = planted(size, values, 17);
    let q = place(0, Projection::Q);
    let ours = merged(&order(rank), &[Adapter::from([(q, source.clone())])]);
    let (ours, matrix) = (product(&ours.modules[&q]), product(&source));
    let svd = matrix.thin_svd().expect("a decomposition");
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let rank = rank.min(s.nrows());
    let best =
        u.subcols(0, rank) * s.subrows(0, rank).as_diagonal() * v.subcols(0, rank).transpose();
    let norm = matrix.norm_l2().max(f64::MIN_POSITIVE);
    let (least, error) = ((&matrix - &best).norm_l2(), (&matrix - &ours).norm_l2());
    // What f32 takes from the product and from the factors stays even where nothing else is lost.
    let most = (least * (1.0 + 1e-6)).hypot(1e-6 * norm);
    assert!(error <= most, "{name}: {error:e}, not {least:e}, of {norm:e}");
    let after = if rank < s.nrows() { s[rank] } else { 0.0 };
    if s[rank - 1] - after > 0.01 * s[rank - 1] {
        let apart = (&ours - &best).norm_l2() / norm;
        assert!(apart < 1e-5, "{name}: {apart:e}");
    }
}

#[test]
fn large_products_are_truncated_as_well_as_by_a_whole_decomposition() {
    let all = |of: &dyn Fn(f64) -> f64| (0..SIZE.0).map(|i| of(i as f64)).collect::<Vec<_>>();
    let steps = |many: usize, high: f64| {
        let mut values = vec![1.0; SIZE.0];
        values[..many].fill(high);
        values
    };
    check("fast decay", SIZE, &all(&|i| 0.7f64.powf(i)), 16);
    check("fast decay, few", SIZE, &all(&|i| 0.7f64.powf(i)), 1);
    check("slow decay", SIZE, &all(&|i| (1.0 + i).powf(-0.5)), 8);
    check("tall", (SIZE.1, SIZE.0), &all(&|i| (1.0 + i).powf(-0.5)), 8);
    check("noise", SIZE, &all(&|i| 2.0 - i / 544.0), 16);
    check("flat", SIZE, &steps(0, 1.0), 16);
    check("a step where it is cut", SIZE, &steps(16, 3.0), 16);
    check("a small step", SIZE, &steps(16, 1.02), 16);
    check("one value more often than a block is wide", SIZE, &steps(60, 3.0), 16);
    check("signal below the cut", SIZE, &steps(100, 5.0), 16);
    check("of the rank asked for", SIZE, &[4.0, 3.0, 3.0, 2.0, 1.0], 5);
    check("of a lower rank", SIZE, &[4.0, 3.0, 3.0, 2.0, 1.0], 16);
    check("of a lower rank, hardly", SIZE, &all(&|i| if i < 15.0 { 1.0 } else { 1e-9 }), 16);
    check("of half rank", SIZE, &all(&|i| 1.0 + i)[..272], 16);
    check("nothing", SIZE, &[0.0, 0.0], 4);
    check("one column", (600, 1), &[2.0], 4);
    check("one row", (1, 600), &[2.0], 4);
}

#[test]
fn the_truncation_of_large_products_is_the_same_on_every_thread() {
    let values: Vec<f64> = (0..40).map(|i| 1.0 + f64::from(i)).collect();
    let sites = [Projection::Q, Projection::O, Projection::Gate];
    let at = |(i, p): (usize, Projection)| (place(0, p), planted(SIZE, &values, i as u64));
    let adapter: Adapter = sites.into_iter().enumerate().map(at).collect();
    let run = |sites: usize| {
        let merged = merged_in_steps(&order(8), std::slice::from_ref(&adapter), sites);
        merged.expect("merged").modules
    };
    let one_by_one = run(1);
    assert_eq!(one_by_one, run(3));
    assert_eq!(one_by_one, run(2));
}
