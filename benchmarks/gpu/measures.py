"""The plain measures of the pieces: the machine, rates of products, launches, attention's kernels, processes."""

from __future__ import annotations

import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.loop_cases import Shape, model_of
from benchmarks.measure import ROOT, Run, device, revision, seconds
from benchmarks.profile_step import profiled, shares
from lpa.environment import versions
from lpa_kernels.model import forget

Found = dict[str, Any]
SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")


class Skip(Exception):
    """A case cannot run here; the message says why."""


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU now; nothing where there is none."""
    if device() != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def machine() -> Found:
    """The device by name and size, and the versions that results depend on."""
    found: Found = {"versions": versions(), "commit": revision()} | smi(*SMI)
    for name in ("liger-kernel", "flash-attn", "flash-pref"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    if device() == "cuda":
        own = torch.cuda.get_device_properties(0)
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"gpu": own.name, "capability": f"{own.major}.{own.minor}", "memory_bytes": own.total_memory,
                  "multiprocessors": own.multi_processor_count, "l2_bytes": own.L2_cache_size}  # fmt: skip
    return found


# ---- ceilings --------------------------------------------------------------------------------------------------------


def product(rows: int, inputs: int, outputs: int, rounds: int = 15) -> Found:
    """A bf16 product [rows, inputs] x [inputs, outputs] with a linear layer's weight, and that of its gradient."""
    x, grad = (torch.randn(rows, n, device=device()).bfloat16() for n in (inputs, outputs))
    weight = torch.randn(outputs, inputs, device=device()).bfloat16()
    work, found = 2 * rows * inputs * outputs, {"FLOP": 2 * 2 * rows * inputs * outputs}
    for name, run in (("forward", lambda: x @ weight.T), ("gradient", lambda: grad @ weight)):
        for _ in range(3):
            run()
        taken = [seconds(run) for _ in range(rounds)]
        found |= {f"{name} us": statistics.median(taken) * 1e6, f"{name} TFLOP/s": work / min(taken) / 1e12}
    return found


def sustained(size: int, count: int) -> Found:
    """TFLOP/s of large bf16 products without a pause, as a model's are: the clock is what power and heat allow."""
    a, b = (torch.randn(size, size, device=device()).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def many() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    many()
    taken = min(seconds(many) for _ in range(3))
    many()
    return {"TFLOP/s": 2 * size**3 * count / taken / 1e12} | smi("clocks.sm", "power.draw", "temperature.gpu")


def replayed(run: Run, count: int) -> float:
    """Microseconds of a call in a CUDA graph of many, so that the host plays no part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    graph.replay()
    return min(seconds(graph.replay) for _ in range(7)) / count * 1e6


def launch() -> Found:
    """Microseconds of a small operation, one after the other: as PyTorch launches it, and replayed in a graph."""
    x, count = torch.zeros(1024, device=device()), 1000

    def eager() -> None:
        for _ in range(count):
            x.add_(1)

    eager()
    found = {"eager us": min(seconds(eager) for _ in range(5)) / count * 1e6}
    return found | ({"replayed us": replayed(lambda: x.add_(1), count)} if device() == "cuda" else {})


def launches(run: Run) -> int:
    """How many kernels and copies a call launches on the GPU."""
    return profiled(run)[2].total()


# ---- attention -------------------------------------------------------------------------------------------------------


def attended(mask: Tensor, rows: int, heads: int, width: int, backend: SDPBackend | None, score: float = 0.0) -> Found:
    """sdpa under a mask [L, L] of every row, forward and backward: its kernels, microseconds, NaN in the gradients.

    Args:
        backend: None leaves the choice to torch. score: added to every score; far below zero, logsumexps are too.
    """
    shape = rows, heads, len(mask), width
    q, k, v = (torch.randn(shape, device=mask.device).bfloat16() for _ in range(3))
    if score:
        large = (abs(score) * width**0.5 / width) ** 0.5
        q, k = torch.full_like(q, large) + q / 8, torch.full_like(k, -large) + k / 8
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out: list[Tensor] = []
    whole = mask.expand(rows, 1, *mask.shape).contiguous()  # as transformers hands it on

    def run() -> None:
        attention = F.scaled_dot_product_attention(*leaves, whole)
        out[:] = torch.autograd.grad(attention, leaves, torch.ones_like(attention))

    with nullcontext() if backend is None else sdpa_kernel(backend):
        _, spent, _ = profiled(run)
        taken = statistics.median(seconds(run) for _ in range(5))
    kernels = [name[:100] for name, _ in spent.most_common(8)]
    return {"us": taken * 1e6, "NaN": sum(int(g.isnan().sum()) for g in out), "kernels": kernels}


# ---- an attack's time and memory -------------------------------------------------------------------------------------


def synchronized() -> float:
    """Seconds, after the device has done all it was given."""
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh() -> None:
    """No cache of an earlier way; peaks count from here."""
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> Found:
    """The most that tensors took and that was held of the device since `fresh`, in GB of 10^9 bytes."""
    if device() != "cuda":
        return {}
    return {"peak allocated GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "peak reserved GB": round(torch.cuda.max_memory_reserved() / 1e9, 2)}  # fmt: skip


def attack_time(make: Callable[[], Run], own: Shape, steps: int, rounds: int) -> Found:
    """Milliseconds of an inner step, all that an attack does shared among its steps: the median of the rounds."""
    forget(model_of(own))
    fresh()
    run = make()
    begin = synchronized()
    run()
    found: Found = {"first attack s": round(synchronized() - begin, 3)}  # with probes, captures, compilation
    taken, result = [], None
    for _ in range(rounds):
        begin = synchronized()
        result = run()
        taken.append((synchronized() - begin) / steps * 1e3)
    found |= {"ms": statistics.median(taken), "rounds": [round(t, 3) for t in taken]} | peaks()
    for name in ("engine", "reason", "captured"):
        found |= {name: getattr(result, name)} if hasattr(result, name) else {}
    return found


def where_time_goes(run: Run, steps: int) -> Found:
    """Shares of an attack's time on the device by kind of kernel, milliseconds of the longest kernels a step."""
    wall, spent, calls = profiled(run)
    longest = {name[:100]: {"ms": round(ms / steps, 4)} for name, ms in spent.most_common(30)}
    return {"wall ms": wall / steps, "busy ms": spent.total() / steps, "kernels": calls.total() // steps,
            **{name: round(share, 4) for name, share in shares(spent).items()}, "longest": longest}  # fmt: skip


# ---- processes -------------------------------------------------------------------------------------------------------


def process(words: list[str], limit: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's output, in the repository's root.

    Raises:
        TimeoutExpired: it took longer than `limit` seconds.
    """
    return subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit,
                          env=os.environ | environment)  # fmt: skip


def tests(path: str) -> Found:
    """How many of a file's tests passed; a failure is an error that names some."""
    words = ["-m", "pytest", "-o", "addopts=", "-m", "not ranks", "-p", "no:cacheprovider", "-rfE", "--tb=short", path]
    done = process([sys.executable, *words], 400)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-2000:])}
    if done.returncode not in (0, 5):  # 5: no test is there
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        raise RuntimeError(f"{counts}; {', '.join(names[:12])}" if names else done.stdout[-800:])
    return counts


def sanitized(tool: str) -> Found:
    """One of compute-sanitizer's tools over `small_ops`."""
    if device() != "cuda":
        raise Skip("compute-sanitizer watches GPUs")
    if shutil.which("compute-sanitizer") is None:
        raise Skip("there is no compute-sanitizer on the path")
    program = [sys.executable, "-c", "from benchmarks.gpu.measures import small_ops; print(small_ops())"]
    words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "20", *program]
    # without torch's cache of memory every tensor is an allocation of its own, whose end is seen
    done = process(words, 420, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in done.stdout:
        raise Skip("compute-sanitizer cannot watch this device")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-800:]}")
    return {"summary": "; ".join(line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line)}


def small_ops() -> Found:
    """Every op on every fast backend of this device once, at small, odd shapes: what compute-sanitizer watches."""
    from lpa_kernels.ops import native, registry
    from tests.support import block_cases as block
    from tests.support import op_cases as plain

    where, calls = device(), 0
    for dtype in (torch.float32, torch.bfloat16):
        rules = ((33, 1, "adamw", "l2"), (576, 2, "adamw", "l2"), (64, 2, "normalised", "linf"),
                 (4100, 2, "sign", "none"), (8192, 1, "adamw", "linf"), (20000, 2, "adamw", "l2"))  # fmt: skip
        attention = [{}, {"few": True}, {"window": 4, "softcap": 5.0}, {"rotated": 0, "padding": 3}]
        cases = [
            ("perturb", plain.perturb_case(17, 5, 33, dtype, device=where)),
            ("perturb", plain.perturb_case(40, 20, 576, dtype, layout="rows", device=where)),
            *(("pgd_update_", plain.update_case(3, 7, width, 11, shares, dtype, rule=rule, norm=norm, device=where))
              for width, shares, rule, norm in rules),
            *(("token_loss_", plain.loss_case(*sizes, dtype, device=where))
              for sizes in ((5, 97), (3, 40000), (200, 515))),
            *(("add_norm", block.norm_case(17, width, dtype, rank=rank, device=where))
              for width, rank in ((33, 0), (300, 16 if where == "cuda" else 0), (9000, 0))),
            *(("add_norm_backward", block.norm_backward_case(17, width, dtype, device=where)) for width in (33, 9000)),
            ("swiglu", block.gate_case(17, 33, dtype, layout="rows", device=where)),
            ("swiglu_backward_", block.gate_case(17, 33, dtype, backward=True, device=where)),
            *(("rotate_", block.rotate_case(dtype, device=where, **options)) for options in attention[:3]),
            *(("attention", block.attention_case(dtype, device=where, **options)) for options in attention),
            *(("attention_backward_", block.attention_case(dtype, backward=True, device=where, **options))
              for options in attention),
        ]  # fmt: skip
        for op, case in cases:
            for backend in ("triton", "native") if where == "cuda" else ("native", "reference"):
                there = backend == "reference" or (op, backend) in registry.table()
                if there and not (backend == "native" and not native.built_for(op, where)):
                    plain.implementation(op, backend, case)(*case)
                    calls += 1
    synchronized()
    return {"calls": calls}
