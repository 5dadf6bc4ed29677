//! Module paths of the served model: from the name in a file to the site, norm or table it means.
//!
//! Owns the table of names and the prefixes that tools put before them. Never looks at tensors. The
//! thing to know: a file keeps one way of naming; PEFT's patterns see the path as the file has it,
//! `find` sees through the prefix.

use crate::shape::{ModelShape, Norm, Projection, Site};
use std::collections::HashMap;

/// What a module path of the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    Site(Site),
    Norm(Norm),
    /// `embed_tokens`
    Embedding,
}

/// Every module of one model by its Hugging Face path.
pub struct Modules {
    by_path: HashMap<String, Module>,
    layers: usize,
}

/// Prefixes beside plain `model.`: a bare decoder, and the text half of a model with more
/// modalities.
const ALIASES: [(&str, &str); 3] =
    [("model.language_model.", "model."), ("language_model.", ""), ("", "model.")];

impl Modules {
    pub fn new(shape: &ModelShape) -> Self {
        let mut by_path = HashMap::new();
        for l in 0..shape.layers {
            for p in Projection::ALL {
                let path = format!("model.layers.{l}.{}", p.module());
                by_path.insert(path, Module::Site(Site::Layer(l, p)));
            }
            for (name, norm) in layer_norms(shape, l) {
                by_path.insert(format!("model.layers.{l}.{name}"), Module::Norm(norm));
            }
        }
        by_path.insert("model.norm".into(), Module::Norm(Norm::Final));
        by_path.insert("model.embed_tokens".into(), Module::Embedding);
        by_path.insert("lm_head".into(), Module::Site(Site::Head));
        Self { by_path, layers: shape.layers }
    }

    /// The module that a path of a file names, whatever prefix the file uses.
    pub fn find(&self, path: &str) -> Option<Module> {
        if let Some(&module) = self.by_path.get(path) {
            return Some(module);
        }
        ALIASES.iter().find_map(|(from, to)| {
            let rest = path.strip_prefix(from)?;
            self.by_path.get(&format!("{to}{rest}")).copied()
        })
    }

    /// The layer number in a path that would be a module if the model had more layers.
    pub fn layer_beyond(&self, path: &str) -> Option<usize> {
        let (head, tail) = path.split_once("layers.")?;
        let (number, rest) = tail.split_once('.')?;
        let layer: usize = number.parse().ok()?;
        (layer >= self.layers && self.find(&format!("{head}layers.0.{rest}")).is_some())
            .then_some(layer)
    }

    /// The module path that looks most like `path`, for error messages.
    pub fn nearest(&self, path: &str) -> &str {
        let near = |known: &&String| (distance(path, known), (*known).clone());
        self.by_path.keys().min_by_key(near).map_or("", |s| s)
    }

    /// Every path and its module, in no order.
    pub fn all(&self) -> impl Iterator<Item = (&str, Module)> + Clone {
        self.by_path.iter().map(|(p, &m)| (p.as_str(), m))
    }
}

fn layer_norms(shape: &ModelShape, l: usize) -> Vec<(&'static str, Norm)> {
    let mut norms = vec![
        ("input_layernorm", Norm::Input(l)),
        ("post_attention_layernorm", Norm::PostAttention(l)),
    ];
    if shape.post_norms {
        norms.push(("pre_feedforward_layernorm", Norm::PreFeedforward(l)));
        norms.push(("post_feedforward_layernorm", Norm::PostFeedforward(l)));
    }
    if shape.qk_norm {
        norms.push(("self_attn.q_norm", Norm::Query(l)));
        norms.push(("self_attn.k_norm", Norm::Key(l)));
    }
    norms
}

/// Values of a norm's weight.
pub fn norm_len(shape: &ModelShape, norm: Norm) -> usize {
    match norm {
        Norm::Query(_) | Norm::Key(_) => shape.head_dim,
        _ => shape.hidden,
    }
}

/// Last part of a module path, e.g. `q_proj`.
pub fn short(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Levenshtein distance over bytes of at most 120 each.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let (a, b) = (&a[..a.len().min(120)], &b[..b.len().min(120)]);
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}
