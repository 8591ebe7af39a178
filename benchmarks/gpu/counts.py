"""What an inner step at 8B is before any GPU has run it: operations, bytes and launches, counted on the meta device.

    python -m benchmarks.gpu.counts --out benchmarks/results/counts-8b.json

The code that runs is run, on tensors without memory. Bytes are those of every operation's inputs and outputs, as eager
PyTorch reads and writes them, and of a gather those that it takes; this package's ops count what their kernels must
move.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lpa_kernels.attack.loop import InnerStep
from lpa_kernels.ops import registry

from .machine import versions
from .shapes import counted, public_work

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
# products of queries, keys, values and their gradients in each
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
GATHERS = ("embedding", "gather", "index", "index_select")


def size(tensor: Tensor) -> int:
    """Bytes that reading or writing it all moves: of a tensor that repeats its memory, that memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Traffic(TorchDispatchMode):
    """Within it, every operation that is no view, by kind, floating-point operations and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, int, int]] = Counter()  # (kind, operations, bytes) of one -> how many
        self.own = False  # within one of this package's ops
        self.inside = False  # within an inner step

    @property
    def bytes(self) -> Counter[str]:
        """By kind."""
        found: Counter[str] = Counter()
        for (kind, _, number), many in self.kernels.items():
            found[kind] += number * many
        return found

    @property
    def launches(self) -> Counter[str]:
        """By kind."""
        found: Counter[str] = Counter()
        for (kind, _, _), many in self.kernels.items():
            found[kind] += many
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        moved = [*given, *(t for t in tree_leaves(result) if isinstance(t, Tensor))]
        if self.own or func.is_view or not moved or name.startswith(("empty", "new_empty", "_unsafe_view")):
            return result
        kind, work, number = "the rest", 0, sum(map(size, moved))
        if name in PRODUCTS:
            a, b = given[-2:]
            kind, work = "products", 2 * a.numel() * b.shape[-1]
        elif name in ATTENTION:
            query, key = given[1:3] if name.endswith("backward") else given[:2]
            kind, work = "attention", 2 * ATTENTION[name] * query.numel() * key.shape[-2]
        elif name in GATHERS:
            number -= max(size(given[0]) - size(result), 0)
        self.kernels[kind, work, number] += 1
        return result

    def count(self, op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as one launch that reads its inputs and writes its outputs once."""

        def run(*args: Any) -> Any:
            self.own, outer = True, self.own
            try:
                result = fn(*args)
            finally:
                self.own = outer
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            # written where they are: delta and its moments; the logits
            again = [t for t in args[:3] if t is not None] if op == "pgd_update_" else [args[0]] * (op == "token_loss_")
            if self.inside and not self.own:
                self.kernels["this package's ops", 0, sum(map(size, [*tensors, *again]))] += 1
            return result

        return run


@contextmanager
def watched(traffic: Traffic) -> Iterator[None]:
    """Within it, inner steps are counted, and nothing else."""
    step = InnerStep.__call__

    def run(self: InnerStep) -> None:
        traffic.inside = True
        try:
            with traffic:
                step(self)
        finally:
            traffic.inside = False

    table = {
        (op, "reference"): registry.Impl(traffic.count(op, impl.fn), impl.unsupported)
        for (op, backend), impl in registry._table.items() if backend == "reference"
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(InnerStep, "__call__", run))
        stack.enter_context(mock.patch.dict(registry._table, table))
        yield


def counts(family: str, pairs: int, merged: bool, rates: Rates, dry: bool = False) -> dict[str, Any]:
    """One packed inner step's operations, bytes, launches, and what they would take at some rates; and the operations
    of the public loop's two passes."""
    traffic = Traffic()
    with watched(traffic):
        work = counted.__wrapped__(family, pairs, dry, merged)
    return work | {
        "FLOP of the public loop": public_work(family, pairs, dry),
        "GB": {kind: round(number / 1e9, 2) for kind, number in traffic.bytes.items()},
        "launches": dict(traffic.launches),
        "ms by the assumed rates": rates.times(work["FLOP"], traffic),
    }


@dataclass(frozen=True)
class Rates:
    """What a GPU is assumed to do: operations and bytes a second, and the seconds of the smallest kernel."""

    flops: float
    bandwidth: float
    launch: float

    def times(self, work: float, traffic: Traffic) -> dict[str, float]:
        """Milliseconds: each kernel takes the longest of its operations, its bytes and a launch."""
        found = dict.fromkeys(("products", *traffic.bytes), 0.0)
        for (kind, flop, number), many in traffic.kernels.items():
            found[kind] += many * max(flop / self.flops, number / self.bandwidth, self.launch)
        found = {"floor": work / self.flops, **found, "step": sum(found.values())}
        return {kind: round(seconds * 1e3, 2) for kind, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tflops", type=float, default=790.0, help="assumed rate of bf16 products")
    parser.add_argument("--gbs", type=float, default=2700.0, help="assumed bandwidth of memory")
    parser.add_argument("--launch", type=float, default=2.0, help="assumed microseconds of the smallest kernel")
    args = parser.parse_args()
    assumed = {"TFLOP/s": args.tflops, "GB/s": args.gbs, "us a kernel": args.launch}
    rates = Rates(args.tflops * 1e12, args.gbs * 1e9, args.launch * 1e-6)
    found = {}
    for family in ("llama", "qwen3"):
        for pairs in (2, 8, 16):
            for merged in (False, True):
                name = f"{family}, {pairs} pairs{', merged' if merged else ''}"
                found[name] = counts(family, pairs, merged, rates)
                print(name, json.dumps(found[name]), flush=True)
    if args.out:
        record = {"what": "counted on the meta device; nothing was measured, and no GPU was there", "command":
                  f"python -m benchmarks.gpu.counts --out {args.out}", "versions": versions(), "assumed": assumed,
                  "steps": found}  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
