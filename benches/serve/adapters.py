#!/usr/bin/env python3
"""Writes rank-R LoRA adapters of random bf16 values on all seven linears of SmolLM2-135M-Instruct.

Usage: adapters.py DIR COUNT RANK   makes DIR/a1 … DIR/aCOUNT. Same arguments, same bytes. Needs no package.
"""

import json
import pathlib
import random
import struct
import sys

LAYERS, HIDDEN, FFN, KV = 30, 576, 1536, 192
SITES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FFN),
    "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
}


def values(source: random.Random, count: int, exponent: int) -> bytes:
    """bf16 with random sign and mantissa and a fixed exponent: magnitudes in [2^exponent, 2^(exponent + 1))."""
    keep = int.from_bytes(struct.pack("<H", 0x807F) * count, "little")
    power = int.from_bytes(struct.pack("<H", (exponent + 127) << 7) * count, "little")
    bits = int.from_bytes(source.randbytes(2 * count), "little")
    return (bits & keep | power).to_bytes(2 * count, "little")


def write(directory: pathlib.Path, rank: int, seed: int) -> None:
    source = random.Random(seed)
    header, blobs, at = {}, [], 0
    for layer in range(LAYERS):
        for site, (inputs, outputs) in SITES.items():
            for name, shape, exponent in (("A", [rank, inputs], -6), ("B", [outputs, rank], -9)):
                blob = values(source, shape[0] * shape[1], exponent)
                key = f"base_model.model.model.layers.{layer}.{site}.lora_{name}.weight"
                header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len(blob)]}
                blobs.append(blob)
                at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(blobs)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(site.split(".")[1] for site in SITES),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    for i in range(1, int(sys.argv[2]) + 1):
        write(pathlib.Path(sys.argv[1]) / f"a{i}", int(sys.argv[3]), i)
