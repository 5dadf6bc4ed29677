#!/usr/bin/env python3
"""Writes random LoRA adapters of the demo model's shape, for load tests (standard library only).

Values are small bf16 numbers, so the adapters change answers but do not break them.
"""
import argparse
import json
import pathlib
import random
import struct

HIDDEN, FFN, KV, LAYERS = 576, 1536, 192, 30
SITES = {  # module: (inputs, outputs)
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FFN), "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
}


def noise(rng, count):
    """`count` bf16 values of random sign and mantissa around 0.004."""
    raw = bytearray(rng.randbytes(2 * count))
    raw[1::2] = bytes((b & 0x80) | 0x3B for b in raw[1::2])
    return bytes(raw)


def write(folder, rank, targets, seed):
    rng = random.Random(seed)
    header, blobs, at = {}, [], 0
    for layer in range(LAYERS):
        for module in targets:
            inputs, outputs = SITES[module]
            for name, dims in (("A", [rank, inputs]), ("B", [outputs, rank])):
                blob = noise(rng, dims[0] * dims[1])
                key = f"base_model.model.model.layers.{layer}.{module}.lora_{name}.weight"
                header[key] = {"dtype": "BF16", "shape": dims,
                               "data_offsets": [at, at + len(blob)]}
                at += len(blob)
                blobs.append(blob)
    head = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "adapter_model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.writelines(blobs)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
              "bias": "none", "target_modules": [m.split(".")[1] for m in targets]}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--count", type=int, default=8)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--targets", default="all", help="all, or names such as q_proj,v_proj")
    a = p.parse_args()
    wanted = None if a.targets == "all" else a.targets.split(",")
    targets = [m for m in SITES if wanted is None or m.split(".")[1] in wanted]
    for i in range(a.count):
        write(a.out / f"a{i + 1}", a.rank, targets, seed=1000 * a.rank + i)


if __name__ == "__main__":
    main()
