//! Norms, gates, embeddings and argmax against f64 loops.

use crate::common::{
    CPU, DTYPES, Rng, assert_bytes_in_step, assert_close, devices, plane, read_all, scratch, seen,
    vector,
};
use polylora_kernels::reference::{self, rms_norm, segment_of};
use polylora_kernels::{
    Act, AdapterMix, Device, Dtype, EmbedDelta, Gate, Linear, Matrix, NormWeight, Resident,
    Residents, Residual, Segments, WeightDtype, add_norm, add_norm_rows, argmax, embed, glu,
    linear,
};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// h + y, or h + norm(y) under `post`.
fn with_residual(h: &[f32], y: Option<&[f32]>, post: Option<&[f32]>) -> Vec<f64> {
    let Some(y) = y else { return wide(h) };
    let y = post.map_or(wide(y), |w| rms_norm(&wide(y), w, 1e-5));
    h.iter().zip(y).map(|(&h, y)| f64::from(h) + y).collect()
}

#[test]
fn add_norm_equals_the_f64_loop_with_and_without_residual_and_post_norm() {
    let mut rng = Rng(21);
    for dev in devices() {
        for (rows, width) in [(1, 576), (9, 33), (70, 100)] {
            let (mut w, own, post) = (rng.values(width), rng.values(width), rng.values(width));
            // Some groups have an outlier.
            w.iter_mut().step_by(40).for_each(|w| *w *= 10.0);
            let (h0, y) = (rng.values(rows * width), rng.values(rows * width));
            let end = rows.div_ceil(2) as u32;
            // It replaces the first norm and not the second.
            let mut residents = Residents::new(1);
            let norms = vec![Some(vector(&own))];
            let taken = residents.install(Resident { norms, ..Resident::default() });
            let mixes = &[AdapterMix::from(taken.map_err(|_| "full").expect("a slot"))];
            let segments = Segments { indptr: &[0, end], mixes, residents: &residents };
            let (base, base_post) = (vector(&w), vector(&post));
            let weight = NormWeight { base: &base, norm: 0 };
            let post_weight = NormWeight { base: &base_post, norm: 1 };
            let y_plane = plane(&y, width);
            for case in 0..3 {
                let residual = (case > 0)
                    .then_some(Residual { y: &y_plane, post: (case == 2).then_some(post_weight) });
                let sampled: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
                let mut out = Act::with_bytes(CPU, Dtype::Bf16, rows, width).expect("memory");
                let mut h = plane(&h0, width);
                add_norm_rows(&dev, &h, &sampled, residual, weight, 1e-5, segments, &mut out);
                let what = format!("{} case {case} of [{rows}, {width}]", dev.name());
                assert_bytes_in_step(&dev, &out, sampled.len(), &what);
                let picked: Vec<Vec<f32>> =
                    (0..sampled.len()).map(|i| out.row(i).to_vec()).collect();
                add_norm(&dev, &mut h, rows, residual, weight, 1e-5, segments, &mut out);
                assert_bytes_in_step(&dev, &out, rows, &what);
                let h = read_all(&dev, &mut h);
                for t in 0..rows {
                    let what = format!("{} case {case} row {t} of [{rows}, {width}]", dev.name());
                    let at = t * width..(t + 1) * width;
                    let y = residual.map(|_| &y[at.clone()]);
                    let sum =
                        with_residual(&h0[at.clone()], y, (case == 2).then_some(post.as_slice()));
                    assert_close(&h[at], &sum, 1e-5, &what);
                    let weight = if t < end as usize { &own } else { &w };
                    assert_close(out.row(t), &rms_norm(&sum, weight, 1e-5), 1e-5, &what);
                }
                for (i, &t) in sampled.iter().enumerate() {
                    assert_eq!(picked[i], out.row(t as usize), "{} row {t}", dev.name());
                }
            }
        }
    }
}

#[test]
fn gates_equal_the_f64_formulas_from_minus_100_to_100() {
    let mut rng = Rng(22);
    for dev in devices() {
        for gate in [Gate::Silu, Gate::GeluTanh] {
            for (rows, width) in [(1, 1), (3, 50), (40, 300)] {
                let g: Vec<f32> = (0..rows * width)
                    .map(|i| rng.value() * if i % 3 == 0 { 100.0 } else { 6.0 })
                    .collect();
                let u = rng.values(rows * width);
                let mut out = Act::with_bytes(CPU, Dtype::F32, rows, width).expect("memory");
                glu(&dev, gate, &plane(&g, width), &plane(&u, width), rows, &mut out);
                assert_bytes_in_step(&dev, &out, rows, &dev.name());
                for (i, (&g, &u)) in g.iter().zip(&u).enumerate() {
                    let want = reference::glu(gate, f64::from(g), f64::from(u));
                    let got = out.row(i / width)[i % width];
                    let what = format!("{} {gate:?}({g}) · {u}", dev.name());
                    assert_close(&[got], &[want], 1e-6 * (1.0 + want.abs()), &what);
                }
            }
        }
    }
}

#[test]
fn embed_looks_up_scales_and_adds_the_segments_delta() {
    let mut rng = Rng(23);
    for dev in devices() {
        for dtype in DTYPES {
            let (vocab, hidden, rank, rows) = (37, 45, 3, 20);
            let table = rng.stored(dtype, vocab * hidden);
            let (a, b) = (rng.stored(dtype, rank * vocab), rng.stored(dtype, hidden * rank));
            let delta = EmbedDelta::new(CPU, dtype, rank, vocab, hidden, &a, &b, 0.5);
            let (c, d) = (rng.stored(dtype, 2 * vocab), rng.stored(dtype, hidden * 2));
            let other = EmbedDelta::new(CPU, dtype, 2, vocab, hidden, &c, &d, 1.0);
            let matrix = Matrix::from_f32(CPU, dtype, vocab, hidden, &table).expect("memory");
            let mut residents = Residents::new(3);
            let slots = [delta, other].map(|delta| {
                let embedding = Some(delta.expect("memory"));
                let taken = residents.install(Resident { embedding, ..Resident::default() });
                taken.map_err(|_| "full").expect("a slot")
            });
            let neither = residents.install(Resident::default()).map_err(|_| "full");
            let tokens: Vec<u32> = (0..rows).map(|_| rng.below(vocab) as u32).collect();
            // The first has one, the second none, the third the weighted sum of two.
            let mixes = &[
                AdapterMix::from(slots[0]),
                AdapterMix::from(neither.expect("a slot")),
                AdapterMix::new(slots.into_iter().zip([-1.5, 0.7])),
            ];
            let segments = Segments { indptr: &[0, 6, 11, 17], mixes, residents: &residents };
            let mut h = plane(&vec![0.0; rows * hidden], hidden);
            embed(&dev, &matrix, &tokens, 3.0, segments, &mut h);
            let h = read_all(&dev, &mut h);
            for t in 0..rows {
                let token = tokens[t] as usize;
                let product = |a: &[f32], b: &[f32], i: usize, rank: usize| -> f64 {
                    let term = |r| f64::from(a[r * vocab + token]) * f64::from(b[i * rank + r]);
                    (0..rank).map(term).sum()
                };
                let value = |i: usize| {
                    let own = match segment_of(segments.indptr, t) {
                        Some(0) => 0.5 * product(&a, &b, i, rank),
                        Some(2) => {
                            -1.5 * 0.5 * product(&a, &b, i, rank) + 0.7 * product(&c, &d, i, 2)
                        }
                        _ => 0.0,
                    };
                    3.0 * f64::from(table[token * hidden + i]) + own
                };
                let want: Vec<f64> = (0..hidden).map(value).collect();
                assert_close(&h[t * hidden..][..hidden], &want, 1e-5, &dev.name());
            }
        }
    }
}

#[test]
fn an_act_keeps_its_bf16_copy_in_step() {
    // Through a bf16 identity the bf16 copy comes back.
    let (rows, width) = (4, 30);
    let mut eye = vec![0.0; width * width];
    (0..width).for_each(|i| eye[i * width + i] = 1.0);
    let weight = Matrix::from_f32(CPU, Dtype::Bf16, width, width, &eye).expect("memory");
    let mut rng = Rng(24);
    let (g, u) = (rng.values(rows * width), rng.values(rows * width));
    for dev in devices() {
        let mut out = Act::new(CPU, Dtype::Bf16, rows, width).expect("memory");
        glu(&dev, Gate::Silu, &plane(&g, width), &plane(&u, width), rows, &mut out);
        let mut y = plane(&vec![0.0; rows * width], width);
        let outs = &mut [Linear { weight: &weight, bias: None, site: 0, y: &mut y }];
        linear(&dev, &out, rows, outs, Segments::none(), &mut scratch(rows, 1));
        let y = read_all(&dev, &mut y);
        for t in 0..rows {
            let want = seen(&dev, WeightDtype::Bf16, out.row(t));
            assert_eq!(y[t * width..][..width], want, "{}", dev.name());
        }
    }
}

#[test]
fn argmax_takes_the_first_of_the_greatest_and_refuses_what_is_no_number() {
    let mut rng = Rng(25);
    for n in [1, 15, 32, 64, 65, 256, 257, 1000, 49_152] {
        let mut x = rng.values(n);
        let want = (0..n).fold(0, |best, i| if x[i] > x[best] { i } else { best });
        assert_eq!(argmax(&x), Some((want, x[want])));
        let (first, second) = (n / 3, n / 2);
        (x[first], x[second]) = (5.0, 5.0);
        assert_eq!(argmax(&x), Some((first, 5.0)));
        for bad in [f32::NAN, f32::INFINITY] {
            for place in [0, n / 4, n - 1] {
                let mut x = x.clone();
                x[place] = bad;
                assert_eq!(argmax(&x), None, "{bad} at {place} of {n}");
            }
        }
        // What is banned never wins, and is no fault.
        x.fill(f32::NEG_INFINITY);
        assert_eq!(argmax(&x), None);
        x[n - 1] = -7.0;
        assert_eq!(argmax(&x), Some((n - 1, -7.0)));
    }
    assert_eq!(argmax(&[]), None);
}

#[test]
fn a_device_says_what_it_is() {
    let name = Device::cpu(2).name();
    assert!(name.starts_with("cpu: 2 threads, "), "{name}");
}
