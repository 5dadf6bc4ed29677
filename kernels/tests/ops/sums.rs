//! `linear_sum`: several weighted deltas on the same rows, against the f64 loop; and their bits.

use crate::common::{Adapter, DTYPES, Rng, assert_close, devices, seen};
use polylora_kernels::reference::{linear_row, segment_of};
use polylora_kernels::{
    Act, Add, Delta, Device, Dtype, Isa, Linear, LoraScratch, Matrix, PARTS_MAX, Segments, linear,
    linear_sum,
};

/// A site, adapters, and segments that each have some of them, weighted.
struct Case {
    dtype: Dtype,
    inputs: usize,
    outputs: usize,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    weight: Matrix,
    x: Vec<Vec<f32>>,
    adapters: Vec<Adapter>,
    indptr: Vec<u32>,
    /// (adapter, weight) of each segment, in order.
    segments: Vec<Vec<(usize, f32)>>,
}

/// Ranks that are no multiples of anything, and one bias alone; the last two have gains.
const RANKS: [usize; 10] = [16, 1, 0, 7, 64, 33, 8, 2, 5, 16];
const GAINED: usize = 8;

impl Case {
    fn new(rng: &mut Rng, dtype: Dtype, rows: usize) -> Case {
        let (inputs, outputs) = (100 + 31 * rng.below(3), 70 + 37 * rng.below(3));
        let w = rng.stored(dtype, outputs * inputs);
        let adapter = |(i, &rank): (usize, &usize)| {
            let factors = if i % 3 == 1 { Dtype::F32 } else { dtype };
            match i {
                GAINED.. => Adapter::new(rng, factors, rank, inputs, outputs, true),
                _ => Adapter::biased(rng, factors, rank, inputs, outputs, i % 2 == 0),
            }
        };
        let adapters = RANKS.iter().enumerate().map(adapter).collect();
        let mut case = Case {
            dtype,
            inputs,
            outputs,
            weight: Matrix::from_f32(dtype, outputs, inputs, &w),
            w,
            bias: rng.below(2).eq(&0).then(|| rng.values(outputs)),
            x: (0..rows).map(|_| rng.values(inputs)).collect(),
            adapters,
            indptr: vec![0],
            segments: Vec::new(),
        };
        while case.indptr[case.segments.len()] as usize + 9 < rows {
            let end = case.indptr[case.segments.len()] + 1 + rng.below(8) as u32;
            case.indptr.push(end);
            case.segments.push(match case.segments.len() % 5 {
                0 => vec![(GAINED + rng.below(2), 1.0)],
                1 => Vec::new(),
                _ => parts(rng),
            });
        }
        case
    }

    /// The rows that are named, in a step of their own.
    fn run(&self, dev: &Device, only: Option<usize>) -> Vec<f32> {
        let rows: Vec<usize> = only.map_or((0..self.x.len()).collect(), |t| vec![t]);
        let mut act = Act::new(self.dtype, rows.len(), self.inputs);
        rows.iter().enumerate().for_each(|(to, &t)| act.set_row(to, &self.x[t]));
        let all = Segments { indptr: &self.indptr };
        let of_row = only.and_then(|t| segment_of(all, t));
        let segments = match (only, of_row) {
            (None, _) => all,
            (Some(_), Some(_)) => Segments { indptr: &[0, 1] },
            (Some(_), None) => Segments { indptr: &[0] },
        };
        let mut y = vec![f32::NAN; rows.len() * self.outputs];
        let mut outs = [Linear { weight: &self.weight, bias: self.bias.as_deref(), y: &mut y }];
        let mut scratch = LoraScratch::new(rows.len(), 512);
        let parts = |g: usize| &self.segments[of_row.unwrap_or(g)];
        let own = |part: &(usize, f32)| (&self.adapters[part.0].delta, part.1);
        sum(dev, &act, &mut outs, segments, &|g| parts(g).iter().map(own).collect(), &mut scratch);
        y
    }

    /// Row `t` in f64, and how far it may be off: the base, and each delta as what it makes of a
    /// base that is nothing.
    fn wanted(&self, dev: &Device, t: usize) -> (Vec<f64>, f64) {
        let x = &self.x[t];
        let x_base = seen(dev, self.dtype.into(), x);
        let bias = self.bias.as_deref();
        let segment = segment_of(Segments { indptr: &self.indptr }, t);
        let parts = segment.map_or(&[][..], |g| &self.segments[g]);
        if let [(adapter, 1.0)] = *parts {
            let delta = self.adapters[adapter].factors();
            let (x, off) = self.adapters[adapter].seen(dev, self.dtype.into(), x);
            return (linear_row(&x_base, &x, &self.w, bias, Some(delta)), off);
        }
        let (mut y, mut off) = (linear_row(&x_base, x, &self.w, bias, None), 0.0);
        for &(adapter, weight) in parts {
            let (zero, delta) = (vec![0.0; x.len()], self.adapters[adapter].factors());
            let (x, own_off) = self.adapters[adapter].seen(dev, self.dtype.into(), x);
            let own = linear_row(&zero, &x, &self.w, None, Some(delta));
            y.iter_mut().zip(own).for_each(|(y, own)| *y += f64::from(weight) * own);
            off += f64::from(weight.abs()) * own_off;
        }
        (y, off)
    }
}

/// One linear over all rows of `x`; `deltas(g)` are those of segment `g`.
fn sum<'d>(
    dev: &Device,
    x: &Act,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    deltas: &dyn Fn(usize) -> Vec<(&'d Delta, f32)>,
    scratch: &mut LoraScratch,
) {
    let each = |_: usize, g: usize, add: Add<'_, 'd>| {
        deltas(g).into_iter().for_each(|(delta, weight)| add(delta, weight));
    };
    linear_sum(dev, x, x.rows_max(), outs, segments, &each, scratch);
}

/// Two to eight of the adapters without gains, with weights from -2 to 2; some twice.
fn parts(rng: &mut Rng) -> Vec<(usize, f32)> {
    let count = 2 + rng.below(PARTS_MAX - 1);
    let weight = |rng: &mut Rng| if rng.below(6) == 0 { 0.0 } else { 2.0 * rng.value() };
    (0..count).map(|_| (rng.below(GAINED), weight(rng))).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn weighted_deltas_of_the_same_rows_equal_the_f64_loop() {
    let mut rng = Rng(31);
    for dev in devices() {
        for dtype in DTYPES {
            for rows in [12, 70] {
                let case = Case::new(&mut rng, dtype, rows);
                let y = case.run(&dev, None);
                for t in 0..rows {
                    let row = &y[t * case.outputs..][..case.outputs];
                    let what = format!("{} {dtype:?} row {t} of {rows}", dev.name());
                    let (want, off) = case.wanted(&dev, t);
                    let tolerance = 3e-6 * case.inputs as f64 + off;
                    assert_close(row, &want, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn a_row_of_several_deltas_has_the_same_bits_alone_and_among_sixty_four() {
    let mut rng = Rng(32);
    for dtype in DTYPES {
        let case = Case::new(&mut rng, dtype, 64);
        for &isa in Isa::available() {
            let solo = Device::cpu_with(1, isa).expect("available");
            let among = case.run(&solo, None);
            for threads in [2, 3] {
                let team = Device::cpu_with(threads, isa).expect("available");
                assert_eq!(bits(&case.run(&team, None)), bits(&among), "{}", team.name());
            }
            for t in (0..64).step_by(3) {
                let row = &among[t * case.outputs..][..case.outputs];
                let alone = case.run(&solo, Some(t));
                assert_eq!(bits(&alone), bits(row), "{} {dtype:?} row {t}", solo.name());
            }
        }
    }
}

/// A weight that is a power of two rounds nowhere: it may as well be folded into the factors.
#[test]
fn a_weight_is_a_scale() {
    let (mut rng, dev) = (Rng(33), Device::cpu(2));
    let (inputs, outputs, rank) = (96, 130, 9);
    let (a, b) = (rng.values(rank * inputs), rng.values(outputs * rank));
    let delta = |scale| Delta::new(Dtype::F32, rank, inputs, outputs, &a, &b, scale, None, None);
    let (whole, half) = (delta(1.0), delta(-0.5));
    let matrix = Matrix::from_f32(Dtype::F32, outputs, inputs, &rng.values(outputs * inputs));
    let mut x = Act::new(Dtype::F32, 3, inputs);
    (0..3).for_each(|t| x.set_row(t, &rng.values(inputs)));
    let mut scratch = LoraScratch::new(3, rank);
    let segments = Segments { indptr: &[0, 3] };
    let (mut weighted, mut scaled) = (vec![0.0; 3 * outputs], vec![0.0; 3 * outputs]);
    let mut outs = [Linear { weight: &matrix, bias: None, y: &mut weighted }];
    sum(&dev, &x, &mut outs, segments, &|_| vec![(&whole, -0.5)], &mut scratch);
    let mut outs = [Linear { weight: &matrix, bias: None, y: &mut scaled }];
    linear(&dev, &x, 3, &mut outs, segments, &|_, _| Some(&half), &mut scratch);
    assert_eq!(bits(&weighted), bits(&scaled));
}

/// One row with these deltas, each of weight 0.5.
fn sum_of<'d>(deltas: &[&'d Delta], rank_max: usize) {
    let (dev, x) = (Device::cpu(1), Act::new(Dtype::F32, 1, 16));
    let weight = Matrix::from_f32(Dtype::F32, 16, 16, &[0.0; 256]);
    let mut y = vec![0.0; 16];
    let mut outs = [Linear { weight: &weight, bias: None, y: &mut y }];
    let mut scratch = LoraScratch::new(1, rank_max);
    let segments = Segments { indptr: &[0, 1] };
    let half = |delta: &&'d Delta| (*delta, 0.5);
    sum(&dev, &x, &mut outs, segments, &|_| deltas.iter().map(half).collect(), &mut scratch);
}

#[test]
#[should_panic(expected = "rank 10, scratch for 8")]
fn ranks_that_add_up_beyond_the_scratch_are_refused() {
    let adapter = Adapter::new(&mut Rng(34), Dtype::F32, 5, 16, 16, false);
    sum_of(&[&adapter.delta, &adapter.delta], 8);
}

#[test]
#[should_panic(expected = "a gain is of a delta alone")]
fn a_gain_in_a_sum_is_refused() {
    let adapter = Adapter::new(&mut Rng(35), Dtype::F32, 5, 16, 16, true);
    sum_of(&[&adapter.delta], 8);
}

#[test]
#[should_panic(expected = "9 deltas, at most 8")]
fn more_deltas_than_there_is_room_for_are_refused() {
    let adapter = Adapter::new(&mut Rng(36), Dtype::F32, 1, 16, 16, false);
    sum_of(&[&adapter.delta; 9], 16);
}
