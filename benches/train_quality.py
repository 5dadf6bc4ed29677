#!/usr/bin/env python3
"""Adapters trained here and in PEFT with the same settings, judged by the same held-out examples (not part of build or tests).

Needs torch, transformers and peft in the running Python:

    cargo build --release --locked
    python benches/train_quality.py --gguf ~/.cache/polylora/SmolLM2-135M-Instruct.Q4_1.gguf target/release/polylora

The tasks are those of train_adapters.py, and the NAME.train.jsonl and NAME.heldout.jsonl of --data. Both sides train LoRA of rank 8, alpha 16, on all
linears: AdamW at 1e-3 falling to 0, eight examples a step, three epochs, gradients clipped to 1; PEFT in f32, polylora on the file's own weights. Each
draws its own factors and order from the seed, so a difference of one run is chance: see the seeds beside each other. Both results are judged by PEFT:
mean loss of the held-out answers' tokens, and the share of answers of which every token is the likeliest.
"""
import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path

import peft
import torch

from merge_in_peft import base
from served import examples
from train_adapters import TASKS, make

MODEL = "smollm2-135m-instruct"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, EPOCHS, RATE = 8, 3, 1e-3


def loss_of(model, group, sums=False):
    """Mean loss of the answers' tokens of some examples; with `sums`, their sum, count and the exact answers."""
    longest = max(len(ids) for ids, _ in group)
    tokens = torch.zeros(len(group), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, (ids, start) in enumerate(group):
        tokens[row, :len(ids)] = torch.tensor(ids)
        labels[row, start:len(ids)] = torch.tensor(ids[start:])
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    labels = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    count = (labels != -100).sum()
    if not sums:
        return loss / count
    right = (logits.argmax(-1) == labels) | (labels == -100)
    return loss.item(), count.item(), right.all(-1).sum().item()


def train_in_peft(model, lines, seed):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    order, step = random.Random(seed), 0
    steps = EPOCHS * -(-len(lines) // BATCH)
    for _ in range(EPOCHS):
        epoch = order.sample(lines, len(lines))
        for at in range(0, len(epoch), BATCH):
            for group in optimiser.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            loss_of(model, epoch[at:at + BATCH]).backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimiser.step()
            optimiser.zero_grad()
            step += 1


@torch.no_grad()
def judged(model, lines):
    totals = [loss_of(model, lines[at:at + BATCH], sums=True) for at in range(0, len(lines), BATCH)]
    loss, count, exact = (sum(column) for column in zip(*totals))
    return {"loss": round(loss / count, 4), "exact": round(exact / len(lines), 3)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("binary")
    p.add_argument("--gguf", required=True)
    p.add_argument("--data", type=Path)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--threads", type=int)
    p.add_argument("--task", action="append")
    p.add_argument("--flags", default="", help="more flags of polylora train, e.g. '--loraplus-ratio 16'")
    p.add_argument("--no-peft", action="store_true", help="train here only")
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        files = {}
        for path in sorted(a.data.glob("*.train.jsonl")) if a.data else []:
            name = path.name.removesuffix(".train.jsonl")
            files[name] = (path, path.with_name(f"{name}.heldout.jsonl"))
        for name, task in TASKS.items():
            lines = make(task, 128, 0)
            files.setdefault(name, (work / f"{name}.train.jsonl", work / f"{name}.heldout.jsonl"))
            for path, part in zip(files[name], (lines[:96], lines[96:])):
                if path.parent == work:
                    path.write_text("".join(json.dumps(line) + "\n" for line in part))
        server = subprocess.Popen([a.binary, "serve", "--model", MODEL, "--port", "18083", "--data-dir", work / "data"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = "http://127.0.0.1:18083"
            subprocess.run([a.binary, "health", "--url", url, "--wait", "300"], check=True, stdout=subprocess.DEVNULL)
            tokens = {name: [examples(url, path, 10000) for path in pair] for name, pair in files.items()}
        finally:
            server.terminate()
            server.wait()
        for name, (lines, held) in tokens.items():
            if a.task and name not in a.task:
                continue
            row = {"task": name, "base": judged(base(a.gguf), held)}
            for seed in range(a.seeds):
                out = work / f"{name}-{seed}"
                subprocess.run([a.binary, "train", files[name][0], "--out", out, "--epochs", str(EPOCHS), "--batch-size", str(BATCH),
                                "--learning-rate", str(RATE), "--rank", "8", "--alpha", "16", "--seed", str(seed), *a.flags.split()],
                               check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                row[f"polylora {seed}"] = judged(peft.PeftModel.from_pretrained(base(a.gguf), out), held)
                if not a.no_peft:
                    torch.manual_seed(seed)
                    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=MODULES, task_type="CAUSAL_LM")
                    model = peft.get_peft_model(base(a.gguf), config)
                    train_in_peft(model, lines, seed)
                    row[f"PEFT {seed}"] = judged(model, held)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
