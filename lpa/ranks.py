"""How the ranks of a run stay together: what they agree on, passes through DDP's wrapper, and what FSDP2 rules out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank has failed; the message is its own."""


def agree(accelerator: Any, error: Exception | None = None, stop: bool = False) -> bool:
    """Whether any rank wants to stop. Every rank must call it at the same point of its work.

    Raises:
        the error, on a rank that has one; RankError on the others, with the first one's message.
    """
    if accelerator.num_processes > 1:
        flags = torch.tensor([error is not None, stop], dtype=torch.float32, device=accelerator.device)
        failed, stopped = accelerator.reduce(flags).tolist()
        if failed:
            told = gather_object([None if error is None else f"rank {accelerator.process_index}: {error}"])
            if error is None:
                raise RankError(next(message for message in told if message))
        stop = bool(stopped)
    if error is not None:
        raise error
    return stop


def from_main(accelerator: Any, find: Callable[[], T]) -> T:
    """What `find` gives on the main rank, on every rank; what it raises there is raised on all."""
    found: list[Any] = [None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = [find()]
        except Exception as raised:
            error = raised
    agree(accelerator, error)
    result: T = broadcast_object_list(found)[0]
    return result


def through(wrapper: nn.Module, module: nn.Module, compute: Callable[[], Any]) -> Any:
    """Run `compute` as the forward pass of `module` called through its wrapper.

    DDP prepares its gradient exchange in its own forward, which passes of the inner module would go past.
    """
    if wrapper is module:
        return compute()
    held = module.__dict__.get("forward")

    def restore() -> None:
        if held is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = held

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()
        return compute()

    module.__dict__["forward"] = forward
    try:
        return wrapper(None)
    finally:
        restore()


def check_sharding(trainer: Any) -> None:
    """Refuse the kinds of FSDP that a latent attack cannot run under, and tell where none is used though asked for.

    Raises:
        ValueError: FSDP1, or FSDP's own activation checkpointing.
    """
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:
            logger.warning("--fsdp: accelerate shards over several accelerators alone; every rank has all weights here")
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} flattens the weights, which the attack's hooks have no part in; use "
            "version 2 (fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's configuration)"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP's activation_checkpointing runs blocks again without their perturbations; leave it out and use "
            "gradient_checkpointing"
        )
