//! Adapters into one: the algebra, without files and without a server.
//!
//! Owns what a merge is and its state while it runs. Never reads or writes: factors come in through
//! a closure, the result goes out as factors with a report. The thing to know: a merge is advanced
//! a few sites at a time, sites do not know each other, and the same spec, factors and seed give
//! the same bits whatever the steps were.

mod budget;
mod cluster;
pub mod compatibility;
mod entrywise;
mod leading;
mod lego;
pub mod picture;
pub mod report;
mod select;
mod site;
pub mod spec;
mod stack;

use crate::adapters::format::config::RANK_MAX;
use crate::adapters::format::factors::{FactorDims, FactorSite, ModuleFactors, OpenAdapter};
use crate::error::{Error, Result};
use compatibility::{Compatibility, CompatibilityReport, SiteCompatibility};
use report::{Overall, Report, Survey};
use site::{MergedSite, Order};
use spec::{Method, Spec, refuse};
use stack::{Part, Stack};
use std::collections::BTreeMap;

/// Most ranks of all sources at one site: beyond it the small core is no longer small.
const UNITS_MAX: usize = 4096;

/// Reads what a source (by number) has at a site; called in the order of sites.
pub type Reader<'a> = dyn FnMut(usize, FactorSite) -> Result<Option<ModuleFactors>> + 'a;

/// A merge under way.
pub struct Merge {
    spec: Spec,
    sites: Vec<SitePlan>,
    /// One a site, as far as it was surveyed.
    surveys: Vec<Survey>,
    /// Whether sites are surveyed before the first is merged.
    survey_first: bool,
    done: Vec<MergedSite>,
}

/// What is known of a site from the headers.
struct SitePlan {
    site: FactorSite,
    dims: FactorDims,
    /// Rank of the result: given, or the largest that the site can use.
    rank: usize,
    /// Ranks of all sources that meet here.
    units: usize,
}

/// How far a merge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub done: usize,
    pub total: usize,
}

/// The result.
pub struct Merged {
    pub modules: BTreeMap<FactorSite, ModuleFactors>,
    pub report: Report,
}

/// Refuses what no method here can merge. Errors: `not_mergeable`.
pub fn check_source(name: &str, adapter: &OpenAdapter) -> Result<()> {
    match adapter.beyond_factors() {
        None => Ok(()),
        Some(what) => Err(Error::unprocessable(
            "not_mergeable",
            format!(
                "{name} holds {what}: merging adds products of two factors, and this is not one. \
                 Train without it; of such parts, a sum at request time takes biases alone"
            ),
        )),
    }
}

/// Refuses sources that name different base models. Errors: `base_mismatch`.
pub fn check_bases(named: &[(&str, Option<&str>)]) -> Result<()> {
    let mut known = named.iter().filter_map(|(source, base)| Some((*source, (*base)?)));
    let Some((first, base)) = known.next() else {
        return Ok(());
    };
    match known.find(|(_, other)| *other != base) {
        None => Ok(()),
        Some((second, other)) => Err(Error::unprocessable(
            "base_mismatch",
            format!("{first} was trained on `{base}`, {second} on `{other}`"),
        )),
    }
}

/// Refuses sources that cannot be merged with each other: `any_base` lets those through that only
/// name different bases. Returns the name of the base that the result states. Errors:
/// `not_mergeable`, `base_mismatch`.
pub fn check_sources(
    spec: &Spec,
    adapters: &[OpenAdapter],
    any_base: bool,
) -> Result<Option<String>> {
    let base = |a: &OpenAdapter| a.summary().base_model.clone();
    for (source, adapter) in spec.sources.iter().zip(adapters) {
        check_source(&source.name, adapter)?;
    }
    if !any_base {
        let all: Vec<Option<String>> = adapters.iter().map(base).collect();
        let named = spec.sources.iter().zip(&all);
        let named: Vec<(&str, Option<&str>)> =
            named.map(|(s, b)| (s.name.as_str(), b.as_deref())).collect();
        check_bases(&named)?;
    }
    Ok(adapters.iter().find_map(base))
}

impl Merge {
    /// Plans a merge; `modules` has one list a source, in the order of the spec. Errors:
    /// `invalid_merge`, `base_mismatch`, `ranks_differ`, `rank_out_of_range`.
    pub fn new(spec: Spec, modules: &[&[(FactorSite, FactorDims)]]) -> Result<Self> {
        spec.check()?;
        if modules.len() != spec.sources.len() {
            return Err(refuse("every source needs its modules"));
        }
        let mut at: BTreeMap<FactorSite, Vec<(usize, FactorDims)>> = BTreeMap::new();
        for (source, list) in modules.iter().enumerate() {
            for (site, dims) in *list {
                at.entry(*site).or_default().push((source, *dims));
            }
        }
        let largest = at.values().flatten().map(|(_, d)| d.rank).max().unwrap_or(0);
        let sites = at
            .into_iter()
            .map(|(site, parts)| plan(&spec, site, &parts, largest))
            .collect::<Result<Vec<_>>>()?;
        if sites.is_empty() {
            return Err(refuse("the sources hold no factors"));
        }
        let survey_first = spec.options.spread;
        Ok(Self { spec, sites, surveys: Vec::new(), survey_first, done: Vec::new() })
    }

    pub fn progress(&self) -> Progress {
        let (seen, phases) = if self.survey_first { (self.surveys.len(), 2) } else { (0, 1) };
        Progress { done: seen + self.done.len(), total: self.sites.len() * phases }
    }

    /// Numbers that the result will hold, as planned.
    pub fn parameters(&self) -> usize {
        self.sites.iter().map(|s| s.rank * (s.dims.inputs + s.dims.outputs)).sum()
    }

    /// How many units LEGO's clustering will compare with centroids, once each in every start; 0
    /// for other methods, whose work the sources alone decide.
    pub fn comparisons(&self) -> u64 {
        let starts = match self.spec.method {
            Method::Lego => self.spec.options.restarts as u64,
            _ => 0,
        };
        starts * self.sites.iter().map(|s| (s.units * s.rank) as u64).sum::<u64>()
    }

    /// Looks at up to `sites` more sites without merging them. Progress is in sites looked at.
    pub fn look(&mut self, sites: usize, read: &mut Reader<'_>) -> Result<Progress> {
        let count = self.spec.sources.len();
        let surveys = self.each(self.surveys.len(), sites, read, |_, parts| {
            report::survey(&Stack::new(parts), parts, count)
        })?;
        self.surveys.extend(surveys);
        let progress = Progress { done: self.surveys.len(), total: self.sites.len() };
        if self.survey_first && progress.done == progress.total {
            self.spread();
        }
        Ok(progress)
    }

    /// What was seen of the sites looked at.
    pub fn compatibility(self) -> CompatibilityReport {
        let seen = self.sites.iter().zip(self.surveys);
        let sites: Vec<_> = seen
            .map(|(p, survey)| SiteCompatibility::new(p.site, p.dims, p.rank, survey))
            .collect();
        CompatibilityReport { spec: self.spec, overall: Compatibility::of(sites.iter()), sites }
    }

    /// Advances by up to `sites` sites, each on a thread of its own. Errors leave the merge as it
    /// was before the step.
    pub fn step(&mut self, sites: usize, read: &mut Reader<'_>) -> Result<Progress> {
        if self.survey_first && self.surveys.len() < self.sites.len() {
            self.look(sites, read)?;
        } else {
            let merged = self.each(self.done.len(), sites, read, |plan, parts| {
                let order = Order { spec: &self.spec, site: plan.site, rank: plan.rank };
                site::merge(&order, parts)
            })?;
            self.done.extend(merged);
        }
        Ok(self.progress())
    }

    /// Runs `work` on up to `count` sites from `first` on; results in the order of sites.
    fn each<T: Send>(
        &self,
        first: usize,
        count: usize,
        read: &mut Reader<'_>,
        work: impl Fn(&SitePlan, &[Part<'_>]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let plans = &self.sites[first..self.sites.len().min(first + count)];
        let mut inputs = Vec::with_capacity(plans.len());
        for plan in plans {
            let mut factors = Vec::new();
            for source in 0..self.spec.sources.len() {
                let read = read(source, plan.site)?;
                factors.extend(read.map(|f| (source, f)));
            }
            inputs.push((plan, factors));
        }
        let one = |(plan, factors): &(&SitePlan, Vec<(usize, ModuleFactors)>)| {
            let parts: Vec<Part<'_>> = factors
                .iter()
                .map(|(source, factors)| Part {
                    source: *source,
                    weight: self.spec.sources[*source].weight,
                    factors,
                })
                .collect();
            work(plan, &parts)
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = inputs.iter().map(|i| scope.spawn(|| one(i))).collect();
            running
                .into_iter()
                .map(|t| t.join().map_err(|_| Error::fault("a merging thread panicked"))?)
                .collect()
        })
    }

    /// Gives the budget of ranks to the sites that need them.
    fn spread(&mut self) {
        let needs: Vec<f64> = self.surveys.iter().map(|s| s.effective_rank_exact).collect();
        let most: Vec<usize> = self
            .sites
            .iter()
            .zip(&self.surveys)
            .map(|(site, s)| usable(self.spec.method, site.dims, s.source_ranks.iter().sum()))
            .collect();
        let mean = self.spec.options.rank.expect("checked: spread comes with a rank");
        let ranks = budget::spread(mean, &needs, &most);
        self.sites.iter_mut().zip(ranks).for_each(|(site, rank)| site.rank = rank);
    }

    /// The result, once every site is merged. Errors: `internal_error` before that.
    pub fn finish(self) -> Result<Merged> {
        let Progress { done, total } = self.progress();
        if done < total {
            return Err(Error::fault(format!("{done} of {total} sites are merged")));
        }
        let mut modules = BTreeMap::new();
        let mut sites = Vec::with_capacity(self.done.len());
        for (plan, merged) in self.sites.iter().zip(self.done) {
            modules.insert(plan.site, merged.factors);
            sites.push(merged.report);
        }
        let overall = Overall::of(&sites);
        Ok(Merged { modules, report: Report { spec: self.spec, overall, sites } })
    }
}

/// Most ranks that make a difference at a site: of LEGO all units, whatever the matrix; of a
/// truncation the matrix's own; of masked products more than the sources had.
fn usable(method: Method, dims: FactorDims, ranks: usize) -> usize {
    let own = dims.inputs.min(dims.outputs);
    let most = match (method, method.entrywise()) {
        (Method::Lego, _) => ranks,
        (_, Some(_)) => own,
        _ => ranks.min(own),
    };
    most.min(RANK_MAX)
}

fn plan(
    spec: &Spec,
    site: FactorSite,
    parts: &[(usize, FactorDims)],
    largest: usize,
) -> Result<SitePlan> {
    let (first, dims) = parts[0];
    let name = |source: usize| &spec.sources[source].name;
    for (source, other) in &parts[1..] {
        if (other.inputs, other.outputs) != (dims.inputs, dims.outputs) {
            return Err(Error::unprocessable(
                "base_mismatch",
                format!(
                    "`{}` is {} × {} in {} and {} × {} in {}",
                    site.path(),
                    dims.outputs,
                    dims.inputs,
                    name(first),
                    other.outputs,
                    other.inputs,
                    name(*source)
                ),
            ));
        }
    }
    let ranks: usize = parts.iter().map(|(_, d)| d.rank).sum();
    let too_many = |limit: usize, hint: &str| {
        let message = format!("{ranks} ranks meet at `{}`, more than {limit}: {hint}", site.path());
        Err(Error::unprocessable("rank_out_of_range", message))
    };
    if ranks > UNITS_MAX {
        return too_many(UNITS_MAX, "merge in two rounds");
    }
    if spec.method == Method::Cat && ranks > RANK_MAX {
        return too_many(RANK_MAX, "svd or lego make fewer of them");
    }
    let wanted = spec.options.rank.unwrap_or(largest);
    let rank = wanted.min(usable(spec.method, dims, ranks));
    Ok(SitePlan { site, dims, rank, units: ranks })
}
