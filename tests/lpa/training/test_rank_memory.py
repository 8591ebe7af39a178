"""A rank that runs out of memory: under DDP all halve their micro-batches, under FSDP2 it says what to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import jobs, ranks
from tests.support.jobs import RAGGED, difference, moved

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# of Adam, rounding alone would decide where a gradient is all but zero
RUN = {"data": RAGGED, "micro_batches": 2, "per_device_train_batch_size": 4, "attack_steps": 2, "optim": "sgd",
       "learning_rate": 0.1}  # fmt: skip
TERMS = {"kl_coef": 0.3, "sft_coef": 0.2}
Faults = list[tuple[int, str, set[int]]]
CASES: dict[str, tuple[Faults, int, dict[str, Any]]] = {
    "an attack": ([(1, "attack", {1})], 2, TERMS | {"lora_dropout": 0.2, "micro_batches": 4}),
    "a forward pass of the second update": ([(0, "forward", {2})], 2, {}),
    "backward passes of both, again and again": (
        [(1, "backward", {2}), (0, "backward", {5})],
        1,
        {"gradient_checkpointing": True, "attack_engine": "reference"},
    ),
    "every weight": ([(1, "backward", {2}), (1, "attack", {3})], 1, {"lora": False, "sft_coef": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_halve_together_and_nothing_is_lost(tmp_path: Path, case: str) -> None:
    faults, left, more = CASES[case]
    settings: dict[str, Any] = RUN | more
    small = settings | {"micro_batches": settings["micro_batches"] * 4 // left, "per_device_train_batch_size": left}
    jobs.train(tmp_path / "one", small)
    assert moved(tmp_path / "one", small) > 1e-3
    folder = tmp_path / "two"
    ranks.run(jobs.run_out, folder, settings, faults, folder=folder, world=2)
    assert [int((folder / f"size-{rank}").read_text()) for rank in range(2)] == [left, left]
    assert difference(tmp_path / "one", folder) < 1e-5
    one, two = (torch.load(path / "log.pt") for path in (tmp_path / "one", folder))
    for first, second in zip(one, two, strict=True):
        for key in ("attack_toward_first", "attack_away_last", "defence_total", "norm/embedding", "boundary_fraction"):
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), key


def test_a_single_pair_that_does_not_fit_one_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 2, "lpa_steps": 1}
    faults = [(1, "backward", set(range(1, 20)))]
    running = ranks.Ranks(jobs.run_out, tmp_path, settings, faults, folder=tmp_path, world=2)
    assert running.finish() == [1, 1]
    assert "OutOfMemoryError: out of memory in the update with a single pair of up to" in running.text(1)
    assert "RankError: rank 1: out of memory in the update with a single pair of up to" in running.text(0)


def test_a_sharded_run_says_what_to_set_and_goes_on_so(tmp_path: Path) -> None:
    """The rank's process ends, and a launcher ends the others, which wait for its weights."""
    settings = RUN | {"per_device_train_batch_size": 2, "micro_batches": 4, "save_strategy": "steps", "fsdp": True,
                      "optim": "adamw_torch", "learning_rate": 1e-3}  # fmt: skip
    whole = tmp_path / "whole"
    jobs.train(whole, settings | {"fsdp": False})
    folder = tmp_path / "run"
    running = ranks.Ranks(jobs.run_out, folder, settings, [(1, "forward", {5})], folder=folder, world=2)
    running.processes[1].join(120)
    assert running.processes[1].exitcode == 1
    running.processes[0].kill()
    assert "out of memory in the update on rank 1, with 2 pairs at once, and it cannot halve them" in running.text(1)
    assert "halve per_device_train_batch_size and double gradient_accumulation_steps" in running.text(1)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    halved = settings | {"per_device_train_batch_size": 1, "micro_batches": 8}
    ranks.run(jobs.train, folder, halved, True, folder=folder, world=2)
    assert difference(whole, folder) < 1e-4
