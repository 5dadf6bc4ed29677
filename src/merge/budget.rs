//! One budget of ranks, spread over sites by how many they need.
//!
//! Owns the shares and their rounding. Never measures a site. The thing to know: every site gets at
//! least one rank and never more than it can use, and the budget is spent to the last rank.

/// Ranks of the sites: together `rank_mean` a site, in proportion to `needs`, each from 1 to its
/// entry of `most`.
pub fn spread(rank_mean: usize, needs: &[f64], most: &[usize]) -> Vec<usize> {
    let n = needs.len();
    let budget = (rank_mean * n).min(most.iter().sum()).max(n);
    // What all ask for together, times `level`, is the budget: found by halving.
    let wish = |i: usize, level: f64| (needs[i].max(0.0) * level).clamp(1.0, most[i] as f64);
    let asked = |level: f64| (0..n).map(|i| wish(i, level)).sum::<f64>();
    let (mut low, mut high) = (0.0, 1.0);
    while asked(high) < budget as f64 && high < 1e12 {
        high *= 2.0;
    }
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if asked(middle) < budget as f64 { low = middle } else { high = middle }
    }
    let wishes: Vec<f64> = (0..n).map(|i| wish(i, high)).collect();
    let mut ranks: Vec<usize> = wishes.iter().map(|w| *w as usize).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| (wishes[*j].fract()).total_cmp(&wishes[*i].fract()).then(i.cmp(j)));
    let mut left = budget.saturating_sub(ranks.iter().sum());
    while left > 0 {
        for i in &order {
            if left > 0 && ranks[*i] < most[*i] {
                ranks[*i] += 1;
                left -= 1;
            }
        }
    }
    ranks
}
