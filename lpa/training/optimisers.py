"""An optimiser made anew: what may be given as one, and how it forgets."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import nn


def check_optimizers(optimizers: tuple[Any, Any], model: nn.Module) -> None:
    """Refuse an optimiser that does not hold what is trained, and a schedule of another one.

    Raises:
        ValueError: there is one; the message says what to give.
    """
    optimizer, schedule = optimizers
    if optimizer is None:
        if schedule is not None:
            raise ValueError(
                "optimizers=(None, schedule): that schedule is of another optimiser than the one made here; use "
                "lr_scheduler_type, or give both"
            )
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    left_out = [name for name, p in trained.items() if id(p) not in held]
    if left_out:
        raise ValueError(
            f"optimizers holds {len(trained) - len(left_out)} of the {len(trained)} tensors that are trained (not "
            f"{left_out[0]}): adapters are added to the model here; give a model that has them (peft.get_peft_model) "
            "and an optimiser of its trained parameters, or optimizer_cls_and_kwargs"
        )


def check_made(optimizer: Any) -> None:
    """Refuse an optimiser whose weights differ between training and evaluation.

    Raises:
        ValueError: it has such modes.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None)):
        raise ValueError(
            f"{type(inner).__name__} has weights of its own for evaluation, an average over the run, and LPA begins "
            "the optimiser anew in each LPA step; use AdamW or another without train() and eval()"
        )


class Fresh:
    """Remembers an optimiser's settings, and gives them back with an empty state: as if it were made anew.

    Learning rates stay as the schedule has set them.
    """

    def __init__(self, optimizer: Any) -> None:
        self.groups = [_settings(group) for group in optimizer.param_groups]

    def restore(self, optimizer: Any) -> None:
        """Forget moments and counters."""
        optimizer.state.clear()
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            for name in group.keys() - settings.keys() - _SCHEDULED:
                del group[name]
            group.update({name: copy(value) for name, value in settings.items()})


_SCHEDULED = {"params", "lr", "initial_lr"}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy(value) for name, value in group.items() if name not in _SCHEDULED}
