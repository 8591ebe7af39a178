"""How a batch is run: by which engine, in which layout, and why not by a faster one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..model.facts import say_once
from ..model.sites import Site
from .batch import PairBatch
from .layout import Layout, pack, unshared
from .settings import AttackSettings
from .stacked import why_not_stacked
from .verdicts import way_of


@dataclass(frozen=True)
class Plan:
    """How a batch is run.

    Attributes:
        engine: "stack", "packed", "unshared", "alone" (one text a pass) or "reference". reason: why not a faster one.
        layout: None for plain passes, those of "alone" and "reference".
    """

    engine: str
    reason: str = ""
    layout: Layout | None = None

    @property
    def alone(self) -> bool:
        """Whether plain passes are of one text each."""
        return self.engine == "alone"


# Devices on which "auto" takes the stack. Elsewhere it has not been measured against captured graphs.
STACKS_ON = {"cpu"}


def plan(
    model: nn.Module, sites: Sequence[Site], settings: AttackSettings, batch: PairBatch, *, loop: bool = True
) -> Plan:
    """How `batch` is to be run, by the setting `engine` and what the model can do.

    Args:
        loop: it is for an inner loop, in which no weight has a gradient; a single pass is never the stack's.

    Raises:
        RuntimeError: the model cannot be attacked, or not by the engine asked for; the message says why.
    """
    way = way_of(model, batch, packing=settings.engine != "reference")
    if settings.engine == "reference" and way.engine == "unshared":
        return Plan("reference", "engine='reference'")
    if way.engine == "packed":
        layout = pack(batch, first_position=way.first_position)
        if loop and settings.engine != "packed":
            return _packed(model, sites, settings, batch, layout)
        return Plan("packed", "", layout)
    if settings.engine not in ("auto", "reference"):
        raise RuntimeError(f"engine={settings.engine!r} cannot run {type(model).__name__}: {way.reason}")
    how = "unshared, two texts a pair" if way.engine == "unshared" else "one text a pass"
    say_once(model, f"{type(model).__name__} runs {how}: {way.reason}")
    return Plan(way.engine, way.reason, unshared(batch) if way.engine == "unshared" else None)


def _packed(
    model: nn.Module, sites: Sequence[Site], settings: AttackSettings, batch: PairBatch, layout: Layout
) -> Plan:
    """How a batch that can be packed is run in an inner loop: by a frozen stack, or by the model's own code."""
    if settings.engine == "auto" and layout.branch.device.type not in STACKS_ON:
        return Plan("packed", f"the stack is not measured on {layout.branch.device.type}", layout)
    if settings.engine == "auto" and settings.capture_graph == "on":
        return Plan("packed", "capture_graph='on' is for the packed engine", layout)
    reason = why_not_stacked(model, sites, settings, batch, layout)
    if reason and settings.engine == "stack":
        raise RuntimeError(f"engine='stack' cannot run {type(model).__name__}: {reason}")
    return Plan("packed" if reason else "stack", reason, layout)
