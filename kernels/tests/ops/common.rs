//! What the ops' tests share: numbers from a seed, the devices to test, and one site with its
//! adapters.

use half::bf16;
use polylora_kernels::reference::Factors;
use polylora_kernels::{
    Act, AdapterMix, Delta, Device, Dtype, FactorDtype, Isa, KvDtype, Linear, LoraScratch, Matrix,
    Memory, Plane, Resident, Residents, Segments, Slot, Vector, WeightDtype, linear,
};

pub const CPU: &Memory = &Memory::Cpu;

/// splitmix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in -1..1.
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// Values that bf16 holds exactly, when that is the type.
    pub fn stored(&mut self, dtype: Dtype, n: usize) -> Vec<f32> {
        rounded(dtype, &self.values(n))
    }
}

pub fn rounded(dtype: Dtype, x: &[f32]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => x.to_vec(),
        Dtype::Bf16 => x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
    }
}

/// An activation as weights of `dtype` multiply it.
pub fn seen(dev: &Device, dtype: WeightDtype, x: &[f32]) -> Vec<f32> {
    match dtype {
        WeightDtype::Bf16 if dev.isa() == Some(Isa::Avx512Bf16) => rounded(Dtype::Bf16, x),
        WeightDtype::F32 | WeightDtype::Bf16 => x.to_vec(),
        _ => x.chunks(32).flat_map(but_an_outlier_in_127_steps).collect(),
    }
}

/// A group of 32: as it is where it is more than four times as large as all others; those in 127
/// steps.
fn but_an_outlier_in_127_steps(x: &[f32]) -> Vec<f32> {
    let size = |i: &usize| x[*i].abs();
    let at = (0..x.len()).max_by(|i, j| size(i).total_cmp(&size(j))).expect("no group is empty");
    if (0..x.len()).any(|i| i != at && size(&i) >= size(&at) / 4.0) {
        return in_127_steps(x);
    }
    let mut others = x.to_vec();
    others[at] = 0.0;
    let mut seen = in_127_steps(&others);
    seen[at] = x[at];
    seen
}

/// Multiples of 1/127 of the largest.
pub fn in_127_steps(x: &[f32]) -> Vec<f32> {
    let largest = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    x.iter().map(|x| (x * factor).round_ties_even() * (largest / 127.0)).collect()
}

/// Values that a factor holds exactly: in int8 multiples of 1/128, the first of each rank the
/// largest. `rank_of` tells the rank of a value by its index.
fn factor(
    rng: &mut Rng,
    dtype: FactorDtype,
    n: usize,
    rank_of: impl Fn(usize) -> usize,
) -> Vec<f32> {
    let mut largest = std::collections::HashSet::new();
    match dtype {
        FactorDtype::F32 => rng.stored(Dtype::F32, n),
        FactorDtype::Bf16 => rng.stored(Dtype::Bf16, n),
        FactorDtype::Int8 => (0..n)
            .map(|i| match largest.insert(rank_of(i)) {
                true => -127.0 / 128.0,
                false => (rng.below(255) as f32 - 127.0) / 128.0,
            })
            .collect(),
    }
}

/// Every instruction set of this CPU on one thread, and the best on two and three.
pub fn devices() -> Vec<Device> {
    let each = Isa::available().iter().map(|&isa| Device::cpu_with(1, isa).expect("available"));
    each.chain([2, 3].map(Device::cpu)).collect()
}

pub const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

pub const KV_DTYPES: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8];

pub const INTS: [WeightDtype; 5] = [
    WeightDtype::Int8,
    WeightDtype::Int8By16,
    WeightDtype::Int8Min,
    WeightDtype::Int4,
    WeightDtype::Int4Min,
];

pub fn weight_dtypes() -> impl Iterator<Item = WeightDtype> {
    [WeightDtype::F32, WeightDtype::Bf16].into_iter().chain(INTS)
}

/// The floats beside weights of `dtype`.
pub fn floats(dtype: WeightDtype) -> Dtype {
    if dtype == WeightDtype::Bf16 { Dtype::Bf16 } else { Dtype::F32 }
}

/// Zeros for weights of a dtype.
pub fn act(dtype: WeightDtype, rows: usize, width: usize) -> Act {
    let act = match dtype.group() {
        Some(_) => Act::with_bytes(CPU, floats(dtype), rows, width),
        None => Act::new(CPU, floats(dtype), rows, width),
    };
    act.expect("memory")
}

/// A plane of rows of `width` values.
pub fn plane(values: &[f32], width: usize) -> Plane {
    let mut plane = Plane::new(CPU, values.len() / width, width).expect("memory");
    plane.write(0, values).expect("a copy");
    plane
}

/// All rows of a plane.
pub fn read_all(dev: &Device, plane: &mut Plane) -> Vec<f32> {
    plane.read(dev, plane.rows_max()).expect("no op failed").to_vec()
}

pub fn vector(values: &[f32]) -> Vector {
    Vector::new(CPU, values).expect("memory")
}

/// Residents that change one site each.
pub fn residents(deltas: impl IntoIterator<Item = Delta>) -> Residents {
    let mut residents = Residents::new(64);
    for delta in deltas {
        install(&mut residents, vec![Some(delta)]);
    }
    residents
}

/// Puts a resident of these deltas into the next slot.
pub fn install(residents: &mut Residents, deltas: Vec<Option<Delta>>) -> Slot {
    let resident = Resident { deltas, ..Resident::default() };
    residents.install(resident).map_err(|_| "no slot is free").expect("a slot")
}

/// The resident as it is, or nothing.
pub fn alone(slot: Option<usize>) -> AdapterMix {
    AdapterMix::new(slot.map(|slot| (Slot(slot as u32), 1.0)))
}

/// That integer weights see in the rows an op wrote what they see in the same rows set by hand.
#[track_caller]
pub fn assert_bytes_in_step(dev: &Device, written: &Act, rows: usize, what: &str) {
    let width = written.width();
    let mut by_hand = Act::with_bytes(CPU, Dtype::F32, rows, width).expect("memory");
    (0..rows).for_each(|t| by_hand.write(t, written.row(t)).expect("a copy"));
    let weight = Matrix::from_f32(CPU, WeightDtype::Int8, 16, width, &Rng(99).values(16 * width));
    let weight = weight.expect("memory");
    let [got, want] = [written, &by_hand].map(|x| {
        let mut y = plane(&vec![f32::NAN; rows * 16], 16);
        let outs = &mut [Linear { weight: &weight, bias: None, site: 0, y: &mut y }];
        linear(dev, x, rows, outs, Segments::none(), &mut scratch(rows, 1));
        read_all(dev, &mut y).iter().map(|y| y.to_bits()).collect::<Vec<u32>>()
    });
    assert_eq!(got, want, "{what}");
}

pub fn scratch(rows: usize, rank_max: usize) -> LoraScratch {
    LoraScratch::new(CPU, rows, rank_max).expect("memory")
}

#[track_caller]
pub fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance, "{what}: [{i}] is {got}, not {want} (off by {error:e})");
    }
}

/// One adapter at one site: the op's form is made of it, and the reference's.
pub struct Adapter {
    pub rank: usize,
    inputs: usize,
    outputs: usize,
    dtype: FactorDtype,
    a: Vec<f32>,
    b: Vec<f32>,
    scale: f32,
    gain: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl Adapter {
    /// `dora`: with a gain and a bias of its own.
    pub fn new(
        rng: &mut Rng,
        dtype: impl Into<FactorDtype>,
        rank: usize,
        inputs: usize,
        outputs: usize,
        dora: bool,
    ) -> Adapter {
        Self::with(rng, dtype, rank, (inputs, outputs), dora, dora)
    }

    /// With a bias of its own, perhaps, and no gain.
    pub fn biased(
        rng: &mut Rng,
        dtype: impl Into<FactorDtype>,
        rank: usize,
        inputs: usize,
        outputs: usize,
        biased: bool,
    ) -> Adapter {
        Self::with(rng, dtype, rank, (inputs, outputs), false, biased)
    }

    fn with(
        rng: &mut Rng,
        dtype: impl Into<FactorDtype>,
        rank: usize,
        (inputs, outputs): (usize, usize),
        gained: bool,
        biased: bool,
    ) -> Adapter {
        let dtype = dtype.into();
        let a = factor(rng, dtype, rank * inputs, |i| i / inputs);
        let b = factor(rng, dtype, rank * outputs, |i| i % rank);
        // A power of two keeps scale · B exact in bf16.
        let scale = 0.25;
        let gain = gained.then(|| rng.values(outputs));
        let bias = biased.then(|| rng.values(outputs));
        Adapter { rank, inputs, outputs, dtype, a, b, scale, gain, bias }
    }

    /// The op's form.
    pub fn delta(&self) -> Delta {
        let Adapter { rank, inputs, outputs, dtype, a, b, scale, .. } = self;
        let (gain, bias) = (self.gain.clone(), self.bias.clone());
        Delta::new(CPU, *dtype, *rank, *inputs, *outputs, a, b, *scale, gain, bias).expect("memory")
    }

    /// x as A multiplies it beside weights of `weights`, and how far y may then be off because u is
    /// rounded: both only where pairs of bf16 are multiplied.
    pub fn seen(&self, dev: &Device, weights: WeightDtype, x: &[f32]) -> (Vec<f32>, f64) {
        let all_bf16 = self.dtype == FactorDtype::Bf16 && weights == WeightDtype::Bf16;
        if !all_bf16 || dev.isa() != Some(Isa::Avx512Bf16) {
            return (x.to_vec(), 0.0);
        }
        let x = rounded(Dtype::Bf16, x);
        let dot = |a: &[f32]| a.iter().zip(&x).map(|(&a, &x)| f64::from(a * x)).sum::<f64>();
        let u: Vec<f64> = self.a.chunks(x.len()).map(|a| dot(a).abs()).collect();
        let off = (0..self.b.len() / self.rank.max(1)).map(|o| {
            let b = &self.b[o * self.rank..][..self.rank];
            let sum: f64 = b.iter().zip(&u).map(|(&b, u)| f64::from(b.abs()) * u).sum();
            let gain = self.gain.as_ref().map_or(1.0, |gain| f64::from(gain[o].abs()));
            sum * f64::from(self.scale) * gain / 256.0
        });
        (x.clone(), off.fold(0.0, f64::max))
    }

    pub fn factors(&self) -> Factors<'_> {
        Factors {
            rank: self.rank,
            a: &self.a,
            b: &self.b,
            scale: self.scale,
            gain: self.gain.as_deref(),
            bias: self.bias.as_deref(),
        }
    }
}
