//! k-means over points that are known only by their inner products.
//!
//! Owns k-means++, Lloyd's rounds and restarts. Never sees a coordinate: a centroid is a mean of
//! members, so its distances follow from the Gram matrix, and the cost does not depend on how long
//! the points are. The thing to know: mirrored clustering takes x and −x as one point and gives
//! each member the sign that turns it towards its centroid.

use crate::random::Stream;
use faer::Mat;

/// Rounds after which a clustering that still moves is taken as it is.
const ROUNDS_MAX: usize = 100;

/// Which points belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct Clustering {
    /// Members of each cluster in ascending order with their signs; clusters by first member; none
    /// is empty.
    pub clusters: Vec<Vec<(usize, f64)>>,
    /// Sum of squared distances to the centroids.
    pub inertia: f64,
}

/// What is clustered.
pub struct Points {
    /// `[N, N]`
    pub gram: Mat<f64>,
    /// x and −x are one point.
    pub mirrored: bool,
}

/// One state of Lloyd's algorithm.
struct State {
    of: Vec<usize>,
    signs: Vec<f64>,
    /// To the own centroid.
    distances: Vec<f64>,
}

impl Points {
    fn len(&self) -> usize {
        self.gram.nrows()
    }

    /// The best of `restarts` clusterings into at most `k`; fewer where points coincide. `seed`
    /// decides everything.
    pub fn clustered(&self, k: usize, restarts: usize, seed: &[u64]) -> Clustering {
        let n = self.len();
        if k >= n {
            return Clustering { clusters: (0..n).map(|i| vec![(i, 1.0)]).collect(), inertia: 0.0 };
        }
        let mut best: Option<(f64, State)> = None;
        for restart in 0..restarts {
            let words: Vec<u64> = seed.iter().copied().chain([restart as u64]).collect();
            let mut state = self.start(k, &mut Stream::new(&words));
            for _ in 0..ROUNDS_MAX {
                if !self.round(k, &mut state) {
                    break;
                }
            }
            let inertia = state.distances.iter().sum();
            if best.as_ref().is_none_or(|(least, _)| inertia < *least) {
                best = Some((inertia, state));
            }
        }
        let (inertia, state) = best.expect("at least one start");
        let mut clusters = vec![Vec::new(); k];
        for (i, (of, sign)) in state.of.iter().zip(&state.signs).enumerate() {
            clusters[*of].push((i, *sign));
        }
        clusters.retain(|c| !c.is_empty());
        // A cluster's own sign is free; its first member has +1.
        for cluster in &mut clusters {
            let first = cluster[0].1;
            cluster.iter_mut().for_each(|(_, sign)| *sign *= first);
        }
        clusters.sort_by_key(|c| c[0].0);
        Clustering { clusters, inertia }
    }

    /// (distance², sign) of point i to something with this inner product and squared norm.
    fn distance(&self, i: usize, product: f64, square: f64) -> (f64, f64) {
        let sign = if self.mirrored && product < 0.0 { -1.0 } else { 1.0 };
        ((self.gram[(i, i)] + square - 2.0 * sign * product).max(0.0), sign)
    }

    /// k-means++: every further centre is a point drawn with probability ∝ its squared distance to
    /// the nearest one.
    fn start(&self, k: usize, stream: &mut Stream) -> State {
        let n = self.len();
        let mut state =
            State { of: vec![0; n], signs: vec![1.0; n], distances: vec![f64::INFINITY; n] };
        let mut centre = (stream.unit() * n as f64) as usize;
        for c in 0..k {
            for i in 0..n {
                let square = self.gram[(centre, centre)];
                let (distance, sign) = self.distance(i, self.gram[(i, centre)], square);
                if distance < state.distances[i] {
                    (state.of[i], state.signs[i], state.distances[i]) = (c, sign, distance);
                }
            }
            let total: f64 = state.distances.iter().sum();
            let mut left = stream.unit() * total;
            let next = state.distances.iter().position(|d| {
                left -= d;
                left < 0.0
            });
            match next {
                Some(next) => centre = next,
                None => break, // every point is a centre or equals one
            }
        }
        state
    }

    /// New centroids, then every point to its nearest. False when nothing moved.
    fn round(&self, k: usize, state: &mut State) -> bool {
        let n = self.len();
        let mut sizes = vec![0usize; k];
        state.of.iter().for_each(|c| sizes[*c] += 1);
        // ⟨x_i, centroid of c⟩
        let mut products = Mat::<f64>::zeros(n, k);
        for j in 0..n {
            let (c, share) = (state.of[j], state.signs[j] / sizes[state.of[j]] as f64);
            for i in 0..n {
                products[(i, c)] += share * self.gram[(i, j)];
            }
        }
        let mut squares = vec![0.0; k];
        for j in 0..n {
            let c = state.of[j];
            squares[c] += state.signs[j] * products[(j, c)] / sizes[c] as f64;
        }
        let mut moved = false;
        for i in 0..n {
            let mut nearest = (f64::INFINITY, 1.0, state.of[i]);
            for c in (0..k).filter(|c| sizes[*c] > 0) {
                let (distance, sign) = self.distance(i, products[(i, c)], squares[c]);
                if distance < nearest.0 {
                    nearest = (distance, sign, c);
                }
            }
            let (distance, sign, c) = nearest;
            moved |= c != state.of[i] || sign != state.signs[i];
            (state.of[i], state.signs[i], state.distances[i]) = (c, sign, distance);
        }
        moved | self.fill_empty(k, state)
    }

    /// Gives an empty cluster the point that is farthest from its own centroid.
    fn fill_empty(&self, k: usize, state: &mut State) -> bool {
        let mut filled = false;
        for c in 0..k {
            if state.of.contains(&c) {
                continue;
            }
            let far = |i: &usize, j: &usize| state.distances[*i].total_cmp(&state.distances[*j]);
            let farthest = (0..self.len()).max_by(far).expect("more points than clusters");
            if state.distances[farthest] <= 1e-12 * self.gram[(farthest, farthest)] {
                break; // points coincide: fewer clusters say the same
            }
            (state.of[farthest], state.signs[farthest], state.distances[farthest]) = (c, 1.0, 0.0);
            filled = true;
        }
        filled
    }
}
