//! `rope_store` and `attention` through the pages, against f64 loops; and the bits of a row.

use crate::common::{
    CPU, KV_DTYPES, Rng, assert_bytes_in_step, assert_close, devices, in_127_steps, plane,
    read_all, rounded, vector,
};
use polylora_kernels::reference::{attend, rms_norm, rotate};
use polylora_kernels::{
    Act, AdapterMix, AttentionScratch, Device, Dtype, Isa, KvCache, KvDtype, NormWeight, Resident,
    Residents, RopeStore, RopeTable, Rows, Segments, Slot, attention, rope_store,
};

const EPS: f32 = 1e-6;
const LAYERS: usize = 2;
const LAYER: usize = 1;

/// Some sequences, their q, k, v rows in order of position, and where their pages are.
struct World {
    dtype: KvDtype,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    /// `[S]` lengths.
    lengths: Vec<usize>,
    /// Per sequence [length, N·D], [length, K·D], [length, K·D].
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    pages: Vec<u32>,
    page_indptr: Vec<u32>,
    pages_total: usize,
    inv_freq: Vec<f32>,
    norm: Vec<f32>,
    replaced: Vec<f32>,
}

/// Which rows of a sequence go into one step.
struct Part {
    sequence: usize,
    from: usize,
    to: usize,
}

impl World {
    fn new(
        seed: u64,
        dtype: impl Into<KvDtype>,
        heads: usize,
        kv_heads: usize,
        dim: usize,
    ) -> World {
        World::of(seed, dtype, heads, kv_heads, dim, &[1, 16, 17, 45, 90, 33])
    }

    fn of(
        seed: u64,
        dtype: impl Into<KvDtype>,
        heads: usize,
        kv_heads: usize,
        dim: usize,
        lengths: &[usize],
    ) -> World {
        let mut rng = Rng(seed);
        let (dtype, lengths) = (dtype.into(), lengths.to_vec());
        let mut page_indptr = vec![0];
        let mut taken = 0;
        for length in &lengths {
            taken += length.div_ceil(16);
            page_indptr.push(taken as u32);
        }
        // Pages in no order, and some of nobody.
        let pages_total = taken + 3;
        let mut pages: Vec<u32> = (0..pages_total as u32).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, rng.below(i + 1));
        }
        pages.truncate(taken);
        let mut draw = |width: usize| -> Vec<Vec<f32>> {
            lengths.iter().map(|l| rng.values(l * width)).collect()
        };
        let (q, k, v) = (draw(heads * dim), draw(kv_heads * dim), draw(kv_heads * dim));
        let inv_freq = (0..dim / 2).map(|d| 0.5f32.powi(d as i32)).collect();
        let (norm, replaced) = (rng.values(dim), rng.values(dim));
        World {
            dtype,
            heads,
            kv_heads,
            dim,
            lengths,
            q,
            k,
            v,
            pages,
            page_indptr,
            pages_total,
            inv_freq,
            norm,
            replaced,
        }
    }

    fn cache(&self) -> KvCache {
        KvCache::new(CPU, self.dtype, LAYERS, self.pages_total, self.kv_heads, self.dim)
            .expect("memory")
    }

    /// Runs the parts as one step; segment 0 is the first `replaced_rows` rows. Returns rotated q
    /// and the output.
    fn step(
        &self,
        dev: &Device,
        kv: &mut KvCache,
        parts: &[Part],
        replaced_rows: u32,
        window: Option<u32>,
    ) -> (Vec<f32>, Act) {
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        let (mut positions, mut sequences) = (Vec::new(), Vec::new());
        for part in parts {
            let s = part.sequence;
            let rows = |x: &[f32], width: usize| x[part.from * width..part.to * width].to_vec();
            q.extend(rows(&self.q[s], self.heads * self.dim));
            k.extend(rows(&self.k[s], self.kv_heads * self.dim));
            v.extend(rows(&self.v[s], self.kv_heads * self.dim));
            positions.extend(part.from as u32..part.to as u32);
            sequences.extend((part.from..part.to).map(|_| s as u32));
        }
        let rows = Rows {
            positions: &positions,
            sequences: &sequences,
            pages: &self.pages,
            page_indptr: &self.page_indptr,
        };
        let indptr: &[u32] = if replaced_rows > 0 { &[0, replaced_rows] } else { &[0] };
        // It replaces the second of two norms.
        let norms = vec![None, Some(vector(&self.replaced))];
        let mut residents = Residents::new(1);
        let taken = residents.install(Resident { norms, ..Resident::default() });
        assert!(taken.is_ok_and(|slot| slot == Slot(0)));
        let mixes = &[AdapterMix::from(Slot(0))][..indptr.len() - 1];
        let segments = Segments { indptr, mixes, residents: &residents };
        let base = vector(&self.norm);
        let [mut q, mut k, v] = [(q, self.heads), (k, self.kv_heads), (v, self.kv_heads)]
            .map(|(x, heads)| plane(&x, heads * self.dim));
        let args = RopeStore {
            q: &mut q,
            k: &mut k,
            v: &v,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.dim,
            q_norm: Some(NormWeight { base: &base, norm: 1 }),
            k_norm: None,
            eps: EPS,
            rope: &RopeTable::new(CPU, 4096, self.dim, &self.inv_freq, 1.25).expect("memory"),
            layer: LAYER,
        };
        rope_store(dev, args, rows, segments, kv);
        let width = self.heads * self.dim;
        let mut out = Act::with_bytes(CPU, Dtype::F32, rows.count(), width).expect("memory");
        let (heads, threads) = (self.heads, dev.threads());
        let mut scratch = AttentionScratch::new(CPU, threads, heads, self.kv_heads, self.dim, 4096)
            .expect("memory");
        attention(dev, &q, heads, kv, LAYER, rows, 0.2, window, &mut out, &mut scratch);
        assert_bytes_in_step(dev, &out, rows.count(), &dev.name());
        (read_all(dev, &mut q), out)
    }

    /// Rotated q of a row, by the reference.
    fn want_q(&self, sequence: usize, position: usize, head: usize, replaced: bool) -> Vec<f64> {
        let at = (position * self.heads + head) * self.dim;
        let x: Vec<f64> = wide(&self.q[sequence][at..][..self.dim]);
        let weight = if replaced { &self.replaced } else { &self.norm };
        let x = rms_norm(&x, weight, f64::from(EPS));
        rotate(&x, position as u32, &self.inv_freq, 1.25)
    }

    /// Keys and values of `from..=to`, as stored.
    fn want_kv(
        &self,
        s: usize,
        head: usize,
        from: usize,
        to: usize,
    ) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let stored = |x: &[f64]| {
            let narrow: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            match self.dtype {
                KvDtype::F32 => wide(&narrow),
                KvDtype::Bf16 => wide(&rounded(Dtype::Bf16, &narrow)),
                KvDtype::Int8 => wide(&in_127_steps(&narrow)),
            }
        };
        let row =
            |x: &[f32], p: usize| wide(&x[(p * self.kv_heads + head) * self.dim..][..self.dim]);
        let key = |p| stored(&rotate(&row(&self.k[s], p), p as u32, &self.inv_freq, 1.25));
        let value = |p| stored(&row(&self.v[s], p));
        ((from..=to).map(key).collect(), (from..=to).map(value).collect())
    }

    fn check(&self, dev: &Device, window: Option<u32>) {
        self.check_rows(dev, window, &|_| true);
    }

    /// Compares the rows at the positions that are `wanted`.
    fn check_rows(&self, dev: &Device, window: Option<u32>, wanted: &dyn Fn(usize) -> bool) {
        let mut kv = self.cache();
        let all: Vec<Part> = (0..self.lengths.len())
            .map(|s| Part { sequence: s, from: 0, to: self.lengths[s] })
            .collect();
        let (q, out) = self.step(dev, &mut kv, &all, 17, window);
        // A key rotated in f32 may round to the other neighbour than one rotated in f64.
        let tolerance = match self.dtype {
            KvDtype::F32 => 2e-5,
            KvDtype::Bf16 => 4e-3,
            KvDtype::Int8 => 8e-3,
        };
        let mut t = 0;
        for (s, &length) in self.lengths.iter().enumerate() {
            for p in 0..length {
                if !wanted(p) {
                    t += 1;
                    continue;
                }
                let from = window.map_or(0, |w| (p + 1).saturating_sub(w as usize));
                for head in 0..self.heads {
                    let what = format!("{} D {} {s} {p} head {head}", dev.name(), self.dim);
                    let want_q = self.want_q(s, p, head, t < 17);
                    let got_q = &q[(t * self.heads + head) * self.dim..][..self.dim];
                    assert_close(got_q, &want_q, 2e-5, &what);
                    let group = self.heads / self.kv_heads;
                    let (keys, values) = self.want_kv(s, head / group, from, p);
                    let want = attend(&want_q, &keys, &values, 0.2);
                    let got = &out.row(t)[head * self.dim..][..self.dim];
                    assert_close(got, &want, tolerance, &what);
                }
                t += 1;
            }
        }
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn paged_attention_equals_the_f64_loop() {
    for dev in devices() {
        for dtype in KV_DTYPES {
            for (heads, kv_heads, dim) in [(6, 2, 64), (4, 4, 8), (3, 1, 80), (20, 1, 16)] {
                let world = World::new(11, dtype, heads, kv_heads, dim);
                world.check(&dev, None);
            }
        }
    }
}

#[test]
fn a_window_hides_what_lies_before_it() {
    for dev in devices() {
        for window in [1, 5, 16, 40] {
            World::new(12, Dtype::F32, 4, 2, 16).check(&dev, Some(window));
        }
    }
}

#[test]
fn a_rows_attention_has_the_same_bits_in_any_step() {
    for dtype in KV_DTYPES {
        for &isa in Isa::available() {
            let world = World::new(13, dtype, 6, 2, 64);
            let dev = Device::cpu_with(1, isa).expect("available");
            let mut kv = world.cache();
            let whole: Vec<Part> = (0..world.lengths.len())
                .map(|s| Part { sequence: s, from: 0, to: world.lengths[s] })
                .collect();
            let (_, among) = world.step(&dev, &mut kv, &whole, 0, Some(50));
            let start: usize = world.lengths[..4].iter().sum();
            for threads in [1, 2, 3] {
                let dev = Device::cpu_with(threads, isa).expect("available");
                let mut kv = world.cache();
                // Sequence 4 token by token, then in uneven chunks beside a neighbour.
                for chunks in [vec![1; 90], vec![7, 30, 53], vec![89, 1]] {
                    let mut from = 0;
                    for rows in chunks {
                        let to = from + rows;
                        let parts =
                            [Part { sequence: 2, from: 0, to: 3 }, Part { sequence: 4, from, to }];
                        let (_, out) = world.step(&dev, &mut kv, &parts, 0, Some(50));
                        for p in from..to {
                            let got = bits(out.row(3 + p - from));
                            assert_eq!(got, bits(among.row(start + p)), "{} {p}", dev.name());
                        }
                        from = to;
                    }
                }
            }
        }
    }
}

/// Around the borders of the parts that a long context is computed in.
const BORDERS: [usize; 9] = [0, 63, 1022, 1023, 1024, 1025, 2047, 2048, 2099];

#[test]
fn long_contexts_equal_the_f64_loop() {
    for dtype in KV_DTYPES {
        for window in [None, Some(1030)] {
            let world = World::of(21, dtype, 4, 2, 16, &[2100, 5, 1030]);
            for dev in devices() {
                world.check_rows(&dev, window, &|p| BORDERS.contains(&p));
            }
        }
    }
}

#[test]
fn a_long_contexts_bits_are_the_same_in_parts_and_whole() {
    for dtype in KV_DTYPES {
        for window in [None, Some(1030)] {
            let world = World::of(22, dtype, 6, 2, 16, &[2100, 1030]);
            let alone = Device::cpu(1);
            let mut kv = world.cache();
            let whole = [0, 1].map(|s| Part { sequence: s, from: 0, to: world.lengths[s] });
            let (_, among) = world.step(&alone, &mut kv, &whole, 0, window);
            for threads in [1, 2, 5] {
                let dev = Device::cpu(threads);
                for p in BORDERS {
                    let long = Part { sequence: 0, from: p, to: p + 1 };
                    let short = Part { sequence: 1, from: 1029, to: 1030 };
                    let (_, out) = world.step(&dev, &mut kv, &[long, short], 0, window);
                    let what = format!("{} {dtype:?} {window:?} {p}", dev.name());
                    assert_eq!(bits(out.row(0)), bits(among.row(p)), "{what}");
                    assert_eq!(bits(out.row(1)), bits(among.row(2100 + 1029)), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_an_int8_token_too() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut world = World::of(23, KvDtype::Int8, 2, 1, 16, &[3]);
        world.v[0][16] = bad;
        let mut kv = world.cache();
        let all = [Part { sequence: 0, from: 0, to: 3 }];
        let (_, out) = world.step(&Device::cpu(1), &mut kv, &all, 0, None);
        assert!(out.row(0).iter().all(|x| x.is_finite()), "the token before it");
        assert!(out.row(1).iter().chain(out.row(2)).all(|x| x.is_nan()), "it and the one after");
    }
}

/// Two tokens share a word of V: what lies beside the last one is not multiplied.
#[test]
fn what_a_page_held_before_changes_no_bit() {
    for dtype in KV_DTYPES {
        for window in [None, Some(6)] {
            let world = World::of(24, dtype, 4, 2, 24, &[37]);
            let mut before = World::of(25, dtype, 4, 2, 24, &[37]);
            before.pages.clone_from(&world.pages);
            for values in before.k.iter_mut().chain(&mut before.v) {
                values.fill(f32::NAN);
            }
            for dev in devices() {
                let (mut fresh, mut used) = (world.cache(), world.cache());
                before.step(&dev, &mut used, &[Part { sequence: 0, from: 0, to: 37 }], 0, None);
                for to in 1..=37 {
                    let row = [Part { sequence: 0, from: to - 1, to }];
                    let (_, want) = world.step(&dev, &mut fresh, &row, 0, window);
                    let (_, got) = world.step(&dev, &mut used, &row, 0, window);
                    let what = format!("{} {dtype:?} {window:?} {to}", dev.name());
                    assert!(want.row(0).iter().all(|x| x.is_finite()), "{what}");
                    assert_eq!(bits(got.row(0)), bits(want.row(0)), "{what}");
                }
            }
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn page_bytes_times_pages_is_what_a_cache_holds() {
    for dtype in KV_DTYPES {
        for (heads, dim) in [(3, 64), (1, 8), (2, 80)] {
            let kv = KvCache::new(CPU, dtype, 5, 7, heads, dim).expect("memory");
            assert_eq!(kv.bytes(), 7 * KvCache::page_bytes(dtype, 5, heads, dim));
        }
    }
}

#[test]
#[should_panic(expected = "row 0: position 16 beyond its 1 pages")]
fn a_position_beyond_its_pages_is_refused() {
    let kv = KvCache::new(CPU, Dtype::F32, 1, 1, 1, 16).expect("memory");
    let rows = Rows { positions: &[16], sequences: &[0], pages: &[0], page_indptr: &[0, 1] };
    let mut out = Act::new(CPU, Dtype::F32, 1, 16).expect("memory");
    let dev = Device::cpu(1);
    let mut scratch = AttentionScratch::new(CPU, dev.threads(), 1, 1, 16, 16).expect("memory");
    let q = plane(&[0.0; 16], 16);
    attention(&dev, &q, 1, &kv, 0, rows, 1.0, None, &mut out, &mut scratch);
}
