#!/usr/bin/env python3
"""Rebuilds the PTX beside the CUDA sources, or with --check says whether it is what they give.

The compiler is NVRTC, which is nvcc's as a library: 25 MB from the Python package index, pinned
below, fetched once into a cache; neither a GPU nor a C++ compiler is needed. It is an older release
on purpose: PTX loads only in drivers as new as its compiler, and no package has an nvcc so old.
Besides the PTX, machine code is made for every architecture named below, so that what the assembler
would refuse is found here.

    kernels/cuda/build.py            rebuild
    kernels/cuda/build.py --check    exit code 1 and a line for each file that differs
"""

import argparse
import ctypes
import os
import pathlib
import subprocess
import sys
import venv

NVRTC = "12.4.127"
PACKAGE = f"nvidia-cuda-nvrtc-cu12=={NVRTC}"
HERE = pathlib.Path(__file__).resolve().parent
SOURCES = ["gemm", "lora"]
HEADERS = ["common.cuh"]
PTX_FOR = "compute_80"
CODE_FOR = ["sm_80", "sm_86", "sm_89", "sm_90"]
# Sums are fused where the sources say so and nowhere else, in every kernel alike.
OPTIONS = ["--std=c++17", "--restrict", "--fmad=false"]


def compiler():
    """The pinned library, installed on first use."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    cache = pathlib.Path(base) / "polylora" / f"nvrtc-{NVRTC}"
    found = "lib/python*/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    if not list(cache.glob(found)):
        venv.create(cache, with_pip=True, clear=True)
        pip = [cache / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "install", "--no-deps", "--only-binary", ":all:", PACKAGE],
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            sys.exit(f"error: {PACKAGE} could not be installed, so the PTX is not checked: {why}")
    return ctypes.CDLL(str(next(cache.glob(found))))


class Program:
    """One source, compiled for one target."""

    def __init__(self, nvrtc, name, target):
        self.nvrtc = nvrtc
        self.program = ctypes.c_void_p()
        source = (HERE / f"{name}.cu").read_bytes()
        texts = [(HERE / header).read_bytes() for header in HEADERS]
        self.call(
            "nvrtcCreateProgram",
            ctypes.byref(self.program),
            source,
            f"{name}.cu".encode(),
            len(texts),
            (ctypes.c_char_p * len(texts))(*texts),
            (ctypes.c_char_p * len(texts))(*[header.encode() for header in HEADERS]),
        )
        options = [o.encode() for o in [f"--gpu-architecture={target}", *OPTIONS]]
        array = (ctypes.c_char_p * len(options))(*options)
        code = nvrtc.nvrtcCompileProgram(self.program, len(options), array)
        log = self.read("nvrtcGetProgramLog").rstrip(b"\0").decode().strip()
        if code != 0 or log:
            sys.exit(f"error: {name}.cu for {target}: {log or code}")

    def call(self, function, *arguments):
        code = getattr(self.nvrtc, function)(*arguments)
        if code != 0:
            sys.exit(f"error: {function} failed with {code}")

    def read(self, function):
        size = ctypes.c_size_t()
        self.call(f"{function}Size", self.program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.call(function, self.program, text)
        return text.raw


def ptx(nvrtc, name):
    """The text without what the compiler says of itself and its build."""
    text = Program(nvrtc, name, PTX_FOR).read("nvrtcGetPTX").rstrip(b"\0").decode()
    lines = [line.rstrip() for line in text.splitlines()]
    body = "\n".join(line for line in lines if not line.startswith("//")).strip()
    return f"// Made from {name}.cu by build.py with NVRTC {NVRTC}; not to be edited.\n{body}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args().check
    nvrtc = compiler()
    wrong = []
    for name in SOURCES:
        for target in CODE_FOR:
            Program(nvrtc, name, target).read("nvrtcGetCUBIN")
        path, text = HERE / f"{name}.ptx", ptx(nvrtc, name)
        if check and (not path.exists() or path.read_text() != text):
            wrong.append(f"{path.name} is not what {name}.cu gives: run kernels/cuda/build.py")
        elif not check:
            path.write_text(text)
    if wrong:
        sys.exit("\n".join(f"error: {line}" for line in wrong))
    print(f"{len(SOURCES)} PTX files {'are what their sources give' if check else 'written'}")


if __name__ == "__main__":
    main()
