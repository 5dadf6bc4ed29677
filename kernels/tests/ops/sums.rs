//! `linear` with several weighted deltas on the same rows, against the f64 loop; and their bits.

use crate::common::{
    Adapter, CPU, DTYPES, Rng, assert_close, devices, plane, read_all, residents, scratch, seen,
    vector,
};
use polylora_kernels::reference::{linear_row, segment_of};
use polylora_kernels::{
    Act, AdapterMix, Delta, Device, Dtype, Isa, Linear, Matrix, PARTS_MAX, Residents, Segments,
    Slot, linear,
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
    /// Each in the slot of its index.
    adapters: Vec<Adapter>,
    residents: Residents,
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
        let adapters: Vec<Adapter> = RANKS.iter().enumerate().map(adapter).collect();
        let mut case = Case {
            dtype,
            inputs,
            outputs,
            weight: Matrix::from_f32(CPU, dtype, outputs, inputs, &w).expect("memory"),
            w,
            bias: rng.below(2).eq(&0).then(|| rng.values(outputs)),
            x: (0..rows).map(|_| rng.values(inputs)).collect(),
            residents: residents(adapters.iter().map(Adapter::delta)),
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
        let mut act = Act::new(CPU, self.dtype, rows.len(), self.inputs).expect("memory");
        for (to, &t) in rows.iter().enumerate() {
            act.write(to, &self.x[t]).expect("a copy");
        }
        let of_row = only.and_then(|t| segment_of(&self.indptr, t));
        let indptr = match (only, of_row) {
            (None, _) => &self.indptr[..],
            (Some(_), Some(_)) => &[0, 1],
            (Some(_), None) => &[0],
        };
        let mut y = plane(&vec![f32::NAN; rows.len() * self.outputs], self.outputs);
        let bias = self.bias.as_deref().map(vector);
        let mut outs = [Linear { weight: &self.weight, bias: bias.as_ref(), site: 0, y: &mut y }];
        let mixes: Vec<AdapterMix> =
            (0..indptr.len() - 1).map(|g| of(&self.segments[of_row.unwrap_or(g)])).collect();
        let segments = Segments { indptr, mixes: &mixes, residents: &self.residents };
        linear(dev, &act, rows.len(), &mut outs, segments, &mut scratch(rows.len(), 512));
        read_all(dev, &mut y)
    }

    /// Row `t` in f64, and how far it may be off: the base, and each delta as what it makes of a
    /// base that is nothing.
    fn wanted(&self, dev: &Device, t: usize) -> (Vec<f64>, f64) {
        let x = &self.x[t];
        let x_base = seen(dev, self.dtype.into(), x);
        let bias = self.bias.as_deref();
        let segment = segment_of(&self.indptr, t);
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

/// The mix of weighted slots.
fn of(parts: &[(usize, f32)]) -> AdapterMix {
    AdapterMix::new(parts.iter().map(|&(slot, weight)| (Slot(slot as u32), weight)))
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
    let delta = |scale| {
        let made = Delta::new(CPU, Dtype::F32, rank, inputs, outputs, &a, &b, scale, None, None);
        made.expect("memory")
    };
    let residents = residents([delta(1.0), delta(-0.5)]);
    let w = rng.values(outputs * inputs);
    let matrix = Matrix::from_f32(CPU, Dtype::F32, outputs, inputs, &w).expect("memory");
    let mut x = Act::new(CPU, Dtype::F32, 3, inputs).expect("memory");
    x.write(0, &rng.values(3 * inputs)).expect("a copy");
    let [weighted, scaled] = [(0, -0.5), (1, 1.0)].map(|part| {
        let mut y = plane(&vec![0.0; 3 * outputs], outputs);
        let mut outs = [Linear { weight: &matrix, bias: None, site: 0, y: &mut y }];
        let mixes = &[of(&[part])];
        let segments = Segments { indptr: &[0, 3], mixes, residents: &residents };
        linear(&dev, &x, 3, &mut outs, segments, &mut scratch(3, rank));
        read_all(&dev, &mut y)
    });
    assert_eq!(bits(&weighted), bits(&scaled));
}

/// One row with so many of an adapter, each of weight 0.5.
fn sum_of(adapter: &Adapter, count: usize, rank_max: usize) {
    let (dev, x) = (Device::cpu(1), Act::new(CPU, Dtype::F32, 1, 16).expect("memory"));
    let weight = Matrix::from_f32(CPU, Dtype::F32, 16, 16, &[0.0; 256]).expect("memory");
    let mut y = plane(&[0.0; 16], 16);
    let mut outs = [Linear { weight: &weight, bias: None, site: 0, y: &mut y }];
    let residents = residents([adapter.delta()]);
    let mixes = &[of(&vec![(0, 0.5); count])];
    let segments = Segments { indptr: &[0, 1], mixes, residents: &residents };
    linear(&dev, &x, 1, &mut outs, segments, &mut scratch(1, rank_max));
}

#[test]
#[should_panic(expected = "rank 10, scratch for 8")]
fn ranks_that_add_up_beyond_the_scratch_are_refused() {
    let adapter = Adapter::new(&mut Rng(34), Dtype::F32, 5, 16, 16, false);
    sum_of(&adapter, 2, 8);
}

#[test]
#[should_panic(expected = "a gain is of a delta alone")]
fn a_gain_in_a_sum_is_refused() {
    let adapter = Adapter::new(&mut Rng(35), Dtype::F32, 5, 16, 16, true);
    sum_of(&adapter, 1, 8);
}

#[test]
#[should_panic(expected = "9 deltas, at most 8")]
fn more_deltas_than_there_is_room_for_are_refused() {
    let adapter = Adapter::new(&mut Rng(36), Dtype::F32, 1, 16, 16, false);
    sum_of(&adapter, 9, 16);
}
