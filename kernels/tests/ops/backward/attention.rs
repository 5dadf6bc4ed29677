//! Attention that tells its lse, and its backward, over packed sequences.

use super::{act_for, bits, rows_of, wide};
use crate::common::{CPU, Rng, devices, plane, read_all};
use polylora_kernels::reference::{attend, attend_backward, log_prob};
use polylora_kernels::{
    Act, AttentionBackward, AttentionBackwardScratch, AttentionScratch, Device, Dtype, Isa,
    KvCache, Plane, RopeStore, RopeTable, Rows, Segments, attention, attention_backward,
    attention_lse, rope_store,
};

const SCALE: f32 = 0.3;

/// Heads, kv heads, head dim.
#[derive(Clone, Copy, Debug)]
struct Shape(usize, usize, usize);

/// Packed sequences of some lengths, their q, k, v and dO.
struct Packed {
    shape: Shape,
    dtype: Dtype,
    window: Option<u32>,
    lengths: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
}

/// What is kept of forward, and what comes back.
struct Made {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Packed {
    fn new(shape: Shape, dtype: Dtype, window: Option<u32>, lengths: &[usize]) -> Packed {
        let Shape(heads, kv_heads, dim) = shape;
        let rows: usize = lengths.iter().sum();
        let mut rng = Rng((rows * dim + heads) as u64);
        let q = rng.values(rows * heads * dim);
        let [k, v] = [(); 2].map(|()| rng.stored(dtype, rows * kv_heads * dim));
        let d_out = rng.values(rows * heads * dim);
        Packed { shape, dtype, window, lengths: lengths.to_vec(), q, k, v, d_out }
    }

    /// One of the sequences alone.
    fn alone(&self, index: usize) -> Packed {
        let start: usize = self.lengths[..index].iter().sum();
        let Shape(heads, kv_heads, dim) = self.shape;
        let of = |x: &[f32], heads: usize| {
            x[start * heads * dim..][..self.lengths[index] * heads * dim].to_vec()
        };
        Packed {
            lengths: vec![self.lengths[index]],
            q: of(&self.q, heads),
            k: of(&self.k, kv_heads),
            v: of(&self.v, kv_heads),
            d_out: of(&self.d_out, heads),
            ..*self
        }
    }

    fn run(&self, dev: &Device) -> Made {
        let Shape(heads, kv_heads, dim) = self.shape;
        let count: usize = self.lengths.iter().sum();
        let (mut positions, mut sequences, mut page_indptr) = (Vec::new(), Vec::new(), vec![0u32]);
        for (s, &length) in self.lengths.iter().enumerate() {
            positions.extend(0..length as u32);
            sequences.extend(vec![s as u32; length]);
            page_indptr.push(page_indptr[s] + length.div_ceil(16) as u32);
        }
        let total = page_indptr[self.lengths.len()];
        let pages: Vec<u32> = (0..total).rev().collect();
        let rows = Rows {
            positions: &positions,
            sequences: &sequences,
            pages: &pages,
            page_indptr: &page_indptr,
        };
        let mut kv = KvCache::new(CPU, self.dtype, 1, pages.len(), kv_heads, dim).expect("memory");
        let [mut q, mut k, v] = [(&self.q, heads), (&self.k, kv_heads), (&self.v, kv_heads)]
            .map(|(x, heads)| plane(x, heads * dim));
        // Angles of zero: what is stored is k.
        let rope = RopeTable::new(CPU, 1024, dim, &vec![0.0; dim / 2], 1.0).expect("memory");
        let args = RopeStore {
            q: &mut q,
            k: &mut k,
            v: &v,
            heads,
            kv_heads,
            head_dim: dim,
            q_norm: None,
            k_norm: None,
            eps: 0.0,
            rope: &rope,
            layer: 0,
        };
        rope_store(dev, args, rows, Segments::none(), &mut kv);
        let new = |width: usize| plane(&vec![f32::NAN; count * width], width);
        let (mut out, mut lse) = (act_for(count, heads * dim), new(heads));
        let mut parts =
            AttentionScratch::new(CPU, dev.threads(), heads, kv_heads, dim, 1024).expect("memory");
        let window = self.window;
        attention_lse(dev, &q, heads, &kv, 0, rows, SCALE, window, &mut out, &mut lse, &mut parts);
        let mut as_served = act_for(count, heads * dim);
        attention(dev, &q, heads, &kv, 0, rows, SCALE, window, &mut as_served, &mut parts);
        let made = rows_of(&out, count);
        assert!(bits(&made) == bits(&rows_of(&as_served, count)), "{}: as served", dev.name());
        let d_out = plane(&self.d_out, heads * dim);
        let of = AttentionBackward {
            q: &q,
            heads,
            kv: &kv,
            layer: 0,
            rows,
            scale: SCALE,
            window,
            out: &out,
            lse: &lse,
            d_out: &d_out,
        };
        let (mut dq, mut dk) = (new(heads * dim), new(kv_heads * dim));
        let mut dv = act_for(count, kv_heads * dim);
        let mut scratch =
            AttentionBackwardScratch::new(CPU, dev.threads(), count, heads, dim).expect("memory");
        attention_backward(dev, of, &mut dq, &mut dk, &mut dv, &mut scratch);
        let [dq, dk, lse] = [&mut dq, &mut dk, &mut lse].map(|plane| read_all(dev, plane));
        Made { out: made, lse, dq, dk, dv: rows_of(&dv, count) }
    }

    /// The same in f64.
    fn want(&self) -> [Vec<f64>; 5] {
        let Shape(heads, kv_heads, dim) = self.shape;
        let count: usize = self.lengths.iter().sum();
        let [mut out, mut dq] = [(); 2].map(|()| vec![0.0; count * heads * dim]);
        let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; count * kv_heads * dim]);
        let mut lse = vec![0.0; count * heads];
        let mut start = 0;
        for &length in &self.lengths {
            for (t, head) in (0..length).flat_map(|t| (0..heads).map(move |n| (t, n))) {
                let first = self.window.map_or(0, |w| (t + 1).saturating_sub(w as usize));
                let kv_head = head / (heads / kv_heads);
                let at = |x: usize| ((start + x) * kv_heads + kv_head) * dim;
                let rows = |x: &[f32]| -> Vec<Vec<f64>> {
                    (first..=t).map(|j| wide(&x[at(j)..][..dim])).collect()
                };
                let (keys, values) = (rows(&self.k), rows(&self.v));
                let mine = ((start + t) * heads + head) * dim;
                let (q, d_out) = (wide(&self.q[mine..][..dim]), wide(&self.d_out[mine..][..dim]));
                let scale = f64::from(SCALE);
                out[mine..][..dim].copy_from_slice(&attend(&q, &keys, &values, scale));
                let score =
                    |k: &Vec<f64>| scale * k.iter().zip(&q).map(|(k, q)| k * q).sum::<f64>();
                let scores: Vec<f64> = keys.iter().map(score).collect();
                lse[(start + t) * heads + head] = scores[0] - log_prob(&scores, 0);
                let made = attend_backward(&q, &keys, &values, scale, &d_out);
                dq[mine..][..dim].copy_from_slice(&made.dq);
                for (j, (k, v)) in (first..=t).zip(made.dk.iter().zip(&made.dv)) {
                    for d in 0..dim {
                        dk[at(j) + d] += k[d];
                        dv[at(j) + d] += v[d];
                    }
                }
            }
            start += length;
        }
        [out, lse, dq, dk, dv]
    }
}

#[track_caller]
fn assert_made(made: &Made, want: &[Vec<f64>; 5], relative: f64, what: &str) {
    let made = [&made.out, &made.lse, &made.dq, &made.dk, &made.dv];
    for ((made, want), name) in made.iter().zip(want).zip(["O", "lse", "dq", "dk", "dv"]) {
        super::assert_near(made, want, relative, &format!("{what}: {name}"));
    }
}

#[test]
fn gradients_equal_the_f64_loop_by_group_window_and_type() {
    for dev in devices() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (shape, window, lengths) in [
                (Shape(1, 1, 2), None, &[1][..]),
                (Shape(4, 2, 22), None, &[3, 17, 1, 66]),
                (Shape(3, 1, 64), None, &[130, 64]),
                (Shape(2, 2, 40), Some(2), &[5, 33]),
                (Shape(6, 2, 16), Some(50), &[140, 20, 65]),
            ] {
                let packed = Packed::new(shape, dtype, window, lengths);
                let what = format!("{} {dtype:?} {shape:?} {window:?}", dev.name());
                // Pairs of bf16 are multiplied by q and weights rounded to it.
                let pairs = dtype == Dtype::Bf16 && dev.isa() == Some(Isa::Avx512Bf16);
                let bar = if pairs { 1e-2 } else { 1e-5 };
                assert_made(&packed.run(&dev), &packed.want(), bar, &what);
            }
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_on_any_number_of_threads() {
    let lengths = [70, 1, 40, 129];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let packed = Packed::new(Shape(6, 3, 24), dtype, Some(90), &lengths);
        for &isa in Isa::available() {
            let one = Device::cpu_with(1, isa).expect("available");
            let all = packed.run(&one);
            let of = |made: &Made| [&made.lse, &made.dq, &made.dk, &made.dv].map(|x| bits(x));
            for threads in [2, 3] {
                let dev = Device::cpu_with(threads, isa).expect("available");
                assert!(of(&packed.run(&dev)) == of(&all), "{}", dev.name());
            }
            let mut start = 0;
            for (index, &length) in lengths.iter().enumerate() {
                let alone = packed.alone(index).run(&one);
                let rows: usize = lengths.iter().sum();
                for (alone, all) in of(&alone).iter().zip(of(&all)) {
                    let width = all.len() / rows;
                    let among = &all[start * width..][..length * width];
                    assert!(alone == among, "{} sequence {index}", one.name());
                }
                start += length;
            }
        }
    }
}

#[test]
#[should_panic(expected = "row 1: sequence and position, in order")]
fn rows_in_another_order_are_refused() {
    let dev = Device::cpu(1);
    let kv = KvCache::new(CPU, Dtype::F32, 1, 2, 1, 16).expect("memory");
    let new = || plane(&[0.0; 32], 16);
    let (q, out, lse, d_out): (Plane, Act, Plane, Plane) =
        (new(), act_for(2, 16), plane(&[0.0; 2], 1), new());
    let rows =
        Rows { positions: &[0, 2], sequences: &[0, 0], pages: &[0, 1], page_indptr: &[0, 2] };
    let of = AttentionBackward {
        q: &q,
        heads: 1,
        kv: &kv,
        layer: 0,
        rows,
        scale: 1.0,
        window: None,
        out: &out,
        lse: &lse,
        d_out: &d_out,
    };
    let mut scratch = AttentionBackwardScratch::new(CPU, 1, 2, 1, 16).expect("memory");
    attention_backward(&dev, of, &mut new(), &mut new(), &mut act_for(2, 16), &mut scratch);
}
