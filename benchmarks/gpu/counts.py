"""What an inner step at 8B is before any GPU has run it: operations, bytes and launches, counted on the meta device.

    python -m benchmarks.gpu.counts --out benchmarks/results/counts-8b.json

The code that runs is run, on tensors without memory. Bytes are those of every operation's inputs and outputs, as eager
PyTorch reads and writes them; this package's ops count what their kernels must move.
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

from lpa_kernels.attack.packed import InnerStep
from lpa_kernels.ops import registry

from .machine import versions
from .shapes import counted, public_work

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")


def size(tensor: Tensor) -> int:
    """Bytes that reading or writing it all moves: of a tensor that repeats its memory, that memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Traffic(TorchDispatchMode):
    """Within it, bytes and launches of every operation that is no view, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.products: Counter[tuple[int, int]] = Counter()  # (operations, bytes) of one -> how many
        self.own = False  # within one of this package's ops
        self.inside = False  # within an inner step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        moved = [t for t in tree_leaves((args, kwargs or {}, result)) if isinstance(t, Tensor)]
        if not (self.own or func.is_view or not moved or name.startswith(("empty", "new_empty", "_unsafe_view"))):
            kind = "products" if name in PRODUCTS else "attention" if name in ATTENTION else "the rest"
            number = sum(map(size, moved))
            self.bytes[kind] += number
            self.launches[kind] += 1
            if kind == "products":
                a, b = [t for t in args if isinstance(t, Tensor)][-2:]
                self.products[2 * a.numel() * b.shape[-1], number] += 1
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
                self.bytes["this package's ops"] += sum(map(size, [*tensors, *again]))
                self.launches["this package's ops"] += 1
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
        """Milliseconds: every kernel takes the longest of its operations, its bytes and a launch."""
        products = sum(
            number * max(flop / self.flops, size / self.bandwidth, self.launch)
            for (flop, size), number in traffic.products.items()
        )
        rest = {
            kind: max(traffic.bytes[kind] / self.bandwidth, traffic.launches[kind] * self.launch)
            for kind in traffic.bytes if kind != "products"
        }  # fmt: skip
        found = {"floor": work / self.flops, "products": products, **rest, "step": products + sum(rest.values())}
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
