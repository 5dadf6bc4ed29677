//! candle-transformers' models as the reference, fed from our checkpoint.
//!
//! Owns the translation of a `ModelShape` into candle's configs. Never uses our decoder or kernels.
//! The thing to know: candle asks for tensors by Hugging Face name, so a GGUF file works as well as
//! a directory; an adapter is merged into each weight as it is asked for. A tied head comes as a
//! matrix of its own, since an adapter may change one of the two.

use super::merge::{Merged, no_reference};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::shape::{Activation, ModelShape, RopeScaling};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, var_builder::SimpleBackend};
use candle_transformers::models::{gemma3, llama, mistral, qwen2, qwen3};
use std::path::Path;

/// One sequence through candle's model of the family.
pub struct Reference {
    network: Network,
    /// Positions up to which candle agrees with Hugging Face on what a window is.
    positions_max: usize,
    /// Factor on logits; see `gemma3`.
    logit_scale: f32,
}

enum Network {
    Llama { model: Box<llama::Llama>, config: Box<llama::Config>, cache: Box<llama::Cache> },
    Mistral(mistral::Model),
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
    Gemma3(gemma3::Model),
}

impl Network {
    fn forward(&mut self, tokens: &[u32], position: usize) -> candle_core::Result<Vec<f32>> {
        let x = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu)?;
        let y = match self {
            Self::Llama { model, cache, .. } => model.forward(&x, position, cache)?,
            Self::Mistral(m) => m.forward(&x, position)?,
            Self::Qwen2(m) => m.forward(&x, position)?,
            Self::Qwen3(m) => m.forward(&x, position)?,
            Self::Gemma3(m) => m.forward(&x, position)?,
        };
        y.flatten_all()?.to_vec1::<f32>()
    }
}

fn fail(e: candle_core::Error) -> Error {
    Error::fault(format!("candle: {e}"))
}

/// Positions that both sides are made for: long enough for the prompts, short enough for small
/// tables.
const CONTEXT: usize = 512;

impl Reference {
    /// Builds candle's model. Errors: `unsupported_reference` names what candle's model of the
    /// family lacks.
    pub fn new(c: &Checkpoint, adapter: Option<&Path>) -> Result<Self> {
        let shape = &c.shape;
        let merged = Merged::new(c, adapter)?;
        let backend: Box<dyn SimpleBackend + '_> = Box::new(merged);
        let vb = VarBuilder::from_backend(backend, DType::F32, Device::Cpu);
        let context = shape.context.min(CONTEXT);
        let network = match shape.family {
            "llama" => llama(shape, context, vb)?,
            "mistral" => mistral(shape, context, vb)?,
            "qwen2" => qwen2(shape, context, vb)?,
            "qwen3" => qwen3(shape, context, vb)?,
            _ => gemma3(shape, context, vb)?,
        };
        let windows = shape.windows.iter().flatten().map(|w| *w as usize);
        let exact = (shape.hidden as f64).sqrt() as f32;
        Ok(Self {
            network,
            positions_max: windows.min().unwrap_or(context).min(context),
            logit_scale: match shape.family {
                "gemma3" => exact / shape.embedding_scale,
                _ => 1.0,
            },
        })
    }

    pub fn positions_max(&self) -> usize {
        self.positions_max
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) -> Result<()> {
        match &mut self.network {
            Network::Llama { config, cache, .. } => {
                let fresh = llama::Cache::new(true, DType::F32, config, &Device::Cpu);
                **cache = fresh.map_err(fail)?;
            }
            Network::Mistral(m) => m.clear_kv_cache(),
            Network::Qwen2(m) => m.clear_kv_cache(),
            Network::Qwen3(m) => m.clear_kv_cache(),
            Network::Gemma3(m) => m.clear_kv_cache(),
        }
        Ok(())
    }

    /// Logits `[V]` of the last of `tokens`, which start at `position`.
    pub fn logits(&mut self, tokens: &[u32], position: usize) -> Result<Vec<f32>> {
        // Candle's gemma3 cannot cache several positions at once (its values are not contiguous
        // then).
        let at_once = match self.network {
            Network::Gemma3(_) => 1,
            _ => tokens.len(),
        };
        let mut logits = Vec::new();
        for (i, part) in tokens.chunks(at_once).enumerate() {
            let part = self.network.forward(part, position + i * at_once);
            logits = part.map_err(fail)?;
        }
        logits.iter_mut().for_each(|x| *x *= self.logit_scale);
        Ok(logits)
    }
}

/// Candle knows no rope scaling outside its Llama.
fn plain_rope(shape: &ModelShape) -> Result<()> {
    match shape.rope.scaling {
        RopeScaling::None => Ok(()),
        ref other => Err(no_reference(format!("{} with rope {other:?}", shape.family))),
    }
}

fn llama(shape: &ModelShape, context: usize, vb: VarBuilder) -> Result<Network> {
    if shape.qkv_bias || shape.o_bias || shape.mlp_bias {
        return Err(no_reference("llama with biases"));
    }
    if shape.windows.iter().any(Option::is_some) {
        return Err(no_reference("llama with a sliding window"));
    }
    if shape.head_dim * shape.heads != shape.hidden {
        return Err(no_reference("llama whose heads are not as wide as its hidden size"));
    }
    let rope_scaling = match shape.rope.scaling {
        RopeScaling::None => None,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            Some(llama::Llama3RopeConfig {
                factor: factor as f32,
                low_freq_factor: low_freq_factor as f32,
                high_freq_factor: high_freq_factor as f32,
                original_max_position_embeddings: original_context,
                rope_type: llama::Llama3RopeType::Llama3,
            })
        }
        // Bounds so low that candle divides every frequency: linear scaling in its words.
        RopeScaling::Linear { factor } => Some(llama::Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: 1e6,
            high_freq_factor: 2e6,
            original_max_position_embeddings: 1,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        ref other => return Err(no_reference(format!("llama with rope {other:?}"))),
    };
    let config = llama::Config {
        hidden_size: shape.hidden,
        intermediate_size: shape.ffn,
        vocab_size: shape.vocab,
        num_hidden_layers: shape.layers,
        num_attention_heads: shape.heads,
        num_key_value_heads: shape.kv_heads,
        use_flash_attn: false,
        rms_norm_eps: f64::from(shape.norm_eps),
        rope_theta: shape.rope.theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings: context,
        tie_word_embeddings: false,
    };
    let cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).map_err(fail)?;
    Ok(Network::Llama {
        model: Box::new(llama::Llama::load(vb, &config).map_err(fail)?),
        config: Box::new(config),
        cache: Box::new(cache),
    })
}

fn activation(shape: &ModelShape) -> candle_nn::Activation {
    match shape.activation {
        Activation::Silu => candle_nn::Activation::Silu,
        Activation::GeluTanh => candle_nn::Activation::GeluPytorchTanh,
    }
}

fn mistral(shape: &ModelShape, context: usize, vb: VarBuilder) -> Result<Network> {
    plain_rope(shape)?;
    let config = mistral::Config {
        vocab_size: shape.vocab,
        hidden_size: shape.hidden,
        intermediate_size: shape.ffn,
        num_hidden_layers: shape.layers,
        num_attention_heads: shape.heads,
        head_dim: Some(shape.head_dim),
        num_key_value_heads: shape.kv_heads,
        hidden_act: activation(shape),
        max_position_embeddings: context,
        rms_norm_eps: f64::from(shape.norm_eps),
        rope_theta: shape.rope.theta,
        sliding_window: None,
        use_flash_attn: false,
    };
    let model = mistral::Model::new(&config, vb).map_err(fail)?;
    Ok(Network::Mistral(model))
}

fn qwen2(shape: &ModelShape, context: usize, vb: VarBuilder) -> Result<Network> {
    plain_rope(shape)?;
    let config = qwen2::Config {
        vocab_size: shape.vocab,
        hidden_size: shape.hidden,
        intermediate_size: shape.ffn,
        num_hidden_layers: shape.layers,
        num_attention_heads: shape.heads,
        num_key_value_heads: shape.kv_heads,
        max_position_embeddings: context,
        sliding_window: context,
        max_window_layers: shape.layers,
        tie_word_embeddings: false,
        rope_theta: shape.rope.theta,
        rms_norm_eps: f64::from(shape.norm_eps),
        use_sliding_window: false,
        hidden_act: activation(shape),
    };
    let model = qwen2::ModelForCausalLM::new(&config, vb).map_err(fail)?;
    Ok(Network::Qwen2(model))
}

fn qwen3(shape: &ModelShape, context: usize, vb: VarBuilder) -> Result<Network> {
    plain_rope(shape)?;
    let config = qwen3::Config {
        vocab_size: shape.vocab,
        hidden_size: shape.hidden,
        intermediate_size: shape.ffn,
        num_hidden_layers: shape.layers,
        num_attention_heads: shape.heads,
        head_dim: shape.head_dim,
        attention_bias: shape.qkv_bias,
        num_key_value_heads: shape.kv_heads,
        max_position_embeddings: context,
        sliding_window: None,
        max_window_layers: shape.layers,
        tie_word_embeddings: false,
        rope_theta: shape.rope.theta,
        rms_norm_eps: f64::from(shape.norm_eps),
        use_sliding_window: false,
        hidden_act: activation(shape),
    };
    let model = qwen3::ModelForCausalLM::new(&config, vb).map_err(fail)?;
    Ok(Network::Qwen3(model))
}

/// Candle multiplies embeddings by sqrt(H) where Hugging Face rounds it to bf16 first. The table it
/// gets is scaled to make up for that, and since the table is its head too, its logits are scaled
/// back.
fn gemma3(shape: &ModelShape, context: usize, vb: VarBuilder) -> Result<Network> {
    plain_rope(shape)?;
    if shape.attention_scale != (1.0 / (shape.head_dim as f64).sqrt()) as f32 {
        return Err(no_reference("gemma3 whose query_pre_attn_scalar is not its head_dim"));
    }
    if !shape.tied_head {
        return Err(no_reference("gemma3 with a head of its own"));
    }
    // Candle knows the pattern by its length only: the first full-attention layer tells it.
    let pattern = 1 + shape.windows.iter().take_while(|w| w.is_some()).count();
    let fits = |l: usize| shape.windows[l].is_some() != (l + 1).is_multiple_of(pattern);
    if !(0..shape.layers).all(fits) {
        return Err(no_reference("gemma3 with an irregular order of attention layers"));
    }
    let theta = |rope: Option<&crate::shape::Rope>| rope.map_or(shape.rope.theta, |r| r.theta);
    let config = gemma3::Config {
        attention_bias: shape.qkv_bias,
        head_dim: shape.head_dim,
        hidden_activation: activation(shape),
        hidden_size: shape.hidden,
        intermediate_size: shape.ffn,
        num_attention_heads: shape.heads,
        num_hidden_layers: shape.layers,
        num_key_value_heads: shape.kv_heads,
        rms_norm_eps: f64::from(shape.norm_eps),
        rope_theta: shape.rope.theta,
        rope_local_base_freq: theta(shape.rope_local.as_ref()),
        vocab_size: shape.vocab,
        final_logit_softcapping: None,
        attn_logit_softcapping: None,
        query_pre_attn_scalar: shape.head_dim,
        sliding_window: context,
        sliding_window_pattern: pattern,
        max_position_embeddings: context,
    };
    let model = gemma3::Model::new(false, &config, vb).map_err(fail)?;
    Ok(Network::Gemma3(model))
}
