//! LoRA-LEGO: what its clusters are, and what its report says of them.

use crate::merge::sources::*;
use polylora::adapters::format::factors::{FactorDims, ModuleFactors};
use polylora::merge::spec::{Method, OutputScale, Units};
use polylora::shape::Projection;
use support::adapters::Noise;

#[test]
fn an_adapter_and_its_twin_become_one() {
    let noise = &mut Noise(20);
    let one = adapter(7, noise);
    // The twin is the same change: other signs, other balance.
    let mut twin = one.clone();
    for f in twin.values_mut() {
        f.a.iter_mut().for_each(|v| *v *= -2.0);
        f.b.iter_mut().for_each(|v| *v /= -2.0);
    }
    let adapters = [one, twin];
    let order = spec(Method::Lego, &[1.0, 1.0]);
    let merged = merged(&order, &adapters);
    assert_exact(&merged, &adapters, &[1.0, 1.0], 1e-5);
    for site in &merged.report.sites {
        let lego = site.lego.as_ref().expect("lego");
        assert!(lego.clusters.iter().all(|c| c.size == 2 && c.origins == [1, 1]));
        assert!(lego.inertia_relative < 1e-9 && (lego.output_scale - 2.0).abs() < 1e-6);
    }
}

#[test]
fn the_report_counts_every_unit_once() {
    let noise = &mut Noise(21);
    let adapters = [adapter(6, noise), adapter(9, noise), adapter(3, noise)];
    for units in [Units::Raw, Units::Canonical] {
        let mut order = spec(Method::Lego, &[0.5, -1.0, 2.0]);
        (order.options.rank, order.options.units) = (Some(5), units);
        for site in merged(&order, &adapters).report.sites {
            let lego = site.lego.expect("lego");
            assert_eq!(lego.clusters.len(), 5);
            assert_eq!(lego.clusters.iter().map(|c| c.size).sum::<usize>(), 18);
            let of = |s: usize| lego.clusters.iter().map(|c| c.origins[s]).sum::<usize>();
            assert_eq!([of(0), of(1), of(2)], [6, 9, 3]);
            let sum: f64 = lego.clusters.iter().map(|c| c.inertia).sum();
            assert!((sum - lego.inertia).abs() <= 1e-9 * lego.inertia, "{sum} {}", lego.inertia);
            assert!(lego.inertia_relative > 0.0 && lego.inertia_relative < 1.0);
        }
    }
}

/// Three bundles of four units that point almost the same way, in files of any order.
fn bundles(noise: &mut Noise) -> (ModuleFactors, Vec<ModuleFactors>) {
    let centre = ModuleFactors { scale: 1.0, ..factors(3, 40, 24, noise) };
    let near = |noise: &mut Noise| {
        let mut f = centre.clone();
        let jitter = noise.floats(f.a.len() + f.b.len(), 0.02);
        f.a.iter_mut().chain(&mut f.b).zip(jitter).for_each(|(v, j)| *v += j);
        f
    };
    let all = (0..4).map(|_| near(noise)).collect();
    (centre, all)
}

#[test]
fn units_that_point_the_same_way_end_in_one_cluster() {
    let noise = &mut Noise(22);
    let (_, bundle) = bundles(noise);
    let v = place(0, Projection::V);
    let adapters: Vec<Adapter> = bundle.iter().map(|f| Adapter::from([(v, f.clone())])).collect();
    let weights = [0.25; 4];
    let mut order = spec(Method::Lego, &weights);
    order.options.rank = Some(3);
    let merged = merged(&order, &adapters);
    let lego = merged.report.sites[0].lego.as_ref().expect("lego");
    assert!(lego.clusters.iter().all(|c| c.origins == [1, 1, 1, 1]), "{lego:?}");
    assert!(merged.report.overall.relative_error < 0.05);
}

/// `k` units of the same centroid, whatever the reweighting, differ by a factor that is known.
#[test]
fn each_reweighting_does_what_it_says() {
    let noise = &mut Noise(23);
    let v = place(0, Projection::V);
    // Two orthogonal units in one cluster: the centroid is 1/√2 as long.
    let unit = |axis: usize| {
        let one = |n: usize| (0..n).map(|i| f32::from(i == axis)).collect::<Vec<f32>>();
        let dims = FactorDims { rank: 1, inputs: 40, outputs: 24 };
        ModuleFactors { dims, a: one(40), b: one(24), scale: 1.0 }
    };
    let adapters = [Adapter::from([(v, unit(0))]), Adapter::from([(v, unit(1))])];
    let norm = |norms: bool, output: OutputScale| {
        let mut order = spec(Method::Lego, &[1.0, 1.0]);
        order.options.rank = Some(1);
        (order.options.centroid_norms, order.options.output) = (norms, output);
        merged(&order, &adapters).report.sites[0].norm
    };
    let near = |x: f64, y: f64| assert!((x - y).abs() < 1e-6, "{x} not {y}");
    near(norm(false, OutputScale::One), 0.5); // (1/√2)² of a unit product
    near(norm(true, OutputScale::One), 1.0);
    near(norm(true, OutputScale::Paper), 1.0); // √(1/1)
    near(norm(true, OutputScale::Fit), 1.0); // ⟨M,T⟩ = ⟨M,M⟩ = 1
    near(norm(false, OutputScale::Fit), 1.0);

    // One source of rank 8 cut to 2: √(8/2) on top.
    let adapters = [Adapter::from([(v, factors(8, 40, 24, noise))])];
    let norm = |output: OutputScale| {
        let mut order = spec(Method::Lego, &[1.0]);
        (order.options.rank, order.options.output) = (Some(2), output);
        merged(&order, &adapters).report.sites[0].norm
    };
    near(norm(OutputScale::Paper) / norm(OutputScale::One), 2.0);
}

#[test]
fn fitting_never_lies_farther_from_the_sum() {
    for seed in 0..8 {
        let noise = &mut Noise(30 + seed);
        let adapters = [adapter(8, noise), adapter(8, noise), adapter(8, noise)];
        let error = |output: OutputScale| {
            let mut order = spec(Method::Lego, &[0.5, 0.3, 0.2]);
            order.options.output = output;
            merged(&order, &adapters).report.overall.relative_error
        };
        let fit = error(OutputScale::Fit);
        assert!(fit <= error(OutputScale::Paper) + 1e-9 && fit <= error(OutputScale::One) + 1e-9);
        assert!(fit < 1.0, "{fit}");
    }
}

#[test]
fn another_seed_may_cluster_otherwise_and_more_restarts_never_worse() {
    let noise = &mut Noise(40);
    let adapters = [adapter(16, noise), adapter(16, noise)];
    let inertia = |seed: u64, restarts: usize| {
        let mut order = spec(Method::Lego, &[1.0, 1.0]);
        (order.seed, order.options.restarts, order.options.rank) = (seed, restarts, Some(6));
        let report = merged(&order, &adapters).report;
        report.sites.iter().map(|s| s.lego.as_ref().expect("lego").inertia).sum::<f64>()
    };
    let singles: Vec<f64> = (0..4).map(|seed| inertia(seed, 1)).collect();
    assert!(singles.iter().any(|i| *i != singles[0]), "seeds decide starts: {singles:?}");
    assert!(inertia(0, 20) <= singles[0] + 1e-9);
}
