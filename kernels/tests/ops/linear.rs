//! `linear` against the f64 loop, over shapes, storage types, instruction sets and popularities of
//! adapters; and its bits.

use crate::common::{
    Adapter, CPU, DTYPES, INTS, Rng, act, alone, assert_close, devices, floats, install, plane,
    read_all, residents, rounded, scratch, seen, vector, weight_dtypes,
};
use polylora_kernels::reference::{linear_row, segment_of};
use polylora_kernels::{
    Act, AdapterMix, Delta, Device, Dtype, FactorDtype, Isa, Linear, Matrix, Residents, Segments,
    Slot, Vector, WeightDtype, linear,
};

/// A site, its adapters and some rows.
struct Case {
    dtype: WeightDtype,
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
    /// Adapter of each segment; `None` leaves that segment at the base.
    segments: Vec<Option<usize>>,
    mixes: Vec<AdapterMix>,
}

impl Case {
    fn new(
        rng: &mut Rng,
        dtype: impl Into<WeightDtype>,
        rows: usize,
        inputs: usize,
        outputs: usize,
    ) -> Case {
        let dtype = dtype.into();
        let mut w = rng.values(outputs * inputs);
        let weight = Matrix::from_f32(CPU, dtype, outputs, inputs, &w).expect("memory");
        w.chunks_mut(inputs).enumerate().for_each(|(o, row)| weight.read_row(o, row));
        Case {
            dtype,
            inputs,
            outputs,
            weight,
            w,
            bias: rng.below(2).eq(&0).then(|| rng.values(outputs)),
            x: (0..rows).map(|_| rng.values(inputs)).collect(),
            adapters: Vec::new(),
            residents: Residents::new(16),
            indptr: vec![0],
            segments: Vec::new(),
            mixes: Vec::new(),
        }
    }

    fn segment(&mut self, rows: usize, adapter: Option<usize>) {
        let start = self.indptr[self.indptr.len() - 1];
        self.indptr.push(start + rows as u32);
        self.segments.push(adapter);
        self.mixes.push(alone(adapter));
    }

    fn adapter(&mut self, adapter: Adapter) {
        install(&mut self.residents, vec![Some(adapter.delta())]);
        self.adapters.push(adapter);
    }

    fn bias(&self) -> Option<Vector> {
        self.bias.as_deref().map(vector)
    }

    fn act(&self) -> Act {
        let mut act = act(self.dtype, self.x.len(), self.inputs);
        self.x.iter().enumerate().for_each(|(t, x)| act.write(t, x).expect("a copy"));
        act
    }

    fn run(&self, dev: &Device) -> Vec<f32> {
        let rows = self.x.len();
        let mut y = plane(&vec![f32::NAN; rows * self.outputs], self.outputs);
        let bias = self.bias();
        let mut outs = [Linear { weight: &self.weight, bias: bias.as_ref(), site: 0, y: &mut y }];
        let Case { indptr, mixes, residents, .. } = self;
        let segments = Segments { indptr, mixes, residents };
        linear(dev, &self.act(), rows, &mut outs, segments, &mut scratch(rows, 512));
        read_all(dev, &mut y)
    }

    fn check(&self, dev: &Device) {
        let y = self.run(dev);
        for (t, x) in self.x.iter().enumerate() {
            let adapter = segment_of(&self.indptr, t).and_then(|g| self.segments[g]);
            let delta = adapter.map(|a| self.adapters[a].factors());
            let x_base = seen(dev, self.dtype, x);
            let (x, off) =
                adapter.map_or((x.clone(), 0.0), |a| self.adapters[a].seen(dev, self.dtype, x));
            let want = linear_row(&x_base, &x, &self.w, self.bias.as_deref(), delta);
            let rank = delta.map_or(0, |d| d.rank);
            let tolerance = 3e-7 * self.inputs as f64 * (1.0 + 0.05 * rank as f64) + 1e-5 + off;
            let what = format!(
                "{}, {:?}, row {t} of {}, W [{}, {}], rank {rank}",
                dev.name(),
                self.dtype,
                self.x.len(),
                self.outputs,
                self.inputs
            );
            assert_close(&y[t * self.outputs..][..self.outputs], &want, tolerance, &what);
        }
    }
}

#[test]
fn every_path_equals_the_f64_loop_on_odd_shapes() {
    let mut rng = Rng(1);
    let shapes = [
        (1, 1, 1),
        (1, 96, 1),
        (1, 33, 17),
        (2, 7, 64),
        (3, 160, 100),
        (5, 224, 63),
        (6, 576, 65),
        (7, 288, 130),
        (13, 31, 16),
        (16, 352, 200),
        (50, 300, 80),
        (100, 600, 144),
    ];
    for dev in devices() {
        for dtype in weight_dtypes() {
            for (rows, inputs, outputs) in shapes {
                Case::new(&mut rng, dtype, rows, inputs, outputs).check(&dev);
            }
        }
    }
}

/// Rows of each adapter under the popularity, most popular first; the rest of `rows` are base rows.
fn popularity(name: &str, rows: usize) -> Vec<usize> {
    match name {
        "identical" => vec![rows],
        "distinct" => vec![1; rows],
        "uniform" => vec![2; rows / 2],
        "zipf" => (1..).map(|i| rows / (4 * i)).take_while(|&n| n > 0).collect(),
        "skewed" => std::iter::once(rows - 8).chain([1; 4]).collect(),
        "none" => vec![],
        _ => unreachable!("{name}"),
    }
}

fn mixed(rng: &mut Rng, dtype: impl Into<WeightDtype>, name: &str, rows: usize) -> Case {
    let dtype = dtype.into();
    let (inputs, outputs) = (100 + 31 * rng.below(3), 70 + 37 * rng.below(3));
    let mut case = Case::new(rng, dtype, rows, inputs, outputs);
    let ranks = [16, 1, 0, 7, 64, 512, 33, 8, 2, 128];
    for (i, rows) in popularity(name, rows).into_iter().enumerate() {
        if i < ranks.len() {
            let factors = [floats(dtype).into(), FactorDtype::F32, FactorDtype::Int8][i % 3];
            let adapter = Adapter::new(rng, factors, ranks[i], inputs, outputs, i % 4 >= 2);
            case.adapter(adapter);
        }
        // Every ninth segment's adapter does not touch this site.
        let adapter = (i % 9 != 8).then(|| i % case.adapters.len());
        case.segment(rows, adapter);
    }
    case
}

#[test]
fn deltas_of_any_rank_and_popularity_equal_the_f64_loop() {
    let mut rng = Rng(2);
    for dev in devices() {
        for dtype in weight_dtypes() {
            for name in ["identical", "distinct", "uniform", "zipf", "skewed", "none"] {
                for rows in [12, 70] {
                    mixed(&mut rng, dtype, name, rows).check(&dev);
                }
            }
        }
    }
}

#[test]
fn three_sites_of_one_call_each_get_their_own_product() {
    let mut rng = Rng(3);
    let (rows, inputs) = (9, 48);
    for dev in devices() {
        let x: Vec<Vec<f32>> = (0..rows).map(|_| rng.values(inputs)).collect();
        let mut act = Act::new(CPU, Dtype::F32, rows, inputs).expect("memory");
        act.write(0, &x.concat()).expect("a copy");
        let outputs = [80, 16, 33];
        let w = outputs.map(|o| rng.values(o * inputs));
        let bias = outputs.map(|o| rng.values(o));
        let adapters = outputs.map(|o| Adapter::new(&mut rng, Dtype::F32, 5, inputs, o, o == 33));
        let weight: Vec<Matrix> = (0..3).map(|i| matrix(outputs[i], inputs, &w[i])).collect();
        let biases = bias.each_ref().map(|bias| vector(bias));
        let mut y = outputs.map(|o| plane(&vec![0.0; rows * o], o));
        // A resident may number its sites as it likes.
        let site = |i: usize| 2 * i + 1;
        let mut outs: Vec<Linear<'_>> = y
            .iter_mut()
            .enumerate()
            .map(|(i, y)| Linear { weight: &weight[i], bias: Some(&biases[i]), site: site(i), y })
            .collect();
        // Segment 0 changes the first and last site, segment 1 only the last.
        let has = |i: usize, g: usize| i == 2 || (i == 0 && g == 0);
        let mut residents = Residents::new(2);
        let mixes = [0, 1].map(|g| {
            let mut deltas: Vec<Option<Delta>> = (0..6).map(|_| None).collect();
            (0..3).filter(|&i| has(i, g)).for_each(|i| deltas[site(i)] = Some(adapters[i].delta()));
            AdapterMix::from(install(&mut residents, deltas))
        });
        let indptr = &[0, 4, 7];
        let segments = Segments { indptr, mixes: &mixes, residents: &residents };
        linear(&dev, &act, rows, &mut outs, segments, &mut scratch(rows, 8));
        drop(outs);
        let y = y.map(|mut y| read_all(&dev, &mut y));
        for i in 0..3 {
            for t in 0..rows {
                let factors = segment_of(indptr, t).filter(|&g| has(i, g));
                let factors = factors.map(|_| adapters[i].factors());
                let want = linear_row(&x[t], &x[t], &w[i], Some(&bias[i]), factors);
                let what = format!("{}: site {i}, row {t}", dev.name());
                assert_close(&y[i][t * outputs[i]..][..outputs[i]], &want, 3e-5, &what);
            }
        }
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_its_neighbours_or_the_threads() {
    let mut rng = Rng(4);
    for dtype in weight_dtypes() {
        for name in ["distinct", "zipf", "identical"] {
            let case = mixed(&mut rng, dtype, name, 64);
            for &isa in Isa::available() {
                let solo = Device::cpu_with(1, isa).expect("available");
                let among = case.run(&solo);
                for threads in [2, 3] {
                    let team = Device::cpu_with(threads, isa).expect("available");
                    assert_eq!(bits(&case.run(&team)), bits(&among), "{} {name}", team.name());
                }
                for t in [0, 1, 5, 17, 40, 62, 63] {
                    let adapter = segment_of(&case.indptr, t).and_then(|g| case.segments[g]);
                    let alone = of_one(&case, &solo, t, adapter);
                    let row = &among[t * case.outputs..][..case.outputs];
                    assert_eq!(bits(&alone), bits(row), "{} {dtype:?} {name} row {t}", solo.name());
                }
            }
        }
    }
}

/// Row `t` in a step of its own.
fn of_one(case: &Case, dev: &Device, t: usize, adapter: Option<usize>) -> Vec<f32> {
    let mut x = act(case.dtype, 1, case.inputs);
    x.write(0, &case.x[t]).expect("a copy");
    let mut y = plane(&vec![0.0; case.outputs], case.outputs);
    let bias = case.bias();
    let mut outs = [Linear { weight: &case.weight, bias: bias.as_ref(), site: 0, y: &mut y }];
    let indptr: &[u32] = if adapter.is_some() { &[0, 1] } else { &[0] };
    let mixes: Vec<AdapterMix> = adapter.map(|a| Slot(a as u32).into()).into_iter().collect();
    let segments = Segments { indptr, mixes: &mixes, residents: &case.residents };
    linear(dev, &x, 1, &mut outs, segments, &mut scratch(1, 512));
    read_all(dev, &mut y)
}

/// A matrix of f32.
fn matrix(outputs: usize, inputs: usize, rows: &[f32]) -> Matrix {
    Matrix::from_f32(CPU, Dtype::F32, outputs, inputs, rows).expect("memory")
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn avx2_and_avx512_give_the_same_bits_in_f32_and_in_integers() {
    let on = |isa| Device::cpu_with(1, isa);
    let fused: Vec<Device> =
        [Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni].into_iter().filter_map(on).collect();
    for dtype in [WeightDtype::F32].into_iter().chain(INTS) {
        let case = mixed(&mut Rng(5), dtype, "zipf", 40);
        for pair in fused.windows(2) {
            let [one, two] = [&pair[0], &pair[1]].map(|dev| bits(&case.run(dev)));
            assert_eq!(one, two, "{dtype:?}: {} and {}", pair[0].name(), pair[1].name());
        }
    }
}

#[test]
fn a_packed_matrix_reads_back_its_rows() {
    let mut rng = Rng(6);
    for dtype in DTYPES {
        for (outputs, inputs) in [(1, 1), (17, 33), (64, 8), (130, 5)] {
            let rows = rng.stored(dtype, outputs * inputs);
            let matrix = Matrix::from_f32(CPU, dtype, outputs, inputs, &rows).expect("memory");
            let halves: Vec<half::bf16> = rows.iter().map(|&x| half::bf16::from_f32(x)).collect();
            let from_halves = Matrix::from_bf16(CPU, Dtype::Bf16, outputs, inputs, &halves);
            let from_halves = from_halves.expect("memory");
            let mut row = vec![0.0; inputs];
            for output in 0..outputs {
                let want = &rows[output * inputs..][..inputs];
                matrix.read_row(output, &mut row);
                assert_eq!(row, want, "{dtype:?} [{outputs}, {inputs}] row {output}");
                from_halves.read_row(output, &mut row);
                assert_eq!(row, rounded(Dtype::Bf16, want));
            }
        }
    }
}

#[test]
#[should_panic(expected = "rank 9, scratch for 8")]
fn a_rank_beyond_the_scratch_is_refused() {
    let mut rng = Rng(7);
    let adapter = Adapter::new(&mut rng, Dtype::F32, 9, 16, 16, false);
    let weight = matrix(16, 16, &rng.values(256));
    let mut y = plane(&[0.0; 16], 16);
    let mut outs = [Linear { weight: &weight, bias: None, site: 0, y: &mut y }];
    let x = Act::new(CPU, Dtype::F32, 1, 16).expect("memory");
    let residents = residents([adapter.delta()]);
    let segments = Segments { indptr: &[0, 1], mixes: &[Slot(0).into()], residents: &residents };
    linear(&Device::cpu(1), &x, 1, &mut outs, segments, &mut scratch(1, 8));
}

/// A factor of A, or of B, as it comes out of the op: the other one is a single one.
fn int8_holds(values: &[f32], as_a: bool) -> Vec<f32> {
    let n = values.len();
    let (inputs, outputs) = if as_a { (n, 1) } else { (1, n) };
    let (a, b) = if as_a { (values, &[1.0][..]) } else { (&[1.0][..], values) };
    let delta = Delta::new(CPU, FactorDtype::Int8, 1, inputs, outputs, a, b, 1.0, None, None);
    let residents = residents(delta);
    let weight = matrix(outputs, inputs, &vec![0.0; n]);
    // Row t asks for input t.
    let mut x = Act::new(CPU, Dtype::F32, inputs, inputs).expect("memory");
    for t in 0..inputs {
        let row: Vec<f32> = (0..inputs).map(|i| f32::from(u8::from(i == t))).collect();
        x.write(t, &row).expect("a copy");
    }
    let mut y = plane(&vec![f32::NAN; n], outputs);
    let mut outs = [Linear { weight: &weight, bias: None, site: 0, y: &mut y }];
    let indptr = &[0, inputs as u32];
    let segments = Segments { indptr, mixes: &[Slot(0).into()], residents: &residents };
    let dev = Device::cpu(1);
    linear(&dev, &x, inputs, &mut outs, segments, &mut scratch(inputs, 1));
    read_all(&dev, &mut y)
}

#[test]
fn an_int8_factor_is_off_by_half_a_step_of_its_rank_at_most() {
    let mut rng = Rng(9);
    for as_a in [true, false] {
        for size in [1e-6f32, 1.0, 1e6] {
            let values: Vec<f32> = rng.values(100).iter().map(|v| v * size).collect();
            let step = values.iter().fold(0.0f32, |most, v| most.max(v.abs())) / 127.0;
            let held = int8_holds(&values, as_a);
            let error = |(v, h): (&f32, &f32)| (v - h).abs() / step;
            let errors: Vec<f32> = values.iter().zip(&held).map(error).collect();
            let worst = errors.iter().fold(0.0f32, |most, &e| most.max(e));
            assert!((0.4..=0.501).contains(&worst), "off by {worst} steps of {step:e}");
        }
        assert_eq!(int8_holds(&[0.0; 40], as_a), [0.0; 40]);
    }
}
