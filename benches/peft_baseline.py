#!/usr/bin/env python3
"""What transformers + PEFT reach on this machine, for docs/benchmarks.md (not part of build or tests).

Needs torch, transformers and peft in the running Python. The model has the demo model's shape with random weights: speed does not
depend on the values. Prints one JSON line per case: output tokens per second, prefill included, greedy, eos ignored.
"""
import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
             num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
             rope_theta=100000.0, max_position_embeddings=8192)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(model, streams, prompt_tokens, output_tokens, names):
    ids = torch.randint(3, 49000, (streams, prompt_tokens))
    extra = {"adapter_names": names} if names else {}
    start = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         min_new_tokens=output_tokens, max_new_tokens=output_tokens,
                         pad_token_id=2, **extra)
    seconds = time.perf_counter() - start
    assert out.shape[1] == prompt_tokens + output_tokens
    return streams * output_tokens / seconds


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--adapters", type=int, default=8)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--prompt-tokens", type=int, default=8)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    a = p.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, a.dtype)).eval()
    config = LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules=ALL_LINEAR,
                        init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a0").eval()
    for i in range(1, a.adapters):
        model.add_adapter(f"a{i}", config)
    mixed = [f"a{i % a.adapters}" for i in range(a.streams)]
    cases = {"base": ["__base__"] * a.streams, "one": ["a0"] * a.streams, "mixed": mixed}
    with torch.inference_mode():
        for r in range(a.rounds):
            for name, names in cases.items():
                if name == "base":
                    with model.disable_adapter():
                        rate = measure(model, a.streams, a.prompt_tokens, a.output_tokens, None)
                else:
                    rate = measure(model, a.streams, a.prompt_tokens, a.output_tokens, names)
                print(json.dumps({"round": r, "case": name, "tokens_per_second": round(rate, 1),
                                  "torch": torch.__version__, "dtype": a.dtype}), flush=True)


if __name__ == "__main__":
    main()
