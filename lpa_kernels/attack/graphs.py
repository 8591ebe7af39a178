"""Capture one inner step in a CUDA graph and replay it, for every batch whose shape falls into the same bucket."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..model.facts import has_foreign_hooks, model_key, remembered, say_once
from ..model.frozen import Replay, frozen_blocks
from ..model.sharding import is_sharded, left_out
from ..model.sites import Site
from ..model.walk import modules_of, spread_over
from ..ops import requested
from .layout import PADDING, Layout
from .loop import HookedForward, InnerStep
from .masks import refill_masks
from .passes import layout_hidden
from .settings import AttackSettings
from .state import AttackState

YES = "yes"
GRAPHS = 8  # kept for a model; the one that was used longest ago goes first
GRAPH_BYTES = 1 << 30  # of their inputs, in all; the one in use stays, however large
ONCE = "a batch of its shape is captured when a second one comes"
OUT_OF_MEMORY = "memory ran out for a CUDA graph, which keeps memory of its own"
WARM_UP = 3  # steps before a capture: a first call compiles kernels and allocates workspaces

# From a step and what puts its inputs back, a function that runs the step again. One entry a device that has graphs.
Recorder = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]


@dataclass
class Captured:
    """A step on tensors that stay where they are. Holds no reference to the model, which owns it through a weak key.

    Attributes:
        inputs: what the step reads beside its state, in the order of `_inputs`.
        state, layout: the step's own. lower: what the frozen blocks hand on, None where none are frozen.
        replay: runs the step.
    """

    inputs: list[Tensor]
    state: AttackState
    layout: Layout
    lower: Any
    replay: Callable[[], None]


class Graphs:
    """The captured steps of a model.

    Attributes:
        kept: by key, those used longest ago first. seen: hashes of shapes that have come once.
        off: why no more steps of the model are captured, "" where they may be.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[object, Captured] = OrderedDict()
        self.seen: set[int] = set()
        self.off = ""


def graphs_of(model: nn.Module) -> Graphs:
    """The graphs of a model, which it has for as long as it lives or until `facts.forget`."""
    return remembered(model, "graphs", None, Graphs)


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
        torch.OutOfMemoryError: there is not enough free memory for it.
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
    finally:  # after an error too: kernels in that stream's queue would write to memory that has been freed
        current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: a data loader's thread may use the device meanwhile.
    # The outer stream: a capture that fails at its end would leave its own one current.
    try:
        with (
            _other_state(torch.cuda.default_generators[device.index]),
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


@contextmanager
def _other_state(generator: torch.Generator) -> Iterator[None]:
    """Within it a generator has another state, of which a graph's replays count: nothing in a step is random.

    Up to torch 2.12 a capture that cannot be ended leaves the state capturing for good. No random number could be drawn
    by it any more, and no other graph replayed.
    """
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


def _end_allocation(device: torch.device, pool: _Pool) -> None:
    """What torch leaves out where `capture_end` throws: the pool would go on taking what is allocated, its memory
    would never be given back, and emptying the cache or another capture would be an internal error."""
    with suppress(RuntimeError):  # torch has ended the capture already, or none was begun
        torch._C._cuda_endAllocateToPool(device.index, pool.handle)
        torch._C._cuda_releasePool(device.index, pool.handle)


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}


def run(
    model: nn.Module,
    sites: Sequence[Site],
    settings: AttackSettings,
    state: AttackState,
    layout: Layout | None,
    depth: int,
) -> str:
    """The inner loop by replays, if it can be: `YES`, or why it has not been run.

    Under "auto" a capture that failed, or for which memory ran out, is the model's last until `forget`.

    Args:
        layout: of the packed engine, None for the others.
        depth: how many of the lowest blocks are run once.

    Raises:
        RuntimeError: capture_graph="on" and it cannot.
        torch.OutOfMemoryError: capture_graph="on" and there is no memory for it.
    """
    if settings.capture_graph == "off":
        return "capture_graph='off'"
    reason = graphs_of(model).off or _refusal(model, settings, state, layout)
    if not reason:
        assert layout is not None
        reason = _try(_Loop(model, sites, settings, depth), state, layout)
    if not reason:
        return YES
    if settings.capture_graph == "on":
        raise RuntimeError(_error(reason))
    say_once(model, f"the inner loop of {type(model).__name__} is not captured: {reason}", logging.INFO)
    return reason


class _Loop(NamedTuple):
    """What is run, whatever the batch."""

    model: nn.Module
    sites: Sequence[Site]
    settings: AttackSettings
    depth: int


def _error(reason: str) -> str:
    return f'capture_graph="on", but {reason}; capture_graph="auto" runs the plain loop then'


def _try(loop: _Loop, state: AttackState, layout: Layout) -> str:
    """`_run`; where a capture fails, no more of this model, and its graphs' memory is let go of."""
    model, required = loop.model, loop.settings.capture_graph == "on"
    try:
        return _run(loop, state, layout)
    except torch.OutOfMemoryError as error:
        if required:  # a smaller batch may have room for a graph
            raise torch.OutOfMemoryError(f"{_error(OUT_OF_MEMORY)}: {error}") from error
        reason = OUT_OF_MEMORY
    except CaptureError as error:
        reason = str(error)
    # here, where no traceback holds their tensors any more
    forget_graphs(model)
    graphs_of(model).off = reason
    if not required:
        say_once(model, f"inner loops of {type(model).__name__} are captured no more: {reason}")
    return reason


def _refusal(model: nn.Module, settings: AttackSettings, state: AttackState, layout: Layout | None) -> str:
    """Why the loop cannot be captured, as far as that is known beforehand; "" if it may be."""
    others = sorted(set(settings.objective.terms) - {"toward", "away"})
    if layout is None:
        return "only the packed engine can be"
    if reason := spread_over(model):
        return reason
    if (device := state.own_rows.device).type not in RECORDERS:
        return f"it runs on {device}, which has no graphs"
    if is_sharded(model):
        if settings.capture_graph == "auto":
            say_once(model, left_out(model, "inner steps are not captured in CUDA graphs"))
        return "its weights are sharded over ranks, which have to gather them in step"
    if settings.capture_graph == "auto" and any(map(has_foreign_hooks, modules_of(model))):
        return "a hook on one of its modules may do something else at every step, and a graph repeats one step"
    if others:
        return f"the term {others[0]!r} counts rows, and a graph's batches are filled up with rows"
    if settings.norm == "l2_sequence":
        return "norm='l2_sequence' counts rows, and a graph's batches are filled up with rows"
    return ""


def _run(loop: _Loop, state: AttackState, layout: Layout) -> str:
    model, settings = loop.model, loop.settings
    graphs = graphs_of(model)
    rows, shape = bucketed(state.rows, 32), _bucket(layout)
    key = _key(loop, state, rows, shape)
    if key not in graphs.kept and settings.capture_graph == "auto" and hash(key) not in graphs.seen:
        graphs.seen.add(hash(key))  # warm-ups and a capture would cost some steps
        return ONCE
    source = _step(loop, state, padded_layout(layout))
    source.prepare()
    with _lower_blocks(loop, source) as lower:
        if key not in graphs.kept:
            graphs.kept[key] = _record(loop, source, rows, lower)
        found = graphs.kept[key]
        graphs.kept.move_to_end(key)
        while len(graphs.kept) > GRAPHS or (len(graphs.kept) > 1 and _bytes(graphs.kept.values()) > GRAPH_BYTES):
            graphs.kept.popitem(last=False)
        inputs = _inputs(source, lower)
        if lower is not None:
            lower.output = found.lower
        _fill(found, state, inputs)
        for _ in range(settings.steps):
            found.replay()
    state.take(found.state)
    return ""


def _step(loop: _Loop, state: AttackState, layout: Layout, like: InnerStep | None = None) -> InnerStep:
    """A step on these tensors. like: one whose batch has the same shapes, to copy what was decided for it."""
    forward = HookedForward(loop.model, loop.sites, layout, loop.settings.backend)
    forward.trim()
    step = InnerStep(loop.model, loop.settings, state, layout, forward, None if like is None else like.chunked)
    if like is not None:
        step.weights = None if like.weights is None else like.weights.clone()
    return step


def _bytes(graphs: Iterable[Captured]) -> int:
    return sum(graph.state.bytes + sum(t.numel() * t.element_size() for t in graph.inputs) for graph in graphs)


def _record(loop: _Loop, source: InnerStep, rows: int, lower: Replay | None) -> Captured:
    """The step on copies of its tensors, captured.

    Raises:
        CaptureError: it cannot be. torch.OutOfMemoryError: there is no memory for it.
    """
    state, layout = source.state.padded(rows), source.layout.changed(Tensor.clone)
    step = _step(loop, state, layout, source)
    output = None if lower is None else tree_map(_cloned, lower.output)
    given = _inputs(source, lower)
    if lower is not None:
        lower.output = output
    captured = Captured(_inputs(step, lower), state, layout, output, lambda: None)
    device = state.own_rows.device
    try:
        # a graph is of the current device's work, which need not be the model's
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            captured.replay = RECORDERS[device.type](step, lambda: _fill(captured, source.state, given))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(f"the capture failed: {error}") from error
    return captured


def _fill(captured: Captured, state: AttackState, inputs: list[Tensor]) -> None:
    """Put another batch of the same shape in the place of the captured step's."""
    state.fill(captured.state)
    torch._foreach_copy_(captured.inputs, inputs)
    refill_masks(captured.layout)


def _inputs(step: InnerStep, lower: Replay | None) -> list[Tensor]:
    """Every tensor that a step reads beside its state and that differs between batches, in a fixed order."""
    found = [*step.layout.tensors.values(), step.away]
    assert isinstance(step.forward, HookedForward)
    found += [tensor for tensor in (step.weights, step.forward.needed) if tensor is not None]
    return found + ([] if lower is None else [leaf for leaf in tree_leaves(lower.output) if isinstance(leaf, Tensor)])


def _key(loop: _Loop, state: AttackState, rows: int, shape: tuple[int, ...]) -> object:
    """What a graph depends on: shapes, settings, sites, the model's state, and where its weights and buffers are."""
    settings = loop.settings
    own = repr(replace(settings, epsilon=1.0, step_size=1.0, engine="auto", capture_graph="on", seed=None))
    tensors = [
        t for m in modules_of(loop.model) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    ]
    places = hash(tuple((t.data_ptr(), t.dtype) for t in tensors))
    sites = tuple(id(site.module) for site in loop.sites)
    kinds = tuple((*group.sites, group.epsilon.dim()) for group in state.groups)
    return own, requested(settings.backend), sites, model_key(loop.model), places, state.size, rows, shape, kinds


@contextmanager
def _lower_blocks(loop: _Loop, step: InnerStep) -> Iterator[Replay | None]:
    """The blocks below the lowest site run once, outside of the graph; None where there are none."""
    if not loop.depth:
        yield None
        return
    with frozen_blocks(loop.model, loop.depth) as replay:
        with torch.no_grad():
            layout_hidden(loop.model, step.layout)
        yield replay


def forget_graphs(model: nn.Module) -> None:
    """Let go of a model's graphs, of the memory that they hold, and of what is known of captures that failed."""
    graphs = graphs_of(model)
    graphs.kept.clear()
    graphs.off = ""


# ---- shapes --------------------------------------------------------------------------------------------------------


def bucketed(number: int, least: int) -> int:
    """`number` rounded up to a multiple of `least` or of about a tenth of itself, whichever is more."""
    quantum = max(least, 1 << max(number.bit_length() - 4, 0))
    return -(-number // quantum) * quantum


def _bucket(layout: Layout) -> tuple[int, ...]:
    """The shape that `padded_layout` gives a layout: rows, their length, labels, and what does not grow."""
    rows, length = layout.shape
    return rows, bucketed(length, 16), bucketed(len(layout.labels), 16), layout.row_tokens.shape[1], layout.size


def padded_layout(layout: Layout) -> Layout:
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


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
