"""Memory that runs out where a test says so: in attacks, in forward passes, in the midst of backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lpa import LPATrainer
from lpa.training.step import LPAStep


def failing(function: Callable[..., Any], calls: set[int], before: Any = None) -> Callable[..., Any]:
    """`function`, of which some calls (from 1) run out of memory, after `before` has been done."""
    count = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            if before is not None:
                before(*args)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **kwargs)

    return run


def half_a_backward(trainer: LPATrainer) -> Callable[[torch.Tensor], None]:
    """A backward pass that gets some way: wrong gradients are left on every other weight."""

    def run(loss: torch.Tensor) -> None:
        trained = [p for p in trainer.model.parameters() if p.requires_grad][::2]
        for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p.grad = grad if p.grad is None else p.grad + grad

    return run


def run_out(patch: pytest.MonkeyPatch, trainer: LPATrainer, where: str, calls: set[int]) -> None:
    """Have some calls (from 1) of the attack, of the defence's forward or of its backward passes run out of memory."""
    if where == "attack":
        trainer.pgd.attack = failing(trainer.pgd.attack, calls)  # type: ignore[method-assign]
    elif where == "forward":
        patch.setattr(LPAStep, "losses", failing(LPAStep.losses, calls))
    else:
        trainer.accelerator.backward = failing(trainer.accelerator.backward, calls, half_a_backward(trainer))
