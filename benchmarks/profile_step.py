"""Profile one LPA step, before (the conventional engine) and after (packed), and write the shares of its time.

    python -m benchmarks.profile_step [--shape smollm2]
    python -m benchmarks.profile_step --shape small --ways 'frozen stack'   # inner loops alone

Writes benchmarks/results/profile-<device>-<shape>.json and .md (inner loops: profile-loop-...): self CPU (or device)
time by operation.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loop_cases import LPA_STEPS, SHAPES, WAYS
from benchmarks.measure import RESULTS, Run, device, made_with, table, write_record

REST = "everything else, Python's share included"
GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "baddbmm"),
    "attention": ("attention",),
    "the ops of this package": ("lpa_kernels", "index", "scatter", "gather"),
    "softmax and losses": ("softmax", "logsumexp", "cross_entropy", "nll_loss", "log_sigmoid"),
    "elementwise and norms": ("mul", "add", "silu", "rsqrt", "mean", "pow", "neg", "sub", "div", "where", "exp", "sum"),
    "copies and allocation": (
        "copy", "clone", "contiguous", "empty", "zero", "cat", "fill", "to", "as_strided", "view",
    ),
}  # fmt: skip
# The same of kernels on a GPU, by words in their names; the first that fits.
KERNELS = {
    "compiled": ("triton_",),  # Inductor's, which are named after all the operations that they fuse
    "this package's kernels": (
        "_perturb", "_update", "update_kernel", "_scan_part", "_finish_part", "_row", "_add_norm", "_swiglu",
        "_attention", "_gradient_of_",
    ),
    "attention": ("fmha", "flash", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "gemv", "wgmma"),
    "copies, casts, indexing": ("copy", "memcpy", "memset", "fill", "cat", "index", "scatter", "gather"),
    "softmax and losses": ("softmax", "logsumexp", "nll", "cross_entropy"),
    "norms": ("norm", "rms"),
    "elementwise and sums": ("elementwise", "reduce", "sum", "silu", "mul", "add"),
}  # fmt: skip


def group_of(name: str, groups: dict[str, tuple[str, ...]]) -> str:
    """Which row of the table an operation, or a kernel, belongs to."""
    return next((group for group, words in groups.items() if any(word in name.lower() for word in words)), REST)


def profiled(run: Run) -> tuple[float, Counter[str], Counter[str]]:
    """(milliseconds, milliseconds by name, calls by name) of what a second call runs, on a GPU of its kernels alone."""
    run()
    cuda = device() == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - begin) * 1e3
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    spent, calls = Counter[str](), Counter[str]()
    for event in found.key_averages():
        # an operation is said to have taken the time of the kernels that it launched once more
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            micro = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[event.key] += micro / 1e3
            calls[event.key] += event.count
    return wall, spent, calls


def shares(spent: Counter[str]) -> dict[str, float]:
    """The share of each group in the time by name."""
    groups = KERNELS if device() == "cuda" else GROUPS
    found = dict.fromkeys([*groups, REST], 0.0)
    for name, milliseconds in spent.items():
        found[group_of(name, groups)] += milliseconds / spent.total()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="of inner loops, instead of LPA steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for way, make in {way: WAYS[way] for way in args.ways}.items() if args.ways else LPA_STEPS.items():
        wall, spent, _ = profiled(make(args.shape, args.steps))
        found[way] = {"milliseconds": wall, "shares": shares(spent)}
    rows = [["milliseconds (under the profiler)", *(f"{own['milliseconds']:.0f}" for own in found.values())]]
    names = next(iter(found.values()))["shares"]
    rows += [[group, *(f"{own['shares'][group]:.0%}" for own in found.values())] for group in names]
    title = f"{SHAPES[args.shape].name}; {args.steps} inner steps{'' if args.ways else ' and 4 updates'}\n\n"
    page = title + table(["", *found], rows)
    kind = "profile-loop" if args.ways else "profile"
    write_record(RESULTS / f"{kind}-{device()}-{args.shape}.json", made_with() | {"results": found}, page)
    print(page)


if __name__ == "__main__":
    main()
