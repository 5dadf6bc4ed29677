//! Norms, rope and gates, backward.

use super::{Seen, act_for, assert_near, bits, rows_of, wide};
use crate::common::{CPU, Rng, devices, plane, read_all, vector};
use polylora_kernels::reference::{glu_backward, rms_norm_backward, rotate_backward};
use polylora_kernels::{
    Device, Gate, GluBackward, HeadNorm, NormBackward, ResidualBackward, RopeTable,
    add_norm_backward, add_norm_rows_backward, glu_backward as glu_backward_op, rope_backward,
};

const EPS: f32 = 1e-4;

/// A residual stream of some rows, and what its norms read and get.
struct Stream {
    width: usize,
    x: Vec<f32>,
    y: Vec<f32>,
    dy: Vec<f32>,
    dh: Vec<f32>,
    weight: Vec<f32>,
    post: Vec<f32>,
}

impl Stream {
    fn new(seed: u64, rows: usize, width: usize) -> Stream {
        let mut rng = Rng(seed);
        let [x, y, dy, dh] = [(); 4].map(|()| rng.values(rows * width));
        let [weight, post] = [(); 2].map(|()| rng.values(width));
        Stream { width, x, y, dy, dh, weight, post }
    }

    /// dh and the block's dy of some rows: with a norm, with a block, with the block's post-norm.
    fn run(
        &self,
        dev: &Device,
        rows: std::ops::Range<usize>,
        [norm, block, post]: [bool; 3],
    ) -> (Vec<f32>, Vec<f32>) {
        let (count, width) = (rows.len(), self.width);
        let of = |x: &[f32]| plane(&x[rows.start * width..rows.end * width], width);
        let (x, y, dy, mut dh) = (of(&self.x), of(&self.y), of(&self.dy), of(&self.dh));
        let (weight, post_weight) = (vector(&self.weight), vector(&self.post));
        let norm = norm.then_some(NormBackward { x: &x, weight: &weight, eps: EPS, dy: &dy });
        let mut out = act_for(count, width);
        let post = post.then_some((&y, &post_weight, EPS));
        let residual = block.then_some(ResidualBackward { post, dy: &mut out });
        add_norm_backward(dev, norm, count, &mut dh, residual);
        (read_all(dev, &mut dh), rows_of(&out, count))
    }
}

#[test]
fn norms_equal_the_f64_loop_and_a_row_has_the_same_bits_alone() {
    let mut seen = Seen::default();
    for dev in devices() {
        for (rows, width) in [(1, 1), (3, 33), (9, 576), (70, 100)] {
            let stream = Stream::new(width as u64, rows, width);
            for case in
                [[true, false, false], [true, true, false], [true, true, true], [false, true, true]]
            {
                let (dh, dy) = stream.run(&dev, 0..rows, case);
                seen.same(&dev, &format!("{width} {case:?}"), &[&dh[..], &dy].concat());
                for t in 0..rows {
                    let what = format!("{} case {case:?} row {t} of {width}", dev.name());
                    let at = t * width..(t + 1) * width;
                    let of = |x: &[f32]| wide(&x[at.clone()]);
                    let mut want = of(&stream.dh);
                    if case[0] {
                        let eps = f64::from(EPS);
                        let (x, dy) = (of(&stream.x), of(&stream.dy));
                        let more = rms_norm_backward(&x, &stream.weight, eps, &dy);
                        want.iter_mut().zip(more).for_each(|(dh, more)| *dh += more);
                    }
                    assert_near(&dh[at.clone()], &want, 1e-5, &what);
                    if case[2] {
                        let y = of(&stream.y);
                        want = rms_norm_backward(&y, &stream.post, f64::from(EPS), &want);
                    }
                    if case[1] {
                        // One of width 1 gives next to nothing back: rounding is all of it.
                        let bar = if width == 1 { 1e-2 } else { 1e-5 };
                        assert_near(&dy[at.clone()], &want, bar, &what);
                    }
                }
                let alone = stream.run(&dev, rows - 1..rows, case);
                let last = (rows - 1) * width..;
                assert!(bits(&alone.0) == bits(&dh[last.clone()]), "{}: dh", dev.name());
                assert!(!case[1] || bits(&alone.1) == bits(&dy[last]), "{}: dy", dev.name());
            }
        }
    }
}

#[test]
fn a_norm_of_some_rows_adds_to_those_only() {
    for dev in devices() {
        let stream = Stream::new(7, 9, 70);
        let rows = [1u32, 4, 5, 8];
        let (x, weight) = (plane(&stream.x, 70), vector(&stream.weight));
        let picked = |x: &[f32]| -> Vec<f32> {
            rows.iter().flat_map(|&t| x[t as usize * 70..][..70].to_vec()).collect()
        };
        let (mut dh, dy) = (plane(&stream.dh, 70), plane(&picked(&stream.dy), 70));
        let norm = NormBackward { x: &x, weight: &weight, eps: EPS, dy: &dy };
        add_norm_rows_backward(&dev, norm, &rows, &mut dh);
        let got = read_all(&dev, &mut dh);
        let all = stream.run(&dev, 0..9, [true, false, false]).0;
        for t in 0..9 {
            let want = if rows.contains(&(t as u32)) { &all } else { &stream.dh };
            let at = t * 70..(t + 1) * 70;
            assert!(bits(&got[at.clone()]) == bits(&want[at]), "{} row {t}", dev.name());
        }
    }
}

#[test]
fn rope_turns_back_and_head_norms_follow() {
    let mut seen = Seen::default();
    for dev in devices() {
        let mut rng = Rng(105);
        for (rows, heads, dim) in [(1, 1, 2), (5, 3, 22), (33, 4, 64)] {
            let width = heads * dim;
            let freq: Vec<f32> = (0..dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
            let rope = RopeTable::new(CPU, 100, dim, &freq, 1.25).expect("memory");
            let positions: Vec<u32> = (0..rows).map(|_| rng.below(100) as u32).collect();
            let [d, x] = [(); 2].map(|()| rng.values(rows * width));
            let (weight, x_plane) = (rng.values(dim), plane(&x, width));
            let weights = vector(&weight);
            for normed in [false, true] {
                let norm = normed.then_some(HeadNorm { x: &x_plane, weight: &weights, eps: EPS });
                let mut out = act_for(rows, width);
                let mut turned = plane(&d, width);
                rope_backward(&dev, &mut turned, heads, &positions, &rope, norm, &mut out);
                seen.same(&dev, &format!("{dim} {normed}"), &rows_of(&out, rows));
                for (t, &position) in positions.iter().enumerate() {
                    for head in 0..heads {
                        let at = t * width + head * dim;
                        let mut want =
                            rotate_backward(&wide(&d[at..][..dim]), position, &freq, 1.25);
                        if normed {
                            let x = wide(&x[at..][..dim]);
                            want = rms_norm_backward(&x, &weight, f64::from(EPS), &want);
                        }
                        let got = &out.row(t)[head * dim..][..dim];
                        let what = format!("{} normed {normed} row {t} head {head}", dev.name());
                        assert_near(got, &want, 2e-5, &what);
                    }
                }
                let last = rows - 1;
                let norm = x[last * width..].to_vec();
                let norm_plane = plane(&norm, width);
                let norm =
                    normed.then_some(HeadNorm { x: &norm_plane, weight: &weights, eps: EPS });
                let (mut alone, mut d) = (act_for(1, width), plane(&d[last * width..], width));
                rope_backward(&dev, &mut d, heads, &positions[last..], &rope, norm, &mut alone);
                assert!(bits(alone.row(0)) == bits(out.row(last)), "{}", dev.name());
            }
        }
    }
}

#[test]
fn gates_equal_the_f64_formulas_from_minus_100_to_100() {
    let mut seen = Seen::default();
    for dev in devices() {
        let mut rng = Rng(106);
        for gate in [Gate::Silu, Gate::GeluTanh] {
            for (rows, width) in [(1, 1), (3, 50), (40, 300)] {
                let count = rows * width;
                let g: Vec<f32> = (0..count)
                    .map(|i| rng.value() * if i % 3 == 0 { 100.0 } else { 6.0 })
                    .collect();
                let [u, da] = [(); 2].map(|()| rng.values(count));
                let of = |rows: std::ops::Range<usize>| {
                    let [g, u, da] = [&g, &u, &da]
                        .map(|x| plane(&x[rows.start * width..rows.end * width], width));
                    let (mut dg, mut du) = (act_for(rows.len(), width), act_for(rows.len(), width));
                    let args = GluBackward { gate, g: &g, u: &u, da: &da };
                    glu_backward_op(&dev, args, rows.len(), &mut dg, &mut du);
                    [rows_of(&dg, rows.len()), rows_of(&du, rows.len())]
                };
                let made = of(0..rows);
                seen.same(&dev, &format!("{gate:?} {width}"), &made.concat());
                for i in 0..count {
                    let [g, u, da] = [g[i], u[i], da[i]].map(f64::from);
                    let what = format!("{} {gate:?}({g})", dev.name());
                    for (made, want) in made.iter().zip(glu_backward(gate, g, u, da)) {
                        let off = (f64::from(made[i]) - want).abs();
                        assert!(off <= 1e-5 * (0.1 + want.abs()), "{what}: {} {want}", made[i]);
                    }
                }
                let alone = of(rows - 1..rows);
                for (alone, made) in alone.iter().zip(&made) {
                    assert!(bits(alone) == bits(&made[(rows - 1) * width..]), "{}", dev.name());
                }
            }
        }
    }
}
