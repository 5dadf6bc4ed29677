//! How much a result changes the base: norms and ranks of its sites.
//!
//! Owns these figures. Never decides by them: they are in the report for people. The thing to know:
//! of DoRA they are of the factors' product alone, and directions that the base does not have
//! (intruder dimensions) are not looked for: that takes the singular vectors of every base matrix.

use super::means::Means;
use crate::adapters::format::factors::{FactorDims, FactorSite, OpenAdapter};
use crate::error::Result;
use crate::merge::report::{effective_rank, singular_values};
use serde_json::{Value, json};

/// The figures, site by site.
pub struct Change<'a> {
    adapter: &'a OpenAdapter,
    means: &'a Means,
    sites: Vec<Value>,
    /// Sums of squares of all sites: of the change, and of the base.
    squares: [f64; 2],
    /// Σ effective rank · ‖ΔW‖².
    ranks: f64,
}

impl<'a> Change<'a> {
    pub fn new(adapter: &'a OpenAdapter, means: &'a Means) -> Self {
        Self { adapter, means, sites: Vec::new(), squares: [0.0; 2], ranks: 0.0 }
    }

    /// The next site; false: there is none. Blocking.
    pub fn step(&mut self) -> Result<bool> {
        let Some((site, dims)) = self.adapter.modules().get(self.sites.len()) else {
            return Ok(false);
        };
        let Some(factors) = self.adapter.read(*site)? else { return Ok(false) };
        let values = singular_values(&factors)?;
        let square: f64 = values.iter().map(|v| v * v).sum();
        let base = match site {
            FactorSite::Site(site) => {
                let weights = &self.means.weights;
                square_norm(dims, |row, out| weights.read_row(*site, row, out))
            }
            FactorSite::Embedding => 0.0,
        };
        let rank = effective_rank(&values);
        self.ranks += rank * square;
        self.squares = [self.squares[0] + square, self.squares[1] + base];
        self.sites.push(json!({
            "site": site.path(),
            "rank": dims.rank,
            "effective_rank": rank,
            "norm": square.sqrt(),
            "base_norm": base.sqrt(),
            "relative_norm": relative(square, base),
        }));
        Ok(true)
    }

    /// All of it.
    pub fn report(self) -> Value {
        let [square, base] = self.squares;
        json!({
            "norm": square.sqrt(),
            "base_norm": base.sqrt(),
            "relative_norm": relative(square, base),
            // The mean over sites, weighted by ‖ΔW‖², as in the reports of merges.
            "effective_rank": if square > 0.0 { self.ranks / square } else { 0.0 },
            "sites": self.sites,
        })
    }
}

/// ‖W‖² of a site whose rows are read so.
fn square_norm(dims: &FactorDims, read_row: impl Fn(usize, &mut [f32])) -> f64 {
    let mut row = vec![0.0_f32; dims.inputs];
    let mut sum = 0.0;
    for output in 0..dims.outputs {
        read_row(output, &mut row);
        sum += row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    }
    sum
}

/// ‖ΔW‖ / ‖W‖, where there is a W.
fn relative(square: f64, base: f64) -> Option<f64> {
    (base > 0.0).then(|| (square / base).sqrt())
}
