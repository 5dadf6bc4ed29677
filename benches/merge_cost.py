#!/usr/bin/env python3
"""What merging costs: eight rank-16 adapters of an 8B-shaped model by lego and svd, time and memory (not part of build or tests).

Writes random factors in bf16 (32 layers, 7 sites, hidden 4096, ffn 14336, 8 kv heads of 128), runs `polylora merge` on them and prints one JSON line a
method: seconds and peak memory of the whole command, files included. With --peft it also measures PEFT's way of `svd`, which makes each product in
full: two sites are timed with torch, and the sum for the model is computed from them (PEFT merges site by site).
"""
import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import subprocess
import time

HIDDEN, FFN, KV = 4096, 14336, 1024
SITES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FFN), "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
}


TO_SMALL = bytes((b & 0x80) | 0x3B for b in range(256))


def noise(rng, count):
    """`count` bf16 values of random sign and mantissa around 0.004."""
    raw = bytearray(rng.randbytes(2 * count))
    raw[1::2] = raw[1::2].translate(TO_SMALL)
    return bytes(raw)


def write(folder, rank, layers, seed):
    rng = random.Random(seed)
    shapes, at = {}, 0
    for layer in range(layers):
        for module, (inputs, outputs) in SITES.items():
            for name, dims in (("A", [rank, inputs]), ("B", [outputs, rank])):
                size = 2 * dims[0] * dims[1]
                key = f"base_model.model.model.layers.{layer}.{module}.lora_{name}.weight"
                shapes[key] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
                at += size
    head = json.dumps(shapes).encode()
    folder.mkdir(parents=True)
    with open(folder / "adapter_model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for entry in shapes.values():
            f.write(noise(rng, entry["shape"][0] * entry["shape"][1]))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
              "bias": "none", "target_modules": [m.split(".")[1] for m in SITES]}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def run(binary, sources, out, method, rank, threads):
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    child = subprocess.Popen([binary, "merge", *sources, "--method", method, "--rank", str(rank),
                              "--threads", str(threads), "--out", str(out)],
                             stdout=subprocess.PIPE, text=True)
    said, _ = child.communicate()
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(child.returncode)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    last = said.strip().splitlines()[-2:]
    print(json.dumps({"method": method, "seconds": round(seconds, 1), "peak_bytes": peak,
                      "said": last}), flush=True)


def peft_way(adapters, rank, layers, threads):
    import torch
    torch.set_num_threads(threads)
    seconds = 0.0
    for name, (inputs, outputs), count in (("k_proj", (HIDDEN, KV), 2), ("q_proj", (HIDDEN, HIDDEN), 2),
                                           ("down_proj", (FFN, HIDDEN), 3)):
        start = time.perf_counter()
        delta = sum(torch.randn(outputs, rank) @ torch.randn(rank, inputs) for _ in range(adapters))
        u, s, v = torch.linalg.svd(delta, full_matrices=name != "down_proj")
        one = time.perf_counter() - start
        seconds += one * count * layers
        print(json.dumps({"peft_way": name, "seconds_a_site": round(one, 1), "torch": torch.__version__}),
              flush=True)
    print(json.dumps({"peft_way": "svd", "seconds_computed": round(seconds)}), flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--binary", default="target/release/polylora")
    p.add_argument("--work", type=pathlib.Path, required=True, help="an empty place of 2 GB")
    p.add_argument("--adapters", type=int, default=8)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--methods", default="lego,svd")
    p.add_argument("--peft", action="store_true", help="also time torch's SVD of full products")
    a = p.parse_args()
    folders = [a.work / f"a{i}" for i in range(a.adapters)]
    for i, folder in enumerate(folders):
        if not folder.exists():
            write(folder, a.rank, a.layers, i)
    sources = [f"{f}={1 / a.adapters}" for f in folders]
    for method in a.methods.split(","):
        run(a.binary, sources, a.work / "out", method, a.rank, a.threads)
    if a.peft:
        peft_way(a.adapters, a.rank, a.layers, a.threads)


if __name__ == "__main__":
    main()
