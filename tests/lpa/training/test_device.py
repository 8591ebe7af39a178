"""LPATrainer with captured steps: by stand-ins for graphs on the CPU, by real ones on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpa_kernels.attack import graphs as capturing
from lpa_kernels.model import modes
from tests.support.jobs import trainer_of, weights

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def stand_in(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    restore()
    step()
    return step


def change(folder: Path, device: str, graphs: str, **settings: Any) -> dict[str, Tensor]:
    """By how much a run changes each trained weight."""
    trainer = trainer_of(folder, use_cpu=device == "cpu", attack_capture_graph=graphs, lpa_steps=3, **settings)
    before = {name: value.cpu() for name, value in weights(trainer).items()}
    trainer.train()
    assert trainer.model.get_input_embeddings().weight.device.type == device
    assert (len(capturing.graphs_of(trainer.model).kept) > 0) == (graphs == "on")
    return {name: value.cpu() - before[name] for name, value in weights(trainer).items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of two runs' changes, as a share of their size."""
    off, size = (sum(float(v.square().sum()) for v in values) for values in (
        [one[name] - other[name] for name in other], other.values()))  # fmt: skip
    return (off / size) ** 0.5


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_captured_steps_train_the_same(
    device: str, merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change in place between attacks, which a graph must see; batches of other lengths share it."""
    if device == "cpu":
        monkeypatch.setitem(capturing.RECORDERS, "cpu", stand_in)
        monkeypatch.setattr(modes, "KEPT_ON", {"cpu"})
    # not Adam, in defence or attack: it would make as much of gradients that are rounding as of any
    options = {"attack_merge_adapters": merged, "learning_rate": 0.1, "optim": "sgd", "attack_rule": "normalised"}
    found = {graphs: change(tmp_path / graphs, device, graphs, **options) for graphs in ("on", "off")}
    assert distance(found["on"], found["off"]) < 1e-4
    if device != "cpu":
        assert distance(found["on"], change(tmp_path / "cpu", "cpu", "off", **options)) < 0.01
