"""How the ranks of a run stay together: agreement, DDP's gradients, and the engines that are refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, DynamoBackend, broadcast_object_list, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank has failed; the message is its own."""


def from_all(accelerator: Any, value: float, error: Exception | None = None) -> list[float]:
    """Every rank's `value`. Every rank must call it at the same point of its work.

    Raises:
        the error, on a rank that has one; RankError on the others, with the first one's message.
    """
    values = [float(value)]
    if accelerator.num_processes > 1:
        own = torch.tensor([[error is not None, value]], dtype=torch.float32, device=accelerator.device)
        failed, values = accelerator.gather(own).T.tolist()
        if any(failed):
            messages = gather_object([None if error is None else f"rank {accelerator.process_index}: {error}"])
            if error is None:
                raise RankError(next(message for message in messages if message))
    if error is not None:
        raise error
    return values


def agree(accelerator: Any, error: Exception | None = None, stop: bool = False) -> bool:
    """Whether any rank wants to stop; raises as `from_all`."""
    return any(from_all(accelerator, stop, error))


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


def reduce_gradients(wrapper: nn.Module, module: nn.Module) -> None:
    """Average the summed gradients over DDP's ranks. FSDP2 has done so already, and one rank has nothing to average.

    The backward passes of micro-batches bypass DDP, so that no rank waits for one whose pass fails. This pass goes
    through DDP with gradients of 0, and DDP averages what each weight's `grad` holds.
    """
    if wrapper is module:
        return
    if not isinstance(wrapper, DistributedDataParallel):  # else every rank would train for itself
        raise RuntimeError(f"gradients cannot be averaged through {type(wrapper).__name__}; use DDP or FSDP2 alone")
    held = module.__dict__.get("forward")
    used = [p for p in module.parameters() if p.grad is not None]
    # DDP prepares its exchange in its own forward, which has to call the module's
    module.__dict__["forward"] = lambda *_: sum(p.sum().float() * 0 for p in used)
    try:
        wrapper(None).backward()
    finally:
        if held is None:
            module.__dict__.pop("forward")
        else:
            module.__dict__["forward"] = held


@torch.no_grad()
def check_same_weights(accelerator: Any, model: nn.Module) -> None:
    """Compare a sum of each trained tensor over the ranks, which hold the same weights under DDP.

    Raises:
        RankError: on every rank, where they differ by more than 1e-5 of the sum of the tensor's magnitudes.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = [(p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64)) for p in trained.values()]
    every = accelerator.gather(torch.stack([torch.stack(pair) for pair in sums])[None])  # [ranks, tensors, 2]
    apart = (every[:, :, 0] - every[:1, :, 0]).abs().amax(0)
    for name, difference, size in zip(trained, apart.tolist(), every[0, :, 1].tolist(), strict=True):
        if not difference <= 1e-5 * size:
            raise RankError(
                f"after the first update the ranks hold different weights: the sums of {name} are {difference:.2g} "
                "apart; something else than LPATrainer has changed them, or how DDP exchanges gradients"
            )


def check_engine(trainer: Any) -> None:
    """Refuse the parts of accelerate that a latent attack cannot run under. Warn where FSDP was asked for and is off.

    Raises:
        ValueError: ranks that do not know of each other, a compiled model, an engine other than DDP and FSDP2, or
            FSDP's own activation checkpointing.
    """
    state = trainer.accelerator.state
    launched = os.environ.get("WORLD_SIZE", "1")
    if int(launched) > 1 and trainer.args.world_size == 1:
        raise ValueError(
            f"WORLD_SIZE={launched}, but this process would train by itself, as each of the others would; start them "
            "with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    if (backend := state.dynamo_plugin.backend) != DynamoBackend.NO:
        raise ValueError(
            f"accelerate is to compile the model ({backend.value}), and a compiled one does not see the hooks that "
            "perturb it; set dynamo_backend to no in accelerate's configuration, and unset ACCELERATE_DYNAMO_BACKEND"
        )
    if state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{state.distributed_type.value} is not supported; use DDP, or FSDP2 to share the weights")
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:
            logger.warning("--fsdp: accelerate shards over several accelerators alone; every rank has all weights here")
        return
    plugin = state.fsdp_plugin
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
