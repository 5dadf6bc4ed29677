#!/usr/bin/env python3
"""Beside a mixed step's time: its base step's and what reading the adapters takes at the bandwidth measured in the same
run. Usage: formula.py REPORT ADAPTERS COUNT STREAMS ADAPTER_DTYPE "ceilings: read N GB/s, ..."; mixed.sh calls it."""
import json
import re
import statistics
import sys
from pathlib import Path


def main():
    report, adapters, count, streams, dtype, ceilings = sys.argv[1:]
    count, streams = int(count), int(streams)
    bandwidth = float(re.search(r"read ([\d.]+) GB/s", ceilings).group(1)) * 1e9
    size = (Path(adapters) / "a1/adapter_model.safetensors").stat().st_size * min(count, streams)
    size = size * {"int8": 1, "f32": 4}.get(dtype, 2) // 2  # the files are bf16
    rounds = {c["name"]: [r["output_tokens_per_second"] for r in c["rounds"]] for c in json.load(open(report))["contenders"]}
    steps = [(streams / mixed, streams / base + size / bandwidth) for mixed, base in zip(rounds["mixed"], rounds["base"])]
    ratios = sorted(step / least for step, least in steps)
    print(f"{ceilings}\n{size / 1e6:.0f} MB of adapters a step. A mixed step takes {statistics.median(ratios):.2f} times "
          f"its round's base step and their reading ({ratios[0]:.2f}-{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
