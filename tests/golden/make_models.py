"""Makes models.json: logits and rope tables of Hugging Face transformers for tiny models.

The weights are a formula (`tests/support/src/tiny.rs` has the same one), so that no weights are stored.
Needs torch and transformers: `python make_models.py > models.json`.
"""

import json

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 1000.0,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
CASES = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_scaling": LINEAR},
    "llama-yarn": {"model_type": "llama", "rope_scaling": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "head_dim": 32},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_scaling": {**YARN, "type": "yarn", "truncate": False, "beta_fast": 16.0},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "attention_bias": False},
    "gemma3": GEMMA,
    "gemma3-linear": {**GEMMA, "rope_scaling": LINEAR},
    "gemma3-new": {
        **{k: v for k, v in GEMMA.items() if k not in ("sliding_window_pattern", "rope_local_base_freq")},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 50000.0, "rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"},
        },
    },
}
ROPES = {
    "default": {"rope_theta": 500000.0},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
    },
    "yarn": {
        "rope_theta": 1000000.0,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 32768},
    },
    "yarn-mscale": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            **YARN,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    },
    "yarn-attention-factor": {
        "rope_theta": 150000.0,
        "rope_scaling": {
            **YARN,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.5,
            "truncate": False,
        },
    },
}
PROMPT = [(i * 37 + i * i * 11 + 5) % 128 for i in range(24)]
POSITIONS = [0, 9, 23]


def uniform(name, count):
    """Numbers in [-0.5, 0.5) with 24 bits each, from the name and the index."""
    seed = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            seed = (seed ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        x = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)


def weight(name, shape, gemma):
    u = uniform(name, int(np.prod(shape)))
    if name.endswith("norm.weight"):
        w = u * np.float32(0.5) + np.float32(0.0 if gemma else 1.0)
    elif "embed_tokens" in name:
        w = u * np.float32(2.0)
    else:
        w = u * np.float32(0.5)
    return torch.from_numpy(w.reshape(shape))


def logits(case):
    config = {**BASE, **case}
    model_type = config.pop("model_type")
    if "rope_parameters" in config:
        config.pop("rope_theta")
    made = AutoConfig.for_model(model_type, **config)
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    state = model.state_dict()
    names = {k for k in state if not (config["tie_word_embeddings"] and k == "lm_head.weight")}
    gemma = model_type.startswith("gemma")
    new = {k: weight(k, tuple(state[k].shape), gemma) for k in names}
    model.load_state_dict(new, strict=False)
    model.tie_weights()
    with torch.no_grad():
        out = model(torch.tensor([PROMPT])).logits[0]
    assert torch.isfinite(out).all()
    return [[round(v, 6) for v in out[p].tolist()] for p in POSITIONS]


def rope(case):
    config = {**BASE, "hidden_size": 256, "num_attention_heads": 4, **case}
    made = AutoConfig.for_model("llama", **{**config, "max_position_embeddings": 131072})
    kind = made.rope_parameters["rope_type"]
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(made)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](made, "cpu")
    return {"config": {**case, "max_position_embeddings": 131072}, "inv_freq": inv_freq.tolist(), "factor": factor}


if __name__ == "__main__":
    out = {
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}, f32, eager attention",
        "base": BASE,
        "prompt": PROMPT,
        "positions": POSITIONS,
        "models": {},
        "ropes": {name: rope(case) for name, case in ROPES.items()},
    }
    for name, case in CASES.items():
        out["models"][name] = {"config": case, "logits": logits(case)}
    print(json.dumps(out))
