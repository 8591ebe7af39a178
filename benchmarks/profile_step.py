"""Profile one LPA step, before (the conventional engine) and after (packed), and write the shares of its time.

    python -m benchmarks.profile_step [--shape smollm2]

Writes benchmarks/results/profile-<device>-<shape>.json and .md: self CPU (or device) time by operation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loop_cases import LPA_STEPS, SHAPES
from benchmarks.op_cases import device

GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "baddbmm"),
    "attention": ("attention",),
    "the ops of this package": ("lpa_kernels", "index", "scatter", "gather"),
    "softmax and losses": ("softmax", "logsumexp", "cross_entropy", "nll_loss", "log_sigmoid"),
    "elementwise and norms": ("mul", "add", "silu", "rsqrt", "mean", "pow", "neg", "sub", "div", "where", "exp", "sum"),
    "copies and allocation": (
        "copy",
        "clone",
        "contiguous",
        "empty",
        "zero",
        "cat",
        "fill",
        "to",
        "as_strided",
        "view",
    ),
}
# The same of kernels on a GPU, by words in their names; the first that fits.
KERNELS = {
    "compiled": ("triton_",),  # Inductor's, which are named after all the operations that they fuse
    "attention": ("fmha", "flash", "attention", "sdpa"),
    "this package's kernels": ("_perturb", "_update", "update_kernel", "_scan_part", "_finish_part", "_row"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "gemv", "wgmma"),
    "copies, casts, indexing": ("copy", "memcpy", "memset", "fill", "cat", "index", "scatter", "gather"),
    "softmax and losses": ("softmax", "logsumexp", "nll", "cross_entropy"),
    "norms": ("norm", "rms"),
    "elementwise and sums": ("elementwise", "reduce", "sum", "silu", "mul", "add"),
}


def group_of(name: str, groups: dict[str, tuple[str, ...]] | None = None) -> str:
    """Which row of the table an operation, or a kernel, belongs to."""
    for group, words in (GROUPS if groups is None else groups).items():
        if any(word in name for word in words):
            return group
    return "everything else, Python's share included"


def shares(shape: str, way: str, steps: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of one LPA step, and the share of each group."""
    run = LPA_STEPS[way](shape, steps)
    run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device() == "cuda" else [])
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        run()
        wall = (time.perf_counter() - begin) * 1e3
    cuda = device() == "cuda"
    groups = KERNELS if cuda else GROUPS
    spent = dict.fromkeys([*groups, group_of("")], 0.0)
    for event in found.key_averages():
        # on a GPU the kernels alone: an operation is said to have taken the time of those that it launched once more
        if event.device_type == (torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU):
            micro = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[group_of(event.key.lower(), groups)] += micro / 1e3
    total = sum(spent.values())
    return wall, {name: ms / total for name, ms in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {way: shares(args.shape, way, args.steps) for way in LPA_STEPS}
    ways = list(found)
    lines = [
        f"`python -m benchmarks.profile_step --shape {args.shape}`, {time.strftime('%Y-%m-%d')}, one thread: "
        f"{SHAPES[args.shape].name}; {args.steps} inner steps and 4 updates",
        "",
        "| | " + " | ".join(ways) + " |",
        "|---|" + "---|" * len(ways),
        "| milliseconds (under the profiler) | " + " | ".join(f"{found[w][0]:.0f}" for w in ways) + " |",
    ]
    for group in found[ways[0]][1]:
        lines.append(f"| {group} | " + " | ".join(f"{found[w][1][group]:.0%}" for w in ways) + " |")
    target = Path(__file__).with_name("results") / f"profile-{device()}-{args.shape}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    target.with_suffix(".json").write_text(
        json.dumps({w: {"milliseconds": ms, "shares": parts} for w, (ms, parts) in found.items()}, indent=1) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
