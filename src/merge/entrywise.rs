//! Merges entry by entry: keep some entries of each source, then add them, by PEFT's rules.
//!
//! Owns pruning, dropping, the election of signs and the sums. Never knows what the entries are: A,
//! B or their product. The thing to know: PEFT chooses entries and elects signs before it applies
//! the weights, and so does this.

use super::select::largest;
use super::spec::{Election, Options, Rule};
use crate::random::Stream;

/// The sources' tensors of one shape, as one flat vector each.
pub struct Tasks {
    pub tensors: Vec<Vec<f32>>,
    /// One a tensor.
    pub weights: Vec<f64>,
    /// One a tensor; says which entries DARE drops.
    pub streams: Vec<Stream>,
}

impl Tasks {
    /// The merged tensor.
    pub fn merged(mut self, rule: Rule, options: &Options) -> Vec<f32> {
        for (tensor, stream) in self.tensors.iter_mut().zip(&mut self.streams) {
            match rule {
                Rule::Sum => {}
                Rule::Prune | Rule::Ties => keep_largest(tensor, options.density),
                Rule::DareSum | Rule::DareTies => drop_random(tensor, options.density, stream),
                Rule::Crumbs => keep_middle(tensor, options.density, options.outliers),
            }
        }
        match rule {
            Rule::Ties | Rule::DareTies => self.disjoint_mean(options.election),
            _ => self.sum(),
        }
    }

    fn sum(&self) -> Vec<f32> {
        let mut out = vec![0.0f32; self.tensors[0].len()];
        for (tensor, weight) in self.tensors.iter().zip(&self.weights) {
            let weight = *weight as f32;
            out.iter_mut().zip(tensor).for_each(|(o, v)| *o += weight * v);
        }
        out
    }

    /// The weighted mean of the values that have the elected sign; zeros have none.
    fn disjoint_mean(&self, election: Election) -> Vec<f32> {
        let weights: Vec<f32> = self.weights.iter().map(|w| *w as f32).collect();
        let sign = |v: f32| if v == 0.0 { 0.0 } else { v.signum() };
        let entry = |e: usize| {
            let values = || self.tensors.iter().map(|t| t[e]);
            let votes: f32 = match election {
                Election::Total => values().sum(),
                Election::Frequency => values().map(sign).sum(),
            };
            let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
            let mut sum = 0.0f32;
            let mut count = 0u32;
            for (v, w) in values().zip(&weights).filter(|(v, _)| sign(*v) == elected) {
                sum += v * w;
                count += 1;
            }
            sum / count.max(1) as f32
        };
        (0..self.tensors[0].len()).map(entry).collect()
    }
}

/// Zeroes all but the ⌊density · n⌋ entries of largest magnitude.
fn keep_largest(tensor: &mut [f32], density: f64) {
    let kept = largest(tensor, (density * tensor.len() as f64) as usize);
    tensor.iter_mut().zip(kept).filter(|(_, kept)| !kept).for_each(|(v, _)| *v = 0.0);
}

/// Zeroes the ⌊outliers · n⌋ largest entries and all below the ⌊density · n⌋ next ones.
fn keep_middle(tensor: &mut [f32], density: f64, outliers: f64) {
    let n = tensor.len() as f64;
    let dropped = (outliers * n) as usize;
    let outliers = largest(tensor, dropped);
    let kept = largest(tensor, dropped + (density * n) as usize);
    for (v, (outlier, kept)) in tensor.iter_mut().zip(outliers.into_iter().zip(kept)) {
        if outlier || !kept {
            *v = 0.0;
        }
    }
}

/// Keeps each entry with probability `density` and divides it by that: the mean stays.
fn drop_random(tensor: &mut [f32], density: f64, stream: &mut Stream) {
    if density >= 1.0 {
        return;
    }
    for v in tensor {
        *v = if stream.unit() < density { (f64::from(*v) / density) as f32 } else { 0.0 };
    }
}
