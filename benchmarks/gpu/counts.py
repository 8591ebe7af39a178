"""Count an inner step of the frozen stack at 8B on tensors without memory: launches, bytes, and the time they predict.

    python -m benchmarks.gpu.counts [--out benchmarks/results/counts-stack-8b.json]

Nothing is measured and no GPU is needed. The code that runs on a GPU is run: every launch of a Triton kernel is caught
and counted with the tensors it is given, each read or written once, and twice where a kernel overwrites what it reads.
PyTorch's own operations count the bytes of their inputs and outputs, and of a gather those that it takes.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.shapes import counted, shape
from benchmarks.loop_cases import EPSILON, LORA, STEP_SIZE, Shape, batch_of
from benchmarks.measure import made_with, table, write_record
from lpa_kernels.attack import loop, settings, stacked, state
from lpa_kernels.attack.layout import pack
from lpa_kernels.model import blocks, joined, resolve_sites, stack
from lpa_kernels.ops.triton import launch

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
GATHERS = ("embedding", "gather", "index", "index_select")
FREE = ("empty", "new_empty", "_unsafe_view", "detach", "alias")
AGAIN = {  # what a kernel overwrites, by its name
    "_swiglu_backward": ("gate", "up"),
    "_update": ("delta", "exp_avg", "exp_avg_sq"),
    "_row": ("logits",),
    "_finish_part": ("logits",),
}
ATTENTION = {"_attention": 2, "_gradient_of_queries": 3, "_gradient_of_keys": 4}  # products of a query with a key
FLOPS, BANDWIDTH, LAUNCH = 790e12, 2700e9, 2e-6  # assumed: an H100 (SXM) at 80% of its datasheet
ROWS, WIDTHS, MULTIPROCESSORS = 128, (64, 128, 256), 132  # tiles of a product


class Kernel(NamedTuple):
    """A launch: its name, whether it is a matrix product, its operations, its bytes, and a product's [M, N]."""

    name: str
    product: bool
    work: int
    bytes: int
    sides: tuple[int, int] = (0, 0)

    def seconds(self, tiles: bool = False) -> float:
        """By the assumed rates, the longest of operations, bytes and a launch. tiles: products come in whole waves."""
        share = self.in_waves() if tiles and self.product else 1.0
        return max(self.work / FLOPS / share, self.bytes / BANDWIDTH, LAUNCH)

    def in_waves(self) -> float:
        """The share of a GPU's tiles that a product fills, by the best of the widths."""
        m, n = self.sides

        def share(width: int) -> float:
            tiles = math.ceil(m / ROWS) * math.ceil(n / width)
            return m * n / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS * ROWS * width)

        return max(map(share, WIDTHS))


def size(tensor: Tensor) -> int:
    """Bytes that reading or writing it all moves: of a tensor that repeats its memory, that memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Launches(TorchDispatchMode):
    """Within it, every launch, and the most bytes that tensors made within it took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def _hold(self, made: list[Tensor], given: list[Tensor]) -> None:
        """Count the memory of what an operation made, unless it was there before."""
        before = {t.untyped_storage()._cdata for t in given}
        for t in made:
            memory = t.untyped_storage()
            if memory._cdata not in before:
                self._alive[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(number for _, number in self._alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self._hold(made, given)
        if func.is_view or not (given or made) or name.startswith(FREE):
            return result
        number, work, sides = sum(map(size, [*given, *made])), 0, (0, 0)
        if name in PRODUCTS:
            a, b = given[-2:]
            work, sides = 2 * a.numel() * b.shape[-1], (a.numel() // a.shape[-1], b.shape[-1])
        elif name in GATHERS:
            number -= max(size(given[0]) - size(made[0]), 0)
        self.kernels[Kernel(name, name in PRODUCTS, work, number, sides)] += 1
        return result

    def triton(self, kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
        """What stands in the place of a Triton kernel's launch."""
        name, named = kernel.fn.__name__, dict(zip(kernel.arg_names, args, strict=False))
        moved = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        number = sum(map(size, [*moved, *(named[key] for key in AGAIN.get(name, ()) if named[key] is not None)]))
        work = 0
        if name in ATTENTION:
            work = 2 * ATTENTION[name] * named["q"].numel() * (named["k"].shape[0] // grid[2])
        self.kernels[Kernel(name, False, work, number)] += 1


def model_on_meta(own: Shape) -> Any:
    """The model of a shape, its adapters in the weights' dtype as in an attack, on tensors without memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.family, **own.config), dtype=own.dtype)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    return model.to(own.dtype).requires_grad_(False).eval()


def on_meta(value: Any) -> Any:
    """`value` with its tensors, and those of the tuples and dataclasses in it, without memory."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_meta, value))
    if isinstance(value, stack.Tokens):
        return replace(value, **{name: on_meta(part) for name, part in vars(value).items()})
    return value


@contextmanager
def without_values(own: Shape, launches: Launches) -> Iterator[None]:
    """Within it a stack is built from shapes alone, and Triton's kernels are counted instead of launched."""
    from triton.runtime.jit import JITFunction

    heads = own.config["num_attention_heads"]
    width = own.config["hidden_size"]
    turn = torch.empty(own.prompt + own.chosen + 1, (own.config.get("head_dim") or width // heads) // 2, device="meta")
    depth = own.config["num_hidden_layers"]

    @contextmanager
    def observed(model: Any) -> Iterator[tuple[list[Any], list[Tensor]]]:
        yield [], [torch.empty((), device="meta")]

    class Streams(stacked.Streams):
        def __init__(self, layout: Any) -> None:
            super().__init__(pack(batch_of(own).to("cpu")))
            for name in ("main", "before", "order", "row_tokens"):
                setattr(self, name, on_meta(getattr(self, name)))

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.triton(kernel, *args, grid=grid, **options)

    with ExitStack() as patches:
        patches.callback(joined.JOINED_ON.discard, "meta")
        joined.JOINED_ON.add("meta")
        for module, name, value in (
            (blocks, "norm_offset", lambda module, eps: 0.0),
            (stacked, "Streams", Streams),
            (stacked, "observed", observed),
            (stacked, "layout_hidden", lambda model, layout: None),
            (stacked, "rules_of", lambda *args: [stack.Rule(0, (turn, turn))] * depth),
            (launch, "unavailable", lambda tensor: None),
            (launch, "multiprocessors", lambda device: MULTIPROCESSORS),
            (JITFunction, "run", run),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield


def bytes_in(value: Any) -> int:
    """Bytes of the memory that the tensors in dictionaries and tuples take, each once."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


class Step(NamedTuple):
    """One inner step of a shape.

    Attributes:
        kernels: its launches.
        saved: bytes that its forward saves. peak: the most that it takes.
        copies: bytes of the adapters' copies, which stay beside the joined weights for as long as an attack.
        moved: bytes that are read and written to join the weights and to part them, once an LPA step.
    """

    kernels: Counter[Kernel]
    saved: int
    peak: int
    copies: int
    moved: int


def step_of(own: Shape) -> Step:
    """The inner step of a shape, run on tensors without memory."""
    launches, batch, model = Launches(), batch_of(own).to("cpu"), model_on_meta(own)
    options = settings.AttackSettings(epsilon=EPSILON, step_size=STEP_SIZE, steps=1, backend="triton")
    with without_values(own, launches), joined.weights_joined(model) as groups:
        layout = pack(batch).changed(lambda t: t.to("meta"))
        widths = [(own.config["hidden_size"], torch.device("meta"))] * len(own.sites)
        held = state.AttackState(options, widths, batch, batch.counts)
        for name, value in vars(held).items():
            setattr(held, name, on_meta(value))
        forward = stacked.StackForward(model, resolve_sites(model, own.sites), layout, "triton", compared=False)
        step = loop.InnerStep(model, options, held, layout, forward, chunked=False)
        step.prepare()
        with torch.no_grad(), launches:
            step()
        kernels = launches.kernels.copy()
        forward.stack.forward(dict(zip(forward.names, held.deltas, strict=True)))
        copies = sum(
            part.numel() * part.element_size()
            for maps in forward.stack.decoder.maps
            if maps.joined is not None and maps.joined.up is not None
            for part in (maps.joined.weight[sum(maps.sizes) :], maps.joined.up)
        )
        weights = sum(weight.numel() * weight.element_size() for group in groups.values() for weight in group.weights)
        return Step(kernels, bytes_in(list(forward.stack.saved.values())), launches.peak, copies, 4 * weights)


def counts(family: str, pairs: int, dry: bool = False) -> dict[str, Any]:
    """An inner step's operations, launches, bytes, and milliseconds by the assumed rates."""
    (kernels, saved, peak, copies, moved), plan = step_of(shape(family, pairs, dry)), counted(family, pairs, dry)
    by_name: dict[str, dict[str, float]] = {}
    for kernel, many in kernels.items():
        row = by_name.setdefault(
            "products" if kernel.product else kernel.name, dict.fromkeys(("launches", "GB", "ms"), 0)
        )
        row["launches"] += many
        row["GB"] += many * kernel.bytes / 1e9
        row["ms"] += many * kernel.seconds() * 1e3
    spent = [sum(many * kernel.seconds(tiles) for kernel, many in kernels.items()) * 1e3 for tiles in (False, True)]
    floor = plan["FLOP"] / FLOPS * 1e3
    return {
        "TFLOP": sum(many * kernel.work for kernel, many in kernels.items()) / 1e12,
        "launches": sum(kernels.values()),
        "GB outside products": sum(row["GB"] for name, row in by_name.items() if name != "products"),
        "floor ms": floor,
        "step ms": spent[0],
        "by the floor": spent[0] / floor,
        "step ms, products in tiles": spent[1],
        "by the floor, products in tiles": spent[1] / floor,
        "GB to join, once": moved / 1e9,
        "saved GB": saved / 1e9,
        "step's GB": peak / 1e9,
        "attack GB": plan["planned attack GB without a step"] + (peak + copies) / 1e9,
        "update GB": plan["planned peak GB"],
        "update GB, checkpointed": plan["planned peak GB, checkpointed"],
        "kernels": {name: by_name[name] for name in sorted(by_name, key=lambda name: -by_name[name]["GB"])},
    }


COLUMNS = {
    "launches": ".0f", "GB outside products": ".1f", "floor ms": ".1f", "step ms": ".1f", "by the floor": ".2f",
    "step ms, products in tiles": ".1f", "by the floor, products in tiles": ".2f", "GB to join, once": ".0f",
    "saved GB": ".2f", "step's GB": ".2f", "attack GB": ".1f", "update GB": ".1f", "update GB, checkpointed": ".1f",
}  # fmt: skip


def summary(steps: dict[str, Any]) -> str:
    """A row a step."""
    rows = [(name, *(format(step[key], form) for key, form in COLUMNS.items())) for name, step in steps.items()]
    return table(("", *COLUMNS), rows)


def by_kernel(steps: dict[str, Any], pairs: int = 16, least: float = 0.1) -> str:
    """Launches and GB of each kernel in the steps of so many pairs; those of fewer GB than `least` are added up."""
    found = {name: step["kernels"] for name, step in steps.items() if name.endswith(f", {pairs} pairs")}
    first = next(iter(found.values()))
    large = [kernel for kernel, row in first.items() if row["GB"] >= least]
    rows = []
    for kernel in [*large, "others"]:
        cells = []
        for kernels in found.values():
            mine = [
                row for name, row in kernels.items() if name == kernel or (kernel == "others" and name not in large)
            ]
            cells += [f"{sum(row['launches'] for row in mine)}", f"{sum(row['GB'] for row in mine):.2f}"]
        rows.append((f"`{kernel}`" if kernel.startswith("_") else kernel, *cells))
    return table(("", *(f"{name}: {what}" for name in found for what in ("launches", "GB"))), rows)


def page(steps: dict[str, Any]) -> str:
    """The tables of the record."""
    return f"Counts and predictions by assumed rates; nothing was measured.\n\n{summary(steps)}\n{by_kernel(steps)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 8, 16])
    args = parser.parse_args()
    steps = {f"{family}, {pairs} pairs": counts(family, pairs) for family in ("llama", "qwen3") for pairs in args.pairs}
    print(page(steps))
    if args.out:
        record = made_with() | {
            "what": "counted on tensors without memory; nothing was measured, and no GPU was there",
            "assumed": {"TFLOP/s": FLOPS / 1e12, "GB/s": BANDWIDTH / 1e9, "us a launch": LAUNCH * 1e6},
            "steps": steps,
        }
        write_record(args.out, record, page(steps))


if __name__ == "__main__":
    main()
