"""How a batch is run: by which engine, in which layout, and why not by a faster one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..model.facts import say_once
from .batch import PairBatch
from .layout import Layout, pack, unshared
from .settings import AttackSettings
from .verdicts import way_of


@dataclass(frozen=True)
class Plan:
    """How a batch is run.

    Attributes:
        engine: "packed", "unshared", "alone" (one text a pass) or "reference". reason: why not a faster one.
        layout: None for plain passes, those of "alone" and "reference".
    """

    engine: str
    reason: str = ""
    layout: Layout | None = None

    @property
    def alone(self) -> bool:
        """Whether plain passes are of one text each."""
        return self.engine == "alone"


def plan(model: nn.Module, settings: AttackSettings, batch: PairBatch) -> Plan:
    """How `batch` is to be run, by the setting `engine` and what the model can do.

    Raises:
        RuntimeError: the model cannot be attacked, or not by the engine asked for; the message says why.
    """
    way = way_of(model, batch, packing=settings.engine != "reference")
    if settings.engine == "reference" and way.engine == "unshared":
        return Plan("reference", "engine='reference'")
    if way.engine == "packed":
        return Plan("packed", "", pack(batch, first_position=way.first_position))
    if settings.engine not in ("auto", "reference"):
        raise RuntimeError(f"engine={settings.engine!r} cannot run {type(model).__name__}: {way.reason}")
    how = "unshared, two texts a pair" if way.engine == "unshared" else "one text a pass"
    say_once(model, f"{type(model).__name__} runs {how}: {way.reason}")
    return Plan(way.engine, way.reason, unshared(batch) if way.engine == "unshared" else None)
