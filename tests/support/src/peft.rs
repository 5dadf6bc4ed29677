//! What PEFT's arguments of a merge mean here.

use polylora::merge::spec::{Election, Method, Options, Source, Spec};
use serde_json::Value;

/// The spec that PEFT's arguments amount to.
pub fn spec(kwargs: &Value) -> Spec {
    let text = |key: &str| kwargs[key].as_str();
    let names = kwargs["adapters"].as_array().expect("adapters").iter();
    let weights = kwargs["weights"].as_array().expect("weights").iter();
    let sources = names.zip(weights).map(|(n, w)| Source {
        name: n.as_str().expect("a name").to_owned(),
        weight: w.as_f64().expect("a weight"),
    });
    let mut options = Options::default();
    options.rank = kwargs["svd_rank"].as_u64().map(|r| r as usize);
    options.density = kwargs["density"].as_f64().unwrap_or(options.density);
    if text("majority_sign_method") == Some("frequency") {
        options.election = Election::Frequency;
    }
    let method = Method::named(text("combination_type").expect("a type")).expect("a method");
    Spec { method, sources: sources.collect(), options, seed: 0 }
}
