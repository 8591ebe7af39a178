"""Trainers of a tiny model, what they logged, and the comparison of the weights that they end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lpa import LPAConfig, LPATrainer

from .tiny import rows, tiny_config, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def trainer_of(folder: Path, data: Any = None, **settings: Any) -> LPATrainer:
    names = ("callbacks", "benign_dataset", "ref_model", "peft_config", "optimizers", "optimizer_cls_and_kwargs")
    options = {k: settings.pop(k) for k in names if k in settings}
    model = settings.pop("model", None) or tiny_model(len(TOKENIZER))
    if {"optimizers", "optimizer_cls_and_kwargs"} & options.keys():  # which have these themselves
        settings = {"learning_rate": LPAConfig.learning_rate, "adam_epsilon": LPAConfig.adam_epsilon} | settings
    return LPATrainer(model, tiny_config(folder, **settings), rows(8) if data is None else data, TOKENIZER, **options)


def weights(trainer: LPATrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer: LPATrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "lpa_step" in entry]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], within: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= within, name
