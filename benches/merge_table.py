#!/usr/bin/env python3
"""Which way of merging keeps most of what its sources learned: methods × numbers of sources × ranks × seeds (not part of build or tests).

Needs only Python and a running polylora of the demo model, whose own program merges and which judges the results:

    polylora serve --model smollm2-135m-instruct
    python benches/merge_table.py --polylora target/release/polylora --task pirate=adapters/pirate=pirate.heldout.jsonl …

A task is NAME=ADAPTER=HELD-OUT, in the order in which they are taken for 2, 4, 8 sources. Weights are equal: --weight 1.0 adds the adapters up.
Loss is the mean over answer tokens, an answer is exact when each of its tokens is the most likely one after the right ones before it, and the
share kept is (base − merged) ÷ (base − single adapter) of the losses, mean over tasks. One JSON line a merge; `--table FILE` prints what is in one.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from served import ask, examples

STEADY = {"cat": [], "svd": [], "linear": [], "ties": [], "ties_svd": [], "magnitude_prune_svd": [], "breadcrumbs": []}
SEEDED = {"dare_linear_svd": ["--density", "0.5"], "dare_ties_svd": ["--density", "0.5"], "lego": []}
ABLATION = {"lego, raw units": ["--units", "raw"], "lego, plain centroids": ["--plain-centroids"],
            "lego, paper's scale": ["--output-scale", "paper"], "lego, no scale": ["--output-scale", "one"],
            "lego, as in the paper": ["--units", "raw", "--output-scale", "paper"],
            "lego, neither": ["--plain-centroids", "--output-scale", "one"]}


def score(url, model, ids, start):
    """(sum of the answer's logprobs, whether it is exact)."""
    body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    told = ask(url, "/v1/completions", body)["choices"][0]["logprobs"]
    own, best = told["token_logprobs"][start:], told["top_logprobs"][start:]
    return sum(own), all(o >= max(b.values()) for o, b in zip(own, best))


def judge(url, model, tasks):
    out = {}
    with ThreadPoolExecutor(16) as pool:
        for name, lines in tasks.items():
            scores = list(pool.map(lambda line: score(url, model, *line), lines))
            tokens = sum(len(ids) - start for ids, start in lines)
            out[name] = {"loss": -sum(s for s, _ in scores) / tokens, "exact": sum(e for _, e in scores) / len(lines)}
    return out


def rank_of(directory):
    """Mean rank over the sites of an adapter."""
    with open(Path(directory) / "adapter_model.safetensors", "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return statistics.mean(v["shape"][0] for k, v in header.items() if "lora_A" in k)


def merge(a, method, options, sources, rank, seed, out):
    command = [a.polylora, "merge", *(f"{d}={a.weight}" for d in sources), "--method", method, "--seed", str(seed), "--out", out, "--any-base"]
    if method not in ("cat", "linear", "ties"):
        command += ["--rank", str(rank)]
    done = subprocess.run(command + options, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def push(a, name, directory):
    subprocess.run([a.polylora, "adapter", "push", name, directory, "--url", a.url], check=True, capture_output=True)


def rows(a):
    for method, options in STEADY.items():
        yield method, method, options, [0]
    for method, options in SEEDED.items():
        yield method, method, options, range(a.seeds)
    for name, options in ABLATION.items():
        yield name, "lego", options, range(a.seeds)


def measure(a):
    given = [t.split("=") for t in a.task]
    adapters = {name: directory for name, directory, _ in given}
    tasks = {name: examples(a.url, path, a.count) for name, _, path in given}
    alone = {}
    base = judge(a.url, a.base, tasks)
    print(json.dumps({"row": "base", "tasks": base}), flush=True)
    for name, directory in adapters.items():
        push(a, f"alone-{name}", directory)
        alone[name] = judge(a.url, f"alone-{name}", {name: tasks[name]})[name]
    print(json.dumps({"row": "alone", "tasks": alone}), flush=True)
    for count in a.sources:
        names = list(adapters)[:count]
        sources = [adapters[n] for n in names]
        mean = round(statistics.mean(rank_of(d) for d in sources))
        for row, method, options, seeds in rows(a):
            if a.only and method not in a.only.split(","):
                continue
            for times in (1, 2) if method not in ("cat", "linear", "ties") else (1,):
                for seed in seeds:
                    with tempfile.TemporaryDirectory() as work:
                        out = os.path.join(work, "out")
                        refused = merge(a, method, options, sources, mean * times, seed, out)
                        found = {"row": row, "sources": count, "rank": mean * times, "seed": seed, "weight": a.weight}
                        if refused:
                            print(json.dumps({**found, "refused": refused}), flush=True)
                            break
                        found["error"] = json.load(open(os.path.join(out, "merge_report.json")))["overall"]["relative_error"]
                        push(a, "merged", out)
                    judged = judge(a.url, "merged", {n: tasks[n] for n in names})
                    kept = [(base[n]["loss"] - judged[n]["loss"]) / (base[n]["loss"] - alone[n]["loss"]) for n in names]
                    print(json.dumps({**found, "kept": statistics.mean(kept), "least": min(kept), "tasks": judged}), flush=True)


def table(path):
    """Mean over seeds, methods down, numbers of sources and ranks across."""
    runs = [json.loads(line) for line in open(path)]
    runs = [r for r in runs if "kept" in r]
    columns = sorted({(r["sources"], r["rank"]) for r in runs if r["row"] == "svd"})
    print(f"{'method':<24}" + "".join(f"{f'{n} of rank {k}':>26}" for n, k in columns))
    print(f"{'':<24}" + f"{'loss  exact  kept  least':>26}" * len(columns))
    for row in dict.fromkeys(r["row"] for r in runs):
        line = f"{row:<24}"
        for n, k in columns:
            own = [r for r in runs if r["row"] == row and r["sources"] == n and r["rank"] == k]
            if not own:
                line += f"{'-':>26}"
                continue
            mean = lambda pick: statistics.mean(pick(r) for r in own)
            loss = mean(lambda r: statistics.mean(t["loss"] for t in r["tasks"].values()))
            exact = mean(lambda r: statistics.mean(t["exact"] for t in r["tasks"].values()))
            line += f"{loss:>9.3f}{exact:>6.2f}{mean(lambda r: r['kept']):>6.2f}{mean(lambda r: r['least']):>5.2f}"
        print(line)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--url", default="http://127.0.0.1:8080")
    p.add_argument("--polylora", default="target/release/polylora")
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--task", action="append", metavar="NAME=DIR=FILE")
    p.add_argument("--count", type=int, default=32, help="held-out examples of each task")
    p.add_argument("--sources", type=int, nargs="+", default=[2, 4, 8])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--weight", type=float, default=1.0)
    p.add_argument("--only", help="methods, by commas")
    p.add_argument("--table", metavar="FILE")
    a = p.parse_args()
    if a.table:
        return table(a.table)
    if not a.task:
        sys.exit("error: --task is needed")
    measure(a)


if __name__ == "__main__":
    main()
