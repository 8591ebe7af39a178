"""Capture one inner step in a CUDA graph and replay it, for every batch whose shape falls into the same bucket."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..model.frozen import Replay, frozen_blocks
from ..model.modes import adapter_state
from ..model.sharding import is_sharded, tell_off
from ..model.walk import modules_of, parameters_of
from ..ops.registry import requested
from .masks import refill_masks
from .packed import InnerStep, layout_rows
from .packing import PADDING, PackedLayout
from .state import AttackState

if TYPE_CHECKING:
    from .pgd import LatentPGD

logger = logging.getLogger(__name__)

YES = "yes"
GRAPHS = 8  # kept for a model; the one that was used longest ago goes first
GRAPH_BYTES = 1 << 30  # of their inputs, in all; the one in use stays, however large
ONCE = "a batch of its shape is captured when a second one comes"
OUT_OF_MEMORY = "memory ran out for a CUDA graph, which keeps memory of its own"
WARM_UP = 3  # steps before a capture, for what is set up at a first call: kernels, workspaces, allocations

# From a step and what puts its inputs back, a function that runs the step again. One entry a device that has graphs.
Recorder = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]


@dataclass
class Captured:
    """A step on tensors that stay where they are. Holds no reference to the model, which owns it through a weak key.

    Attributes:
        inputs: all that the step reads, in the order of `_inputs`.
        state, layout: the step's own. lower: what the frozen blocks hand on, None where none are frozen.
        replay: runs the step.
    """

    inputs: list[Tensor]
    state: AttackState
    layout: PackedLayout
    lower: Any
    replay: Callable[[], None]


_captured: WeakKeyDictionary[nn.Module, OrderedDict[object, Captured]] = WeakKeyDictionary()
_off: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # why a model's steps are captured no more
_seen: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # hashes of keys that have come once
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class CaptureError(RuntimeError):
    """A step could not be captured; the message says why."""


class _Pool:
    """The memory that all graphs of a device share: nothing in it outlives a replay. It ends with the last of them."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


_pools: WeakValueDictionary[torch.device, _Pool] = WeakValueDictionary()
# For warm-ups and for captures, the same ones always: cuBLAS keeps tens of megabytes for every stream that it has seen.
_streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}


def cuda_graph(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `step`, after some steps on a side stream; `restore` before each, for they change the state.

    Raises:
        torch.OutOfMemoryError: there is no memory for it beside what is held.
        RuntimeError: the step cannot be captured.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    pool = _pools.get(device)
    if pool is None:  # torch refuses to capture into one whose graphs have all died
        pool = _pools[device] = _Pool()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(), torch.cuda.Stream()
    side, recording = _streams[device]
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                restore()
                step()
    finally:  # after an error too: what is left in that stream's queue writes to memory that is given away then
        current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: what a data loader's thread does on the device meanwhile is none of this capture's business.
    # The outer context: a capture that fails at its end would leave its own stream the current one.
    try:
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=pool.handle, stream=recording, capture_error_mode="thread_local"),
        ):
            step()
    except Exception as error:
        _end_allocation(device, pool)
        if isinstance(error.__context__, torch.OutOfMemoryError):  # and then the capture could not be ended either
            raise error.__context__ from None
        raise

    def replay(_: _Pool = pool) -> None:
        graph.replay()

    return replay


def _end_allocation(device: torch.device, pool: _Pool) -> None:
    """What torch leaves out where `capture_end` throws: the pool would go on taking what is allocated, its memory
    would never be given back, and emptying the cache or another capture would be an internal error."""
    with suppress(RuntimeError):  # torch has done it, or the capture had not begun
        torch._C._cuda_endAllocateToPool(device.index, pool.handle)
        torch._C._cuda_releasePool(device.index, pool.handle)


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}


def run(pgd: LatentPGD, state: AttackState, layout: PackedLayout | None) -> str:
    """The inner loop by replays, if it can be: `YES`, or why it has not been run.

    Under "auto" a capture that failed, or for which memory ran out, is the model's last until `forget`.

    Args:
        layout: of the packed engine, None for the others.

    Raises:
        RuntimeError: capture_graph=True and it cannot.
        torch.OutOfMemoryError: capture_graph=True and there is no memory for it.
    """
    if pgd.capture_graph is False:
        return "capture_graph=False"
    reason = _off.get(pgd.model) or _refusal(pgd, state, layout)
    if not reason:
        assert layout is not None
        reason = _try(pgd, state, layout)
    if not reason:
        return YES
    if pgd.capture_graph is True:
        raise RuntimeError(_error(reason))
    told = _told.setdefault(pgd.model, set())
    if reason not in told:
        told.add(reason)
        logger.info("the inner loop of %s is not captured: %s", type(pgd.model).__name__, reason)
    return reason


def _error(reason: str) -> str:
    return f'capture_graph=True, but {reason}; capture_graph="auto" runs the plain loop then'


def _try(pgd: LatentPGD, state: AttackState, layout: PackedLayout) -> str:
    """`_run`; where a capture fails, no more of this model, and its graphs' memory is let go of."""
    try:
        return _run(pgd, state, layout)
    except torch.OutOfMemoryError as error:
        if pgd.capture_graph is True:  # a smaller batch may have room for a graph
            raise torch.OutOfMemoryError(f"{_error(OUT_OF_MEMORY)}: {error}") from error
        reason = OUT_OF_MEMORY
    except CaptureError as error:
        reason = str(error)
    # here, where no traceback holds their tensors any more
    forget(pgd.model)
    _off[pgd.model] = reason
    if pgd.capture_graph == "auto":
        _told.setdefault(pgd.model, set()).add(reason)
        logger.warning("inner loops of %s are captured no more: %s", type(pgd.model).__name__, reason)
    return reason


def _refusal(pgd: LatentPGD, state: AttackState, layout: PackedLayout | None) -> str:
    """Why the loop cannot be captured, as far as that is known beforehand; "" if it may be."""
    devices = sorted({str(p.device) for p in parameters_of(pgd.model)})
    others = sorted(set(pgd.objective.terms) - {"toward", "away"})
    if layout is None:
        return "only the packed engine can be"
    if len(devices) > 1:
        return f"the model is on several devices, {', '.join(devices)}"
    if state.own_rows.device.type not in RECORDERS:
        return f"it runs on {devices[0]}, which has no graphs"
    if is_sharded(pgd.model):
        if pgd.capture_graph == "auto":
            tell_off(pgd.model, "inner steps are not captured in CUDA graphs")
        return "its weights are sharded over ranks, which have to gather them in step"
    if others:
        return f"the term {others[0]!r} counts rows, and a graph's batches are filled up with rows"
    if pgd.norm == "l2_sequence":
        return "norm='l2_sequence' counts rows, and a graph's batches are filled up with rows"
    return ""


def _run(pgd: LatentPGD, state: AttackState, layout: PackedLayout) -> str:
    source = InnerStep(pgd, state.padded(bucketed(state.rows, 32)), padded_layout(layout), True)
    source.prepare()
    source.trim()
    graphs = _captured.setdefault(pgd.model, OrderedDict())
    with _lower_blocks(pgd, source) as lower:
        inputs = _inputs(source, lower)
        key = _key(pgd, inputs)
        if key not in graphs:
            seen = _seen.setdefault(pgd.model, set())
            if pgd.capture_graph == "auto" and hash(key) not in seen:  # warm-ups and a capture would cost some steps
                seen.add(hash(key))
                return ONCE
            graphs[key] = _record(source, lower)
        graphs.move_to_end(key)
        while len(graphs) > GRAPHS or (len(graphs) > 1 and _bytes(graphs.values()) > GRAPH_BYTES):
            graphs.popitem(last=False)
        found = graphs[key]
        if lower is not None:
            lower.output = found.lower
        _fill(found, inputs)
        for _ in range(pgd.steps):
            found.replay()
    state.take(found.state)
    return ""


def _bytes(graphs: Iterable[Captured]) -> int:
    return sum(t.numel() * t.element_size() for graph in graphs for t in graph.inputs)


def _record(source: InnerStep, lower: Replay | None) -> Captured:
    """A copy of the step, captured.

    Raises:
        CaptureError: it cannot be. torch.OutOfMemoryError: there is no memory for it.
    """
    state, layout = source.state.padded(source.state.rows), _changed(source.layout, Tensor.clone)
    step = InnerStep(source.pgd, state, layout, True, source.chunked)
    step.weights = None if source.weights is None else source.weights.clone()
    step.last, step.needed = source.last, None if source.needed is None else source.needed.clone()
    output = None if lower is None else tree_map(_cloned, lower.output)
    given = _inputs(source, lower)
    if lower is not None:
        lower.output = output
    captured = Captured(_inputs(step, lower), state, layout, output, lambda: None)
    device = state.own_rows.device
    try:
        # a graph is of the current device's work, which need not be the model's
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            captured.replay = RECORDERS[device.type](step, lambda: _fill(captured, given))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(f"the capture failed: {error}") from error
    return captured


def _fill(captured: Captured, inputs: list[Tensor]) -> None:
    """Put the inputs of another batch of the same shape in the place of the captured step's."""
    torch._foreach_copy_(captured.inputs, inputs)
    refill_masks(captured.layout)


def _inputs(step: InnerStep, lower: Replay | None) -> list[Tensor]:
    """Every tensor that a step reads and that differs between batches, in a fixed order."""
    found = [*step.state.tensors, *_tensors(step.layout).values(), step.away]
    found += [tensor for tensor in (step.weights, step.needed) if tensor is not None]
    return found + ([] if lower is None else [leaf for leaf in tree_leaves(lower.output) if isinstance(leaf, Tensor)])


def _key(pgd: LatentPGD, inputs: list[Tensor]) -> object:
    """What a graph depends on: the shapes, the settings, the model's adapters and hooks, and where its weights are."""
    backend = requested(pgd.backend)
    settings = (pgd.steps, pgd.norm, pgd.rule, pgd.weight_decay, pgd.clip_grad, pgd.stop_below, backend)
    objective = (repr(pgd.objective), pgd.merge_adapters, pgd.autocast)
    sites = tuple(id(site.module) for site in pgd.sites)
    attention = getattr(getattr(pgd.model, "config", None), "_attn_implementation", None)
    modules = modules_of(pgd.model)
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    weights = hash(tuple(t.data_ptr() for t in (*parameters_of(pgd.model), *buffers)))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    model = (attention, weights, hooks, adapter_state(pgd.model))
    shapes = tuple((tuple(t.shape), t.dtype) for t in inputs)
    return settings, objective, sites, model, shapes


@contextmanager
def _lower_blocks(pgd: LatentPGD, step: InnerStep) -> Iterator[Replay | None]:
    """The blocks below the lowest site run once, outside of the graph; None where there are none."""
    depth = pgd.frozen_depth()
    if not depth:
        yield None
        return
    with frozen_blocks(pgd.model, depth) as replay:
        with torch.no_grad():
            layout_rows(pgd.model, step.layout, step.state.size, True, run_head=False)
        yield replay


def forget(model: nn.Module) -> None:
    """Let go of a model's graphs, of the memory that they hold, and of what is known of captures that failed."""
    _captured.pop(model, None)
    _off.pop(model, None)


# ---- shapes --------------------------------------------------------------------------------------------------------


def bucketed(number: int, least: int) -> int:
    """`number` rounded up to a multiple of `least` or of about a tenth of itself, whichever is more."""
    quantum = max(least, 1 << max(number.bit_length() - 4, 0))
    return -(-number // quantum) * quantum


def padded_layout(layout: PackedLayout) -> PackedLayout:
    """A copy with longer rows, more delta rows (of no token) and more labels (-100), up to the next bucket."""
    (rows, length), labels, deltas = layout.shape, layout.labels.shape[0], layout.row_tokens.shape[0]
    width = bucketed(length, 16)

    def longer(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, width - length), value=fill)

    def more(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, bucketed(labels, 16) - labels), value=fill)

    tokens = layout.row_tokens
    moved = torch.where(tokens < 0, -1, tokens // length * width + tokens % length)
    return replace(
        layout,
        input_ids=longer(layout.input_ids, 0),
        position_ids=longer(layout.position_ids, 0),
        branch=longer(layout.branch, PADDING),
        attention_mask=longer(layout.attention_mask, 0),
        token_rows=longer(layout.token_rows.view(rows, length), -1).flatten(),
        row_tokens=F.pad(moved, (0, 0, 0, bucketed(deltas, 32) - deltas), value=-1),
        select_rows=more(layout.select_rows, 0),
        select_positions=more(layout.select_positions, 0),
        labels=more(layout.labels, -100),
        rejected=more(layout.rejected, False),
        example=more(layout.example, 0),
    )


def _tensors(layout: PackedLayout) -> dict[str, Tensor]:
    held = {f.name: getattr(layout, f.name) for f in fields(layout)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _changed(layout: PackedLayout, change: Callable[[Tensor], Tensor]) -> PackedLayout:
    changed: dict[str, Any] = {name: change(value) for name, value in _tensors(layout).items()}
    return replace(layout, **changed)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
