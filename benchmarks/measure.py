"""How everything here is measured and recorded: seconds, memory, what a large copy reaches, and files in results/."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpa.environment import versions
from lpa.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Run = Callable[[], object]


def device() -> str:
    """ "cuda" on a machine with a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- time ------------------------------------------------------------------------------------------------------------


@cache
def _larger_than_any_cache() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def cold() -> None:
    """Turn everything else out of a GPU's L2. A CPU's large cases are larger than its caches, or share of them."""
    if device() == "cuda":
        _larger_than_any_cache().zero_()


def seconds(run: Run) -> float:
    """How long one call takes: on a GPU by events and from a cold L2, on one CPU thread in CPU time."""
    if device() == "cuda":
        cold()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # CPU time, where it says all
    begin = clock()
    run()
    return clock() - begin


def in_turns(runs: Mapping[str, Run], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, by name, one after the other in every round: a noisy machine then hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(warm_up + rounds):
        gc.collect()
        for name, run in runs.items():
            spent = seconds(run)
            if lap >= warm_up:
                taken[name].append(spent)
    return taken


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of one way's seconds by another's."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """A line of this process's memory status ("VmRSS", "VmHWM"), in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def peak_above_start(run: Run, calls: int = 0) -> float:
    """MiB that a call's peak resident set lies above what the process held before it, after some calls before."""
    for _ in range(calls):
        run()
    gc.collect()
    if calls:  # else the call could take what they left with the process
        ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return resident("VmHWM") - before


def peak_in_a_process(module: str, expression: str, calls: int = 0) -> float:
    """`peak_above_start` in a process of its own, of the function that an expression in `module` gives."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); from {module} import *;"
        f"from benchmarks.measure import peak_above_start; print(peak_above_start({expression}, {calls}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout.split()[-1])


# ---- ceilings --------------------------------------------------------------------------------------------------------


@cache
def copy_bandwidth(elements: int = 1 << 27) -> float:
    """Bytes read and written a second by a large copy on this device: the ceiling of whatever moves memory."""
    source = torch.randn(elements, device=device())
    target = torch.zeros_like(source)
    return _bandwidth(lambda: target.copy_(source), source)


@cache
def scale_bandwidth(elements: int = 1 << 27) -> float:
    """The same of a multiplication in place. A CPU's copy reads the lines that it overwrites, and this does not."""
    source = torch.randn(elements, device=device())
    return _bandwidth(lambda: source.mul_(1.0001), source)


@cache
def product_rate() -> float:
    """Floating-point operations a second of a large product in float32: the ceiling of a CPU's products."""
    size = 8192 if device() == "cuda" else 1024  # a small one leaves most of a GPU idle
    a, b = (torch.randn(size, size, device=device()) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(7))


def _bandwidth(run: Run, tensor: Tensor) -> float:
    return 2 * tensor.nbytes / min(seconds(run) for _ in range(7))  # a ceiling is the best that was seen


# ---- records ---------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The GPU's name; or the CPU's, with the instruction set that the native kernels use there."""
    from lpa_kernels.ops import native

    if device() == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    name = names[0] if names else platform.machine()
    return f"{name} ({torch.ops.lpa_kernels_native.cpu_kernels()})" if native.BUILT else name


def revision(folder: Path = ROOT) -> str | None:
    """The commit that a clone is at; None where there is no clone, or no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command() -> str:
    """This process's command line, without the folders that only this machine has."""
    spec = vars(sys.modules["__main__"]).get("__spec__")
    module = spec and spec.name.removesuffix(".__main__")
    words = ["-m", module, *sys.argv[1:]] if module else sys.argv
    places = [Path(word).resolve() if Path(word).is_absolute() or word == sys.argv[0] else None for word in words]
    shown = [str(p.relative_to(ROOT)) if p and p.is_relative_to(ROOT) else p.name if p else word
             for word, p in zip(words, places, strict=True)]  # fmt: skip
    return shlex.join(["python", *shown])


def made_with() -> dict[str, Any]:
    """What heads a record: command, date, versions, processor, threads."""
    return {"command": command(), "date": time.strftime("%Y-%m-%d"), "versions": versions(),
            "processor": processor(), "threads": torch.get_num_threads()}  # fmt: skip


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = ["| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |\n" for line in (head, *rows)]
    return "".join([lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]])


def write_record(path: Path, record: Mapping[str, Any], page: str = "") -> None:
    """A record as JSON, and its page beside it, headed by what it was made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    if page:
        head = f"`{record['command']}`, {record['date']}, torch {record['versions']['torch']}, {record['processor']}"
        write_text(path.with_suffix(".md"), f"{head}, threads: {record['threads']}\n\n{page.rstrip()}\n")
