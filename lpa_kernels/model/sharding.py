"""What a model whose weights are sharded over ranks (FSDP2) asks of an attack: whole passes in step, shards at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from .walk import modules_of


@cache
def _sharded_class() -> tuple[type, ...]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return (FSDPModule,)


def shards(kind: type) -> bool:
    """Whether modules of this class are sharded by FSDP2."""
    return issubclass(kind, _sharded_class())


def _groups(model: nn.Module) -> list[Any]:
    modules = modules_of(model)
    sharded = {kind for kind in {type(module) for module in modules} if shards(kind)}
    return [module for module in modules if type(module) in sharded] if sharded else []


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model: then every pass is a collective, and weights are whole within a pass alone."""
    return bool(_groups(model))


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The parameters are the shards at both ends: what some passes leave gathered are other parameters, whose flags and
    values are not those that the optimiser and the next pass go by."""
    groups = _groups(model)
    for group in groups:
        group.reshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


def left_out(model: nn.Module, what: str) -> str:
    """What to say where something is left out of an attack because the model's weights are sharded."""
    return f"the weights of {type(model).__name__} are sharded over ranks: {what}"
