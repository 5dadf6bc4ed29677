//! What a base model looks like: one `ModelShape` for the whole family, and the names of its sites.
//!
//! Owns the numbers that the decoder, the KV cache and the adapter loaders agree on. Never reads a
//! file and holds no weights. The thing to know: a family is described by fields, not by a type.

use serde::{Deserialize, Serialize};

/// A projection inside one decoder layer. The order is the order of `Site::index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Projection {
    #[serde(rename = "q_proj")]
    Q,
    #[serde(rename = "k_proj")]
    K,
    #[serde(rename = "v_proj")]
    V,
    #[serde(rename = "o_proj")]
    O,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
}

impl Projection {
    pub const ALL: [Projection; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Module path below `model.layers.{l}.`, as Hugging Face names it.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// The last part of that path, as PEFT's `target_modules` has it.
    pub fn name(self) -> &'static str {
        self.module().rsplit('.').next().unwrap_or_default()
    }
}

/// A linear map of the model that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    Layer(usize, Projection),
    /// `lm_head`
    Head,
}

/// A norm of the model that an adapter may replace (`modules_to_save`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Norm {
    /// `input_layernorm`
    Input(usize),
    /// `post_attention_layernorm`: before the MLP in Llama and Qwen, after attention in Gemma.
    PostAttention(usize),
    /// `pre_feedforward_layernorm` (Gemma)
    PreFeedforward(usize),
    /// `post_feedforward_layernorm` (Gemma)
    PostFeedforward(usize),
    /// `self_attn.q_norm` (Qwen3, Gemma 3)
    Query(usize),
    /// `self_attn.k_norm`
    Key(usize),
    /// `model.norm`
    Final,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    GeluTanh,
}

/// How positions turn into rotation frequencies (per attention kind).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: usize,
    },
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_context: usize,
        attention_factor: f64,
        truncate: bool,
    },
    /// One divisor per frequency: how GGUF files store `llama3`. [D/2]
    Factors(Vec<f32>),
}

/// Every number of a decoder of the Llama/Qwen/Gemma family.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// `llama`, `mistral`, `qwen2`, `qwen3`, `gemma3`: for logs and for choosing the reference in
    /// `verify`.
    pub family: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Positions the model was made for.
    pub context: usize,
    pub norm_eps: f32,
    pub rope: Rope,
    /// Rope of sliding-window layers where it differs (Gemma 3).
    pub rope_local: Option<Rope>,
    /// Window of layer l in tokens; `None` sees everything. One entry a layer.
    pub windows: Vec<Option<u32>>,
    pub activation: Activation,
    /// 1/sqrt(D), or Gemma's query_pre_attn_scalar^-0.5.
    pub attention_scale: f32,
    /// Biases on q, k, v (Qwen2; Llama with `attention_bias`).
    pub qkv_bias: bool,
    /// Bias on o (Llama with `attention_bias`).
    pub o_bias: bool,
    /// Biases on gate, up, down (Llama with `mlp_bias`).
    pub mlp_bias: bool,
    /// Per-head norms of q and k (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// Norms after attention and after the MLP (Gemma).
    pub post_norms: bool,
    /// Norm weights are stored as w - 1 (Gemma); folded at load.
    pub norm_plus_one: bool,
    /// Multiplies embeddings (Gemma: sqrt(H) rounded to bf16); 1 elsewhere.
    pub embedding_scale: f32,
    /// The head is the embedding table.
    pub tied_head: bool,
}

impl ModelShape {
    /// Number of linear sites, the head included.
    pub fn sites(&self) -> usize {
        self.layers * Projection::ALL.len() + 1
    }
    /// Dense index of a site, below `sites()`.
    pub fn site_index(&self, site: Site) -> usize {
        match site {
            Site::Layer(l, p) => l * Projection::ALL.len() + p as usize,
            Site::Head => self.sites() - 1,
        }
    }
    /// (inputs, outputs) of a site.
    pub fn site_dims(&self, site: Site) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match site {
            Site::Layer(_, Projection::Q) => (self.hidden, q),
            Site::Layer(_, Projection::K | Projection::V) => (self.hidden, kv),
            Site::Layer(_, Projection::O) => (q, self.hidden),
            Site::Layer(_, Projection::Gate | Projection::Up) => (self.hidden, self.ffn),
            Site::Layer(_, Projection::Down) => (self.ffn, self.hidden),
            Site::Head => (self.hidden, self.vocab),
        }
    }
    /// Values of a token's queries: N·D.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Values of a token's keys, and of its values: K·D.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// The norm on attention's output, where the family has one.
    pub fn norm_after_attention(&self, layer: usize) -> Option<Norm> {
        self.post_norms.then_some(Norm::PostAttention(layer))
    }
    /// The norm that the MLP reads through.
    pub fn norm_before_mlp(&self, layer: usize) -> Norm {
        match self.post_norms {
            true => Norm::PreFeedforward(layer),
            false => Norm::PostAttention(layer),
        }
    }
    /// The norm on the MLP's output, where the family has one.
    pub fn norm_after_mlp(&self, layer: usize) -> Option<Norm> {
        self.post_norms.then_some(Norm::PostFeedforward(layer))
    }
    /// Number of norm slots: six per layer and the final one.
    pub fn norms(&self) -> usize {
        self.layers * 6 + 1
    }
    /// Dense index of a norm, below `norms()`.
    pub fn norm_index(&self, norm: Norm) -> usize {
        match norm {
            Norm::Input(l) => l * 6,
            Norm::PostAttention(l) => l * 6 + 1,
            Norm::PreFeedforward(l) => l * 6 + 2,
            Norm::PostFeedforward(l) => l * 6 + 3,
            Norm::Query(l) => l * 6 + 4,
            Norm::Key(l) => l * 6 + 5,
            Norm::Final => self.layers * 6,
        }
    }
}
