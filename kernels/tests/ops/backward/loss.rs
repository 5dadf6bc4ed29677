//! Cross-entropy, and the head's rows in chunks.

use super::{Seen, act_for, act_of, assert_near, bits, rows_of, wide};
use crate::common::{CPU, Rng, devices, plane, read_all, scratch};
use polylora_kernels::reference::{log_prob, log_prob_backward};
use polylora_kernels::{
    Accumulate, Device, Dtype, Linear, LinearBackward, Matrix, Scored, Segments,
    cross_entropy_backward, linear, linear_backward, score,
};

fn run(dev: &Device, logits: &[f32], targets: &[u32], k: &[f32]) -> (Vec<f32>, Vec<Scored>) {
    let (rows, width) = (targets.len(), logits.len() / targets.len());
    let mut dlogits = act_for(rows, width);
    let mut scored = vec![Scored::default(); rows];
    let logits = plane(logits, width);
    cross_entropy_backward(dev, &logits, targets, k, &mut dlogits, &mut scored);
    let mut only = vec![Scored::default(); rows];
    score(dev, &logits, targets, &mut only);
    let both = only.iter().zip(&scored);
    let same = |(a, b): (&Scored, &Scored)| {
        a.log_prob.to_bits() == b.log_prob.to_bits() && a.is_greatest == b.is_greatest
    };
    assert!({ both }.all(same), "{}: scored alone", dev.name());
    (rows_of(&dlogits, rows), scored)
}

#[test]
fn log_probabilities_and_gradients_equal_the_f64_loop() {
    let mut seen = Seen::default();
    for dev in devices() {
        let mut rng = Rng(107);
        for (rows, width) in [(1, 1), (3, 7), (5, 130), (4, 5000)] {
            let mut logits: Vec<f32> = (0..rows * width).map(|_| 8.0 * rng.value()).collect();
            let targets: Vec<u32> = (0..rows).map(|_| rng.below(width) as u32).collect();
            let k = rng.values(rows);
            // The first row's target is the greatest, the last row's never.
            logits[targets[0] as usize] = 9.0;
            let (got, scored) = run(&dev, &logits, &targets, &k);
            seen.same(&dev, &format!("{width}"), &got);
            for t in 0..rows {
                let what = format!("{} row {t} of {width}", dev.name());
                let row = wide(&logits[t * width..][..width]);
                let target = targets[t] as usize;
                let want = log_prob(&row, target);
                let off = (f64::from(scored[t].log_prob) - want).abs();
                assert!(off <= 1e-6 * (1.0 + want.abs()), "{what}: {off:e}");
                let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert_eq!(scored[t].is_greatest, row[target] == most, "{what}");
                let want: Vec<f64> =
                    log_prob_backward(&row, target).iter().map(|d| f64::from(k[t]) * d).collect();
                // Against the coefficient: where the target is sure, all of it is small.
                let most = f64::from(k[t].abs());
                for (got, want) in got[t * width..][..width].iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() <= 1e-5 * most, "{what}: {got} {want}");
                }
                let alone = run(&dev, &logits[t * width..][..width], &targets[t..=t], &k[t..=t]);
                assert!(bits(&alone.0) == bits(&got[t * width..][..width]), "{what}: alone");
                assert_eq!(alone.1[0], scored[t], "{what}: alone");
            }
        }
    }
}

#[test]
fn what_is_no_number_is_told_by_the_row_that_has_it() {
    for dev in devices() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 3 * 40];
            logits[40 + 17] = bad;
            let (dlogits, scored) = run(&dev, &logits, &[1, 2, 3], &[1.0; 3]);
            assert!(scored[1].log_prob.is_nan() && !scored[1].is_greatest, "{}", dev.name());
            assert!(dlogits[40..80].iter().all(|d| d.is_nan()), "{}", dev.name());
            for t in [0, 2] {
                assert!(scored[t].log_prob.is_finite(), "{}", dev.name());
                assert!(dlogits[t * 40..][..40].iter().all(|d| d.is_finite()), "{}", dev.name());
            }
        }
    }
}

/// h to loss and back through a head, in chunks of `chunk` rows: dh, and the loss.
fn head(dev: &Device, head: &Matrix, h: &[f32], targets: &[u32], k: &[f32], chunk: usize) -> Head {
    let (vocab, hidden) = (head.outputs(), head.inputs());
    let (mut logits, mut dlogits) =
        (plane(&vec![0.0; chunk * vocab], vocab), act_for(chunk, vocab));
    let mut made = Head { dh: Vec::new(), loss: 0.0 };
    let mut lora = scratch(chunk, 1);
    for start in (0..targets.len()).step_by(chunk) {
        let end = targets.len().min(start + chunk);
        let x = act_of(&h[start * hidden..end * hidden], hidden);
        let outs = &mut [Linear { weight: head, bias: None, site: 0, y: &mut logits }];
        linear(dev, &x, end - start, outs, Segments::none(), &mut lora);
        let (targets, k) = (&targets[start..end], &k[start..end]);
        let mut scored = vec![Scored::default(); end - start];
        cross_entropy_backward(dev, &logits, targets, k, &mut dlogits, &mut scored);
        let mut dh = plane(&vec![f32::NAN; (end - start) * hidden], hidden);
        let sites = [LinearBackward { weight: head, dy: &dlogits }];
        linear_backward(dev, &sites, end - start, &mut dh, Accumulate::Overwrite);
        made.dh.extend(read_all(dev, &mut dh));
        let terms = scored.iter().zip(k).map(|(row, &k)| f64::from(k) * f64::from(row.log_prob));
        made.loss -= terms.sum::<f64>();
    }
    made
}

struct Head {
    dh: Vec<f32>,
    loss: f64,
}

#[test]
fn a_head_in_chunks_gives_the_gradient_of_the_mean_loss_and_the_same_bits() {
    let (vocab, hidden, rows) = (301, 37, 21);
    let mut rng = Rng(108);
    let w = rng.values(vocab * hidden);
    let h = rng.values(rows * hidden);
    let targets: Vec<u32> = (0..rows).map(|_| rng.below(vocab) as u32).collect();
    let k = vec![1.0 / rows as f32; rows];
    let weight = Matrix::from_f32(CPU, Dtype::F32, vocab, hidden, &w).expect("memory");
    let loss = |h: &[f64], t: usize| {
        let of = |w: &[f32]| w.iter().zip(h).map(|(&w, h)| f64::from(w) * h).sum::<f64>();
        let logits: Vec<f64> = w.chunks(hidden).map(of).collect();
        -log_prob(&logits, targets[t] as usize) / rows as f64
    };
    for dev in devices() {
        let made = head(&dev, &weight, &h, &targets, &k, 4);
        let want: f64 = (0..rows).map(|t| loss(&wide(&h[t * hidden..][..hidden]), t)).sum();
        assert!((made.loss / want - 1.0).abs() < 1e-6, "{}: {} {want}", dev.name(), made.loss);
        for t in 0..rows {
            let at = t * hidden..(t + 1) * hidden;
            let x = wide(&h[at.clone()]);
            let slope = |i: usize| {
                let moved = |by: f64| {
                    let mut x = x.clone();
                    x[i] += by;
                    loss(&x, t)
                };
                (moved(1e-5) - moved(-1e-5)) / 2e-5
            };
            let want: Vec<f64> = (0..hidden).map(slope).collect();
            assert_near(&made.dh[at], &want, 1e-5, &format!("{} row {t}", dev.name()));
        }
        let other = head(&dev, &weight, &h, &targets, &k, 9);
        assert!(bits(&other.dh) == bits(&made.dh), "{}: chunks of 9", dev.name());
    }
}
