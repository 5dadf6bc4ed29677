//! What must hold for every method, tried on random adapters: mixed ranks 1 to 64, missing modules,
//! scales of rsLoRA, negative weights.

use crate::merge::sources::*;
use polylora::adapters::format::factors::ModuleFactors;
use polylora::merge::spec::{Method, OutputScale, Units};
use polylora::merge::{Merged, picture};
use polylora::shape::Projection;
use support::adapters::Noise;

const ROUNDS: u64 = 12;

#[test]
fn one_adapter_at_its_own_rank_is_itself() {
    for seed in 0..ROUNDS {
        let adapters = [adapter(1 + seed as usize * 3, &mut Noise(seed))];
        for method in [Method::Cat, Method::Svd, Method::Linear, Method::Lego, Method::Family] {
            assert_exact(&merged(&spec(method, &[1.0]), &adapters), &adapters, &[1.0], 1e-5);
        }
        for output in [OutputScale::Fit, OutputScale::Paper, OutputScale::One] {
            for units in [Units::Raw, Units::Canonical] {
                let mut order = spec(Method::Lego, &[-1.5]);
                (order.options.output, order.options.units) = (output, units);
                assert_exact(&merged(&order, &adapters), &adapters, &[-1.5], 1e-5);
            }
        }
    }
}

#[test]
fn two_adapters_at_the_sum_of_their_ranks_are_their_sum() {
    for seed in 0..ROUNDS {
        let noise = &mut Noise(100 + seed);
        let adapters = [adapter(0, noise), adapter(0, noise)];
        let weights = [noise.float().into(), f64::from(noise.float()) - 0.5];
        for method in [Method::Cat, Method::Svd, Method::Lego] {
            let mut order = spec(method, &weights);
            order.options.rank = method.takes_rank().then_some(128);
            let merged = merged(&order, &adapters);
            assert_exact(&merged, &adapters, &weights, 1e-5);
            assert!(merged.report.overall.relative_error < 1e-5);
        }
    }
}

/// The same adapter with its ranks in another order, units rescaled and signs flipped.
fn disguised(f: &ModuleFactors, rescale: bool, noise: &mut Noise) -> ModuleFactors {
    let d = f.dims;
    let mut order: Vec<usize> = (0..d.rank).collect();
    for i in (1..d.rank).rev() {
        order.swap(i, noise.below(i + 1));
    }
    let mut out = ModuleFactors { a: Vec::new(), b: f.b.clone(), ..f.clone() };
    for (to, from) in order.into_iter().enumerate() {
        let sign = if noise.below(2) == 0 { 1.0 } else { -1.0 };
        let c = if rescale { sign * (2.0 * noise.float()).exp() } else { 1.0 };
        out.a.extend(f.a[from * d.inputs..(from + 1) * d.inputs].iter().map(|v| v * c));
        for o in 0..d.outputs {
            out.b[o * d.rank + to] = f.b[o * d.rank + from] / c;
        }
    }
    out
}

fn disguised_all(adapters: &[Adapter], rescale: bool, noise: &mut Noise) -> Vec<Adapter> {
    let one = |a: &Adapter, noise: &mut Noise| {
        a.iter().map(|(p, f)| (*p, disguised(f, rescale, noise))).collect()
    };
    adapters.iter().map(|a| one(a, noise)).collect()
}

const RANK_BLIND: [Method; 6] = [
    Method::Svd,
    Method::Lego,
    Method::TiesSvd,
    Method::MagnitudePruneSvd,
    Method::Breadcrumbs,
    Method::Cat,
];

#[test]
fn the_order_of_ranks_changes_nothing() {
    for seed in 0..4 {
        let noise = &mut Noise(200 + seed);
        let adapters = [adapter(6, noise), adapter(9, noise), adapter(4, noise)];
        let shuffled = disguised_all(&adapters, false, noise);
        for method in RANK_BLIND {
            for units in [Units::Raw, Units::Canonical] {
                let mut order = spec(method, &[0.5, 1.0, -0.7]);
                order.options.units = units;
                // Entries near a threshold may fall on either side of it.
                assert_same(&merged(&order, &adapters), &merged(&order, &shuffled), 1e-4);
            }
        }
    }
}

#[test]
fn rescaled_units_and_flipped_signs_change_nothing_but_raw_lego() {
    for seed in 0..4 {
        let noise = &mut Noise(300 + seed);
        let adapters = [adapter(6, noise), adapter(9, noise), adapter(4, noise)];
        let rescaled = disguised_all(&adapters, true, noise);
        for method in RANK_BLIND {
            let order = spec(method, &[0.5, 1.0, -0.7]);
            assert_same(&merged(&order, &adapters), &merged(&order, &rescaled), 1e-4);
        }
        let mut raw = spec(Method::Lego, &[0.5, 1.0, -0.7]);
        raw.options.units = Units::Raw;
        let (x, y) = (merged(&raw, &adapters), merged(&raw, &rescaled));
        let q = place(0, Projection::Q);
        assert!(apart(&product(&x.modules[&q]), &product(&y.modules[&q])) > 1e-2);
    }
}

#[test]
fn the_order_of_sources_changes_nothing() {
    let reversed = |m: &Merged, adapters: &[Adapter]| -> Merged {
        let mut order = m.report.spec.clone();
        order.sources.reverse();
        let adapters: Vec<Adapter> = adapters.iter().rev().cloned().collect();
        merged(&order, &adapters)
    };
    for seed in 0..3 {
        let noise = &mut Noise(400 + seed);
        let adapters = [adapter(5, noise), adapter(5, noise)];
        for method in Method::ALL.into_iter().filter(|m| *m != Method::Family) {
            let merged = merged(&spec(method, &[0.3, 0.7]), &adapters);
            assert_same(&merged, &reversed(&merged, &adapters), 1e-5);
        }
    }
}

#[test]
fn the_error_of_svd_is_the_tail_of_singular_values() {
    for seed in 0..ROUNDS {
        let noise = &mut Noise(500 + seed);
        let adapters = [adapter(0, noise), adapter(0, noise)];
        let weights = [1.0, -0.6];
        let mut order = spec(Method::Svd, &weights);
        order.options.rank = Some(1 + noise.below(12));
        let merged = merged(&order, &adapters);
        for (site, (place, f)) in merged.report.sites.iter().zip(&merged.modules) {
            let values = exact(*place, &adapters, &weights).singular_values().expect("values");
            let norm = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
            let tail = norm(&values[f.dims.rank..]) / norm(&values);
            assert!((site.relative_error - tail).abs() < 1e-6, "{site:?}: {tail}");
        }
    }
}

#[test]
fn the_reported_numbers_are_those_of_full_matrices() {
    for seed in 0..4 {
        let noise = &mut Noise(600 + seed);
        let adapters = [adapter(5, noise), adapter(5, noise)];
        let weights = [0.3, 0.7];
        for method in Method::ALL.into_iter().filter(|m| *m != Method::Family) {
            let merged = merged(&spec(method, &weights), &adapters);
            let (mut errors, mut squares) = (0.0, 0.0);
            for (site, (place, f)) in merged.report.sites.iter().zip(&merged.modules) {
                let (ours, truth) = (product(f), exact(*place, &adapters, &weights));
                let error = apart(&ours, &truth);
                let near = |x: f64, y: f64| (x - y).abs() <= 1e-6 * (1.0 + y);
                assert!(near(site.relative_error, error), "{method:?} {site:?}: {error}");
                assert!(
                    near(site.norm, ours.norm_l2())
                        && near(site.survey.norm_exact, truth.norm_l2())
                );
                for (i, a) in adapters.iter().enumerate() {
                    assert!(near(site.survey.source_norms[i], product(&a[place]).norm_l2()));
                }
                errors += (ours - &truth).squared_norm_l2();
                squares += truth.squared_norm_l2();
            }
            let overall = (errors / squares).sqrt();
            assert!((merged.report.overall.relative_error - overall).abs() < 1e-6);
        }
    }
}

#[test]
fn equal_sources_align_fully_and_disjoint_ones_not_at_all() {
    let noise = &mut Noise(7);
    let one = adapter(4, noise);
    let report = merged(&spec(Method::Svd, &[1.0, 1.0]), &[one.clone(), one.clone()]).report;
    let near = |x: Option<f64>, y: f64| (x.expect("two sources") - y).abs() < 1e-9;
    assert!(near(report.overall.alignment, 1.0) && near(report.overall.cosine, 1.0));
    assert!((report.overall.effective_rank - report.sites[0].effective_rank).abs() < 1.0);

    // The first reads and writes the first half of everything, the second the second half.
    let half = |f: &ModuleFactors, second: bool| {
        let mut f = f.clone();
        let d = f.dims;
        let other = |i: usize, n: usize| (i < n / 2) == second;
        f.a.iter_mut().enumerate().filter(|(i, _)| other(i % d.inputs, d.inputs)).for_each(zero);
        f.b.iter_mut().enumerate().filter(|(i, _)| other(i / d.rank, d.outputs)).for_each(zero);
        f
    };
    let side =
        |second: bool| -> Adapter { one.iter().map(|(p, f)| (*p, half(f, second))).collect() };
    let report = merged(&spec(Method::Svd, &[1.0, 1.0]), &[side(false), side(true)]).report;
    assert!(near(report.overall.alignment, 0.0) && near(report.overall.cosine, 0.0));
}

fn zero((_, v): (usize, &mut f32)) {
    *v = 0.0;
}

#[test]
fn slerp_keeps_the_norm_between_orthogonal_adapters() {
    let noise = &mut Noise(8);
    let q = place(0, Projection::Q);
    let (mut x, mut y) = (factors(1, 40, 40, noise), factors(1, 40, 40, noise));
    (x.scale, y.scale) = (1.0, 1.0);
    for i in 0..40 {
        let zeroed = if i < 20 { &mut x.a[i] } else { &mut y.a[i] };
        *zeroed = 0.0;
    }
    let (nx, ny) = (product(&x).norm_l2(), product(&y).norm_l2());
    x.a.iter_mut().for_each(|v| *v /= nx as f32);
    y.a.iter_mut().for_each(|v| *v /= ny as f32);
    let adapters = [Adapter::from([(q, x)]), Adapter::from([(q, y)])];
    let mut order = spec(Method::Slerp, &[0.25, 0.75]);
    order.options.rank = Some(2);
    let merged = merged(&order, &adapters);
    let angle = std::f64::consts::FRAC_PI_2;
    let weights = [(0.25 * angle).sin(), (0.75 * angle).sin()];
    let error = apart(&product(&merged.modules[&q]), &exact(q, &adapters, &weights));
    assert!(error < 1e-5, "{error}");
    assert!((merged.report.sites[0].norm - 1.0).abs() < 1e-5);
}

#[test]
fn a_family_merges_exactly_at_its_own_rank() {
    let noise = &mut Noise(9);
    let first = adapter(6, noise);
    for shared_a in [true, false] {
        let mut adapters = vec![first.clone(), adapter(6, noise), adapter(6, noise)];
        for other in &mut adapters[1..] {
            for (place, f) in other.iter_mut() {
                let own = &first[place];
                if shared_a { f.a = own.a.clone() } else { f.b = own.b.clone() }
            }
        }
        let weights = [0.2, 0.5, -1.0];
        let merged = merged(&spec(Method::Family, &weights), &adapters);
        assert_exact(&merged, &adapters, &weights, 1e-6);
        assert!(merged.modules.values().all(|m| m.dims.rank == 6));
    }
}

#[test]
fn breadcrumbs_drops_both_ends() {
    let noise = &mut Noise(10);
    let q = place(0, Projection::Q);
    let adapters = [Adapter::from([(q, factors(3, 40, 40, noise))])];
    let mut order = spec(Method::Breadcrumbs, &[2.0]);
    (order.options.rank, order.options.density, order.options.outliers) = (Some(40), 0.3, 0.05);
    let crumbs = merged(&order, &adapters);
    let full = product(&adapters[0][&q]);
    let mut entries: Vec<f64> = (0..1600).map(|e| full[(e / 40, e % 40)].abs()).collect();
    entries.sort_by(|x, y| y.total_cmp(x));
    let (most, least) = (entries[80], entries[80 + 480 - 1]);
    let kept = |v: f64| if v.abs() <= most && v.abs() >= least { 2.0 * v } else { 0.0 };
    let masked = faer::Mat::from_fn(40, 40, |o, i| kept(full[(o, i)]));
    // 40 ranks hold every 40 × 40 matrix.
    let error = apart(&product(&crumbs.modules[&q]), &masked);
    assert!(error < 1e-5, "{error}");
    assert!(crumbs.report.sites[0].relative_error > 0.5);
}

#[test]
fn a_budget_of_ranks_is_spent_where_it_is_needed() {
    let noise = &mut Noise(11);
    let mut adapters = [adapter(12, noise), adapter(12, noise)];
    // One site that is really of rank 1.
    let q = place(1, Projection::Q);
    for a in &mut adapters {
        a.insert(q, factors(1, 40, 40, noise));
    }
    for method in [Method::Svd, Method::Lego] {
        let mut order = spec(method, &[1.0, 1.0]);
        (order.options.rank, order.options.spread) = (Some(6), true);
        let spread = merged(&order, &adapters);
        let ranks = spread.modules.values().map(|m| m.dims.rank);
        assert_eq!(ranks.clone().sum::<usize>(), 6 * spread.modules.len());
        assert!(spread.modules[&q].dims.rank <= 2 && ranks.max() > Some(6));
    }
}

#[test]
fn steps_and_threads_do_not_change_a_bit() {
    let noise = &mut Noise(12);
    let adapters = [adapter(5, noise), adapter(5, noise)];
    for method in [Method::Svd, Method::Lego, Method::DareTies, Method::DareLinearSvd] {
        let mut order = spec(method, &[0.4, 0.6]);
        order.seed = 3;
        let one = merged_in_steps(&order, &adapters, 1).expect("merged");
        for sites in [2, 4, 100] {
            let other = merged_in_steps(&order, &adapters, sites).expect("merged");
            assert_eq!(one.modules, other.modules);
            assert_eq!(one.report, other.report);
        }
    }
}

#[test]
fn the_picture_has_a_cell_for_each_site() {
    let noise = &mut Noise(13);
    let adapters = [adapter(3, noise), adapter(2, noise)];
    let mut order = spec(Method::Svd, &[1.0, 1.0]);
    order.sources[0].name = "<a & b>".into();
    let picture = picture::heat_map(&merged(&order, &adapters).report);
    assert_eq!(picture.matches("<title>").count(), 2 * 6);
    assert!(picture.contains("&lt;a &amp; b&gt;") && !picture.contains("<a & b>"));
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
}
