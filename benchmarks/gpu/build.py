"""The build and sanitizer pieces: csrc for this GPU, and compute-sanitizer over every op."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .worker import Cases, Setting, Skip

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99  # compute-sanitizer's exit code for errors of the program under it


def command(words: list[str], timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's output, also in this piece's log."""
    try:
        done = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=timeout, env={**os.environ, **environment})  # fmt: skip
    except subprocess.TimeoutExpired as late:
        print((late.stdout or b"").decode("utf-8", "replace"), flush=True)
        raise RuntimeError(f"{words[0]} had not ended after {timeout:.0f} s") from late
    print(done.stdout, flush=True)
    return done


def capability() -> str:
    """Of the first GPU, such as 9.0."""
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability(0))


def registers(target: str) -> dict[str, Any]:
    """What nvcc says of the update kernels."""
    with tempfile.TemporaryDirectory() as folder:
        done = command(["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-c", "csrc/cuda/update.cu",
                        "-o", f"{folder}/update.o"], 280)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {done.stdout[-400:]}")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stdout)]
    return {"target": target, "registers": [int(n) for n in re.findall(r"Used (\d+) registers", done.stdout)],
            "spilled bytes": sum(spilled)}  # fmt: skip


def native(arch: str) -> dict[str, Any]:
    """Build csrc in place, and see that its CUDA op runs."""
    done = command([sys.executable, "setup.py", "build_ext", "--inplace"], 280, LPA_KERNELS_NATIVE="1",
                   TORCH_CUDA_ARCH_LIST=arch, MAX_JOBS=str(os.cpu_count() or 1))  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the build failed: {done.stdout[-400:]}")
    program = (
        "import torch, lpa_kernels; from lpa_kernels.ops import native\n"
        "print(lpa_kernels.backends()); assert native.BUILT\n"
        "assert native.built_for('pgd_update_', 'cuda')\n"
        "d = torch.ones(1, 3, 8, device='cuda'); g = torch.ones(3, 8, device='cuda')\n"
        "lpa_kernels.pgd_update_(d, [g], torch.arange(3, device='cuda')[:, None], step_size=0.5, rule='sign',"
        " norm='none', backend='native')\n"
        "torch.cuda.synchronize(); assert bool((d == 0.5).all()), d"
    )
    done = command([sys.executable, "-c", program], 120)
    if done.returncode:
        raise RuntimeError(f"what was built does not run: {done.stdout[-400:]}")
    return {"architecture": arch, "backends": done.stdout.splitlines()[:4]}


def triton() -> dict[str, Any]:
    """Registers and spills of every Triton kernel, compiled by the Triton that is here."""
    done = command([sys.executable, "-m", "tests.support.compile_triton"], 280)
    if done.returncode:
        raise RuntimeError(f"a kernel spills or does not compile: {done.stdout[-400:]}")
    return {"lines": len(done.stdout.splitlines())}


def build(setting: Setting) -> Cases:
    """The piece."""
    if setting.device != "cuda":
        raise Skip("csrc's CUDA is built for a GPU that is there; test_native.py compiles it where nvcc is")
    if shutil.which("nvcc") is None:
        raise Skip("there is no nvcc on the path")
    arch = capability()
    yield "extension", lambda: native(arch)
    yield "registers", lambda: registers("sm_" + arch.replace(".", ""))
    yield "Triton", triton


def sanitized(tool: str) -> dict[str, Any]:
    """One of compute-sanitizer's tools over `benchmarks.gpu.small_ops`."""
    words = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        "--print-limit",
        "20",
        sys.executable,
        "-m",
        "benchmarks.gpu.small_ops",
    ]
    # without torch's cache of memory every tensor is an allocation of its own, whose end is seen
    done = command(words, 420, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in done.stdout:
        raise Skip("compute-sanitizer cannot watch this device")
    if done.returncode:
        raise RuntimeError(f"{tool}: exit code {done.returncode}: {done.stdout[-400:]}")
    summary = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    calls = re.findall(r"(\d+) calls", done.stdout)
    return {"summary": "; ".join(summary), "calls": int(calls[-1]) if calls else None}


def sanitizer(setting: Setting) -> Cases:
    """The piece."""
    if setting.device != "cuda":
        raise Skip("compute-sanitizer watches GPUs")
    if shutil.which("compute-sanitizer") is None:
        raise Skip("there is no compute-sanitizer on the path")
    for tool in TOOLS:
        yield tool, lambda tool=tool: sanitized(tool)
