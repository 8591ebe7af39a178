"""The inner-loop pieces: one attack of 16 steps by the public loop, by each engine, merged, captured, compiled."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.loop_cases import Shape, conventional, model_of, ours
from lpa_kernels import AttackResult
from lpa_kernels.attack import graphs

from .compiled import compiled_blocks
from .goals import CONVENTIONAL
from .shapes import counted, shape
from .worker import Cases, Setting, Skip

STEPS = 16


@dataclass(frozen=True)
class Way:
    """A way of running the attack.

    Attributes:
        options: of `LatentPGD`. around: what the model is put under, from (shape, dry).
    """

    options: dict[str, Any]
    around: Callable[[Shape, bool], AbstractContextManager[Any]] = lambda shape, dry: nullcontext()


def blocks(own: Shape, dry: bool) -> AbstractContextManager[None]:
    """Compiled blocks, after the engine has asked the model what it asks once: those shapes need no compiling."""
    ours(own, 1, engine="packed", capture_graph=False)()
    return compiled_blocks(model_of(own), own.sites, "aot_eager" if dry else "inductor")


_PACKED = {"engine": "packed", "capture_graph": False}
WAYS = {
    "reference engine": Way({"engine": "reference"}),
    "reference engine, compiled blocks": Way({"engine": "reference"}, blocks),
    "packed": Way(_PACKED),
    "packed, captured": Way(_PACKED | {"capture_graph": True}),
    "packed, merged": Way(_PACKED | {"merge_adapters": True}),
    "packed, merged, captured": Way(_PACKED | {"merge_adapters": True, "capture_graph": True}),
}


def synchronized() -> float:
    """Seconds, after the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def fresh(own: Shape) -> Iterator[dict[str, Any]]:
    """No graph, no cache of an earlier way; what the way has needed is in the dictionary afterwards."""
    graphs.forget_graphs(model_of(own))
    gc.collect()
    found: dict[str, Any] = {}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        graphs.forget_graphs(model_of(own))
    found |= peaks()


def peaks() -> dict[str, float]:
    """The most that tensors took and the most that was held of the device since the last reset, in GB of 10^9 bytes."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2)}  # fmt: skip


def timed(make: Callable[[], Callable[[], Any]], own: Shape, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of an inner step, all that an attack does shared among its steps: the median of the rounds."""
    with fresh(own) as found:
        run = make()
        begin = synchronized()
        result = run()
        found["first attack s"] = round(synchronized() - begin, 3)  # with captures, compilations, probes
        taken, host = [], time.process_time()
        for _ in range(rounds):
            begin = synchronized()
            result = run()
            taken.append((synchronized() - begin) / steps * 1e3)
        host = (time.process_time() - host) / rounds / steps * 1e3  # waiting for the device is part of it
        found |= {"milliseconds": statistics.median(taken), "rounds": [round(t, 3) for t in taken]}
        found["host ms"] = round(host, 3)
        if isinstance(result, AttackResult):
            found |= {"captured": result.captured, "last loss": result.losses[-1]["total"]}
        else:
            found["last loss"] = result
        del run, result
    return found


def way(name: str, own: Shape, dry: bool, rounds: int) -> dict[str, Any]:
    """One of `WAYS`."""
    chosen = WAYS[name]
    if chosen.options.get("capture_graph") and not torch.cuda.is_available():
        raise Skip("CUDA graphs need a GPU")
    with chosen.around(own, dry):
        return timed(lambda: ours(own, STEPS, **chosen.options), own, STEPS, rounds)


def single(own: Shape, dry: bool) -> dict[str, Any]:
    """Milliseconds of an attack of one step: beside a step of many, what an attack costs before and after its steps."""
    if not torch.cuda.is_available():
        raise Skip("CUDA graphs need a GPU")
    found = timed(lambda: ours(own, 1, **WAYS["packed, captured"].options), own, 1, 3)
    return {"an attack of one step, ms": found["milliseconds"], "captured": found["captured"]}


def inner(setting: Setting) -> Cases:
    """The piece; argument: FAMILY-PAIRS."""
    family, pairs = setting.argument.split("-")
    own, dry = shape(family, int(pairs), setting.dry), setting.dry
    yield "work", lambda: counted(family, int(pairs), dry)
    half = torch.bfloat16 if setting.device == "cpu" else torch.float16  # the public code's, on a GPU
    steps = 2 if dry else 4  # the public loop sets up next to nothing, so that few of its steps do

    def public() -> dict[str, Any]:
        return timed(lambda: conventional(own, steps, half), own, steps, 1 if dry else 3)

    # what the goals are made of comes first
    yield CONVENTIONAL, public
    yield "one step, captured", lambda: single(own, dry)
    for name in ("packed", "packed, captured", "packed, merged, captured", "packed, merged", "reference engine",
                 "reference engine, compiled blocks"):  # fmt: skip
        if not dry or "compiled" not in name or setting.argument == "llama-16":  # a dry run tries compiling once
            yield name, lambda name=name: way(name, own, dry, 1 if dry else 3)
