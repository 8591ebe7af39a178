"""What a model whose weights are sharded over ranks (FSDP2) asks of an attack: whole passes in step, shards at rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .walk import modules_of

logger = logging.getLogger(__name__)
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _groups(model: nn.Module) -> list[Any]:
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules_of(model) if isinstance(module, FSDPModule)]


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


def tell_off(model: nn.Module, what: str) -> None:
    """Say, once a model, what is left out because its weights are sharded."""
    told = _told.setdefault(model, set())
    if what not in told:
        told.add(what)
        logger.warning("the weights of %s are sharded over ranks: %s", type(model).__name__, what)
