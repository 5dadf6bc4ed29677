#!/usr/bin/env python3
"""What a training job costs those who are served, and what serving leaves it (not part of build or tests).

Needs only Python and a quiet machine; starts a server of the demo model of its own:

    cargo build --release --locked && python3 benches/beside_training.py target/release/polylora

Three loads, in turns with and without a job: one stream, 16 streams, and single requests that come to an idle server. The job is paused for the
turns without it. Prompts differ from turn to turn. One JSON line a round; then the job alone on the idle server beside `polylora train`.
"""
import argparse
import json
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from served import ask

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "adapters" / "butler" / "train.jsonl"
BASE = "smollm2-135m-instruct"
JOBS = "/v1/fine_tuning/jobs"
LOADS = {
    "1 stream": ["--concurrency", "1", "--requests", "{n}", "--max-tokens", "128", "--ignore-eos"],
    "16 streams": ["--concurrency", "16", "--requests", "{n16}", "--max-tokens", "128", "--ignore-eos"],
    "from idle": ["--rate", "2", "--requests", "{idle}", "--max-tokens", "4"],
}


def post(url, route):
    return json.load(urllib.request.urlopen(urllib.request.Request(url + route, b"{}", {"Content-Type": "application/json"}, method="POST")))


def upload(url):
    body = b"--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--b\r\n" \
           b"content-disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\n\r\n" + DATA.read_bytes() + b"\r\n--b--\r\n"
    request = urllib.request.Request(url + "/v1/files", body, {"Content-Type": "multipart/form-data; boundary=b"})
    return json.load(urllib.request.urlopen(request))["id"]


def order(url, name):
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 8}}}
    return ask(url, JOBS, {"model": BASE, "training_file": upload(url), "suffix": name, "method": method})["id"]


def load(a, url, kind, seed):
    n = {"n": a.requests, "n16": 4 * a.requests, "idle": 4 * a.requests}
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        words = [w.format(**n) for w in LOADS[kind]]
        subprocess.run([a.binary, "bench", "--url", url, "--models", BASE, "--prompt-tokens", "32", "--endpoint", "completions", "--seed", str(seed),
                        "--json", out.name, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.load(open(out.name))["contenders"][0]["rounds"][0]


def seconds(url):
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("polylora_background_seconds_total"))


def rate(url, job, since):
    """Median tokens a second of the steps that were told after event `since`."""
    page = ask(url, f"{JOBS}/{job}/events?limit=100")["data"]
    rates = [e["data"]["tokens_per_second"] for e in page if e["data"].get("step") and int(e["id"].split("-")[1]) > since]
    return statistics.median(rates) if rates else 0.0


def last(url, job):
    page = ask(url, f"{JOBS}/{job}/events?limit=1")["data"]
    return int(page[0]["id"].split("-")[1]) if page else 0


def measure(a, url):
    job = order(url, "beside")
    seed, ratios = 1, {}
    for turn in range(a.rounds):
        for kind in LOADS:
            found, share = {}, 0.0
            for beside in ((False, True) if turn % 2 == 0 else (True, False)):
                post(url, f"{JOBS}/{job}/{'resume' if beside else 'pause'}") if ask(url, f"{JOBS}/{job}")["polylora"]["paused"] == beside else None
                time.sleep(3)
                begun, was = time.monotonic(), seconds(url)
                found[beside] = load(a, url, kind, seed)
                seed += 1
                if beside:
                    share = (seconds(url) - was) / (time.monotonic() - begun)
            of = lambda name, p: {k: 1000 * r[name][p] for k, r in found.items()}
            gap, first = of("inter_token_seconds", "p99"), of("time_to_first_token_seconds", "p99")
            speed = {k: r["output_tokens_per_second"] for k, r in found.items()}
            row = {"round": turn + 1, "load": kind, "p99 between tokens, ms": [round(gap[k], 2) for k in (False, True)],
                   "p99 to the first, ms": [round(first[k], 2) for k in (False, True)],
                   "tokens/s": [round(speed[k], 1) for k in (False, True)], "training's share of the time": round(share, 3)}
            ratios.setdefault(kind, []).append((gap[True] / max(gap[False], 1e-9), first[True] - first[False], speed[True] / speed[False]))
            print(json.dumps(row), flush=True)
    for kind, rows in ratios.items():
        gap, first, speed = (statistics.median(column) for column in zip(*rows))
        print(f"{kind}: p99 between tokens x {gap:.2f}, p99 to the first token {first:+.1f} ms, tokens/s x {speed:.3f} (medians of {len(rows)})")
    post(url, f"{JOBS}/{job}/cancel")
    job = order(url, "idle")
    time.sleep(20)
    print(f"an idle server trains at {rate(url, job, 0):.0f} tokens/s", flush=True)
    post(url, f"{JOBS}/{job}/cancel")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("binary")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--requests", type=int, default=8)
    a = p.parse_args()
    url = "http://127.0.0.1:18082"
    with tempfile.TemporaryDirectory() as data:
        server = subprocess.Popen([a.binary, "serve", "--model", BASE, "--port", "18082", "--data-dir", data],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            subprocess.run([a.binary, "health", "--url", url, "--wait", "300"], check=True, stdout=subprocess.DEVNULL)
            measure(a, url)
        finally:
            server.terminate()
            server.wait()
        out = Path(data) / "offline"
        subprocess.run([a.binary, "train", DATA, "--model", BASE, "--epochs", "2", "--batch-size", "8", "--out", out],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [line.split(",") for line in (out / "training_steps.csv").read_text().splitlines()]
        column = rows[0].index("tokens_per_second")
        print(f"polylora train: {statistics.median(float(row[column]) for row in rows[1:]):.0f} tokens/s")


if __name__ == "__main__":
    main()
