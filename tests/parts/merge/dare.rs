//! DARE: seeded, and right in the mean.

use crate::merge::sources::*;
use faer::Mat;
use polylora::merge::spec::Method;
use polylora::shape::Projection;
use support::adapters::Noise;

const SEEDS: u64 = 1000;

/// Projections of the merged change on a few fixed directions, for each of many seeds.
fn sampled(
    method: Method,
    adapters: &[Adapter],
    weights: &[f64],
    probes: &[Mat<f64>],
) -> Vec<Vec<f64>> {
    let q = place(0, Projection::V);
    let mut out = vec![Vec::new(); probes.len()];
    for seed in 0..SEEDS {
        let mut order = spec(method, weights);
        order.seed = seed;
        (order.options.density, order.options.rank) = (0.6, method.takes_rank().then_some(24));
        let change = product(&merged(&order, adapters).modules[&q]);
        for (values, probe) in out.iter_mut().zip(probes) {
            values.push(dot(&change, probe));
        }
    }
    out
}

fn dot(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    (0..x.ncols()).map(|c| x.col(c).transpose() * y.col(c)).sum()
}

#[test]
fn dare_is_unbiased_over_a_thousand_seeds() {
    let noise = &mut Noise(50);
    let v = place(0, Projection::V);
    let weights = [0.7, -0.5];
    // Ranks that sum to the outputs, so that the truncation of the _svd form keeps everything.
    let adapters = [12, 12].map(|rank| Adapter::from([(v, factors(rank, 40, 24, noise))]));
    let probe = |noise: &mut Noise| {
        let values = noise.floats(24 * 40, 1.0);
        Mat::from_fn(24, 40, |o, i| f64::from(values[o * 40 + i]))
    };
    let probes: Vec<Mat<f64>> = (0..4).map(|_| probe(noise)).collect();
    for (method, of) in [(Method::DareLinear, Method::Linear), (Method::DareLinearSvd, Method::Cat)]
    {
        let truth = product(&merged(&spec(of, &weights), &adapters).modules[&v]);
        for (values, probe) in sampled(method, &adapters, &weights, &probes).iter().zip(&probes) {
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let errors = (mean - dot(&truth, probe)) / (variance / n).sqrt();
            assert!(errors.abs() <= 3.0, "{method:?} is {errors} standard errors off");
            assert!(variance > 0.0);
        }
    }
}

#[test]
fn the_same_seed_drops_the_same_entries() {
    let noise = &mut Noise(51);
    let adapters = [adapter(4, noise), adapter(4, noise)];
    for method in [Method::DareLinear, Method::DareTies, Method::DareTiesSvd] {
        let order = |seed: u64| {
            let mut order = spec(method, &[1.0, 1.0]);
            order.seed = seed;
            order
        };
        let one = merged(&order(1), &adapters);
        assert_eq!(one.modules, merged(&order(1), &adapters).modules);
        assert_ne!(one.modules, merged(&order(2), &adapters).modules);
    }
}
