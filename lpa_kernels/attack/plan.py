"""How a batch is run: by which engine, in which layout, and why not by a faster one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..model.facts import say_once
from .batch import PairBatch
from .layout import Layout, pack, unshared
from .probe import can_pack
from .settings import AttackSettings


@dataclass(frozen=True)
class Plan:
    """How a batch is run.

    Attributes:
        engine: "packed", "unshared" or "reference". reason: why not a faster one.
        layout: None for the reference engine's two plain passes.
    """

    engine: str
    reason: str = ""
    layout: Layout | None = None


def plan(model: nn.Module, settings: AttackSettings, batch: PairBatch) -> Plan:
    """How `batch` is to be run, by the setting `engine` and what the model can do.

    Raises:
        RuntimeError: the engine asked for cannot run this model; the message says why.
    """
    if settings.engine == "reference":
        return Plan("reference", "engine='reference'")
    layout = pack(batch)
    verdict = can_pack(model, layout.shape[1])
    if verdict:
        return Plan("packed", "", layout)
    if settings.engine != "auto":
        raise RuntimeError(f"engine={settings.engine!r} cannot run {type(model).__name__}: {verdict.reason}")
    say_once(model, f"{type(model).__name__} runs unshared, two texts a pair: {verdict.reason}")
    return Plan("unshared", verdict.reason, unshared(batch))
