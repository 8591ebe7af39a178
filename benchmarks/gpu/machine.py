"""What the machine is, and what it does at best: versions, clocks, the rate of a copy and of a matrix product."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.op_cases import copy_bandwidth, scale_bandwidth, seconds
from lpa.environment import versions as package_versions

from .origin import commit
from .worker import Cases, Setting

SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu",
       "power.draw", "power.limit", "memory.total", "memory.used")  # fmt: skip


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now; nothing where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.returncode == 0 else []
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) else {}


def versions() -> dict[str, str]:
    """Of Python, torch, CUDA and what else results depend on."""
    found = package_versions()
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with suppress(PackageNotFoundError):
        found["liger-kernel"] = version("liger-kernel")
    return found


def describe(device: str) -> dict[str, Any]:
    """The device, by name and size, and the versions."""
    found: dict[str, Any] = {"device": device, "versions": versions(), "commit": commit()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "nvidia-smi": smi(),
        }
    else:
        found["gpu"] = None
    return found


def product(rows: int, inner: int, columns: int, device: str, rounds: int = 15) -> dict[str, Any]:
    """Rate of a bf16 product of random matrices [rows, inner] x [inner, columns]: the best and the median."""
    a = torch.randn(rows, inner, device=device).bfloat16()
    b = torch.randn(inner, columns, device=device).bfloat16()
    for _ in range(3):
        a @ b
    taken = [seconds(lambda: a @ b) for _ in range(rounds)]
    work = 2 * rows * inner * columns
    return {"shape": [rows, inner, columns], "TFLOP/s": work / min(taken) / 1e12,
            "median TFLOP/s": work / statistics.median(taken) / 1e12}  # fmt: skip


def sustained(size: int, device: str, products: int) -> dict[str, Any]:
    """The same with no pause between products, as a model's are: the clock is then what power and heat allow."""
    a = torch.randn(size, size, device=device).bfloat16()
    b = torch.randn(size, size, device=device).bfloat16()
    out = torch.empty_like(a)

    def many() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    many()
    taken = min(seconds(many) for _ in range(3))
    found: dict[str, Any] = {"shape": [size] * 3, "products": products,
                             "TFLOP/s": 2 * size**3 * products / taken / 1e12}  # fmt: skip
    if device == "cuda":
        many()
        found["nvidia-smi during"] = smi()
        torch.cuda.synchronize()
    return found


def launch_cost(device: str) -> dict[str, Any]:
    """Microseconds of a small operation, one after the other: as PyTorch launches it, and replayed in a graph."""
    x = torch.zeros(1024, device=device)
    count = 1000

    def eager() -> None:
        for _ in range(count):
            x.add_(1)

    eager()
    found = {"eager us": min(seconds(eager) for _ in range(5)) / count * 1e6}
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        graph.replay()
        found["replayed us"] = min(seconds(graph.replay) for _ in range(5)) / count * 1e6
    return found


def ceilings(setting: Setting) -> Cases:
    """The piece: what the machine is, and the two ceilings that everything else is held against."""
    dry, device = setting.dry, setting.device
    yield "machine", lambda: describe(device)
    elements = 1 << 20 if dry else 1 << 28  # of float32: a GiB, many times any L2

    def bandwidth(measure: Callable[[int], float]) -> dict[str, Any]:
        return {"GB/s": measure(elements) / 1e9, "bytes of each tensor": 4 * elements}

    yield "copy", lambda: bandwidth(copy_bandwidth)
    yield "scale in place", lambda: bandwidth(scale_bandwidth)
    size = 128 if dry else 8192
    yield "bf16 product", lambda: product(size, size, size, device)
    yield "bf16 products without a pause", lambda: sustained(size, device, 2 if dry else 100)
    shapes = [(16, 64, 96)] if dry else [(2272, 4096, 14336), (2272, 4096, 4096), (284, 4096, 14336), (284, 4096, 4096)]
    for rows, inner, columns in shapes:  # an 8B model's, at micro-batches of 16 and 2
        yield (
            f"bf16 product [{rows}, {inner}] x [{inner}, {columns}]",
            lambda s=(rows, inner, columns): product(*s, device),
        )
    yield "launch", lambda: launch_cost(device)
