#!/usr/bin/env python3
"""Steps of training in PEFT and here, in turns on one machine (not part of build or tests).

Needs torch, transformers and peft in the running Python, a quiet machine, and the bench built:

    cargo bench --bench train --no-run
    python benches/train_in_peft.py --gguf ~/.cache/polylora/SmolLM2-135M-Instruct.Q4_1.gguf target/release/deps/train-<hash>

Both train LoRA of rank 8 on all linears with AdamW, eight examples a step, on the same number of threads. PEFT's base is f32, then bf16 with f32
factors; ours is as the file stores it, then f32. Each figure is the best of several steps, as the bench's are.
"""
import argparse
import os
import subprocess
import time

import peft
import torch

from merge_in_peft import base

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def in_peft(model, length, steps):
    """Tokens a second of the best step."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40000, (8, length), generator=generator)
    best = float("inf")
    for _ in range(steps):
        begun = time.monotonic()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        optimiser.zero_grad()
        best = min(best, time.monotonic() - begun)
    return ids.numel() / best


def ours(bench, threads, storage, length):
    said = subprocess.run([bench, str(threads), storage, "lora", str(length)], check=True, capture_output=True, text=True).stdout
    row = next(line.split() for line in said.splitlines() if line.startswith(storage) and "8 x" in line)
    return float(row[5]), float(row[6])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bench")
    p.add_argument("--gguf", required=True)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    models = {}
    for name, dtype in (("PEFT f32", torch.float32), ("PEFT bf16", torch.bfloat16)):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=MODULES, task_type="CAUSAL_LM")
        models[name] = peft.get_peft_model(base(a.gguf).to(dtype), config, autocast_adapter_dtype=True)
    for turn in range(a.rounds):
        for length in (60, 256):
            found = {name: in_peft(model, length, a.steps) for name, model in models.items()}
            for storage in ("stored", "f32"):
                rate, share = ours(os.path.abspath(a.bench), a.threads, storage, length)
                found[storage] = rate
                found[f"{storage} of prefill"] = share
            row = ", ".join(f"{name} {value:.0f}" if value > 2 else f"{name} {value:.2f}" for name, value in found.items())
            ratios = [found["stored"] / found["PEFT f32"], found["stored"] / found["PEFT bf16"], found["f32"] / found["PEFT f32"]]
            print(f"round {turn + 1}, 8 x {length}, tokens/s: {row}; stored / PEFT f32 {ratios[0]:.2f}, stored / PEFT bf16 {ratios[1]:.2f}, "
                  f"f32 / f32 {ratios[2]:.2f}", flush=True)


if __name__ == "__main__":
    main()
