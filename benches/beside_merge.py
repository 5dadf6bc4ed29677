#!/usr/bin/env python3
"""What a merge costs those who are served: the times between tokens with and without one, in turns (not part of build or tests).

Needs only Python and a quiet machine; starts a server of the demo model of its own, with eight adapters of rank 16 on all linears:

    cargo build --release --locked && python3 benches/beside_merge.py target/release/polylora

Each round is `polylora bench` on the adapters, once alone and once while merges of all eight follow each other without a gap. Prompts differ
from turn to turn. One JSON line a round: the percentiles of both, how many sites were merged meanwhile, and the ratio of the 99th percentiles.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from served import ask

ROOT = Path(__file__).resolve().parents[1]


class Merging:
    """Merges that follow each other until `stop`."""

    def __init__(self, url, names, method):
        self.order = {"sources": [{"model": n, "weight": 1.0} for n in names], "method": method, "name": "merged", "options": {"rank": 16}}
        self.url, self.stopping, self.sites = url, False, 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def state(self, job):
        found = ask(self.url, f"/v1/merges/{job}")
        progress = found.get("progress") or {"done": 0}
        return found["state"] not in ("done", "failed", "cancelled"), progress["done"]

    def run(self):
        while not self.stopping:
            job, running, sites = ask(self.url, "/v1/merges", self.order)["id"], True, 0
            while running and not self.stopping:
                time.sleep(0.2)
                running, sites = self.state(job)
            self.sites += sites
            if running:
                urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/merges/{job}/cancel", b"", method="POST"))
            while running:
                time.sleep(0.05)
                running, _ = self.state(job)

    def stop(self):
        self.stopping = True
        self.thread.join()


def bench(a, url, seed):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run([a.binary, "bench", "--url", url, "--models", ",".join(f"a{i}" for i in range(1, 9)), "--concurrency", str(a.concurrency),
                        "--requests", str(a.requests), "--max-tokens", "128", "--prompt-tokens", "32", "--ignore-eos", "--endpoint", "completions",
                        "--seed", str(seed), "--json", out.name], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.load(open(out.name))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("binary")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--concurrency", type=int, default=8)
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--method", default="lego")
    a = p.parse_args()
    work = ROOT / "target" / "bench-serve"
    if not (work / "adapters" / "a8" / "adapter_config.json").exists():
        subprocess.run([sys.executable, ROOT / "benches" / "make_adapters.py", "--out", work / "adapters", "--count", "8", "--rank", "16"], check=True)
    url = "http://127.0.0.1:18081"
    adapters = [v for i in range(1, 9) for v in ("--adapter", f"a{i}={work}/adapters/a{i}")]
    with tempfile.TemporaryDirectory() as data:
        server = subprocess.Popen([a.binary, "serve", "--model", "smollm2-135m-instruct", "--port", "18081", "--data-dir", data, *adapters],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            subprocess.run([a.binary, "health", "--url", url, "--wait", "300"], check=True, stdout=subprocess.DEVNULL)
            measure(a, url)
        finally:
            server.terminate()
            server.wait()


def measure(a, url):
    ratios = []
    for turn in range(a.rounds):
        found = {}
        for beside in ((False, True) if turn % 2 == 0 else (True, False)):
            merging = Merging(url, [f"a{i}" for i in range(1, 9)], a.method) if beside else None
            found["beside" if beside else "alone"] = bench(a, url, 2 * turn + beside)["contenders"][0]["rounds"][0]
            if merging:
                merging.stop()
                found["sites"] = merging.sites
        gap = {k: found[k]["inter_token_seconds"] for k in ("alone", "beside")}
        ratios.append(gap["beside"]["p99"] / gap["alone"]["p99"])
        print(json.dumps({"round": turn + 1, **{k: {p: round(1000 * v, 2) for p, v in g.items() if p[0] == "p"} for k, g in gap.items()},
                          "sites merged": found["sites"], "ratio": round(ratios[-1], 3)}), flush=True)
    print(f"p99 between tokens, beside a merge by alone: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
