"""Running out of memory: micro-batches are halved and nothing of the LPA step is lost. Perturbations off the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpa import LPATrainer
from lpa_kernels.attack import LatentPGD, PairBatch
from lpa_kernels.attack import graphs as capturing
from lpa_kernels.model import modes
from tests.support.faults import failing, run_out
from tests.support.tiny import rows
from tests.support.trainers import assert_same, logged, trainer_of, weights

TERMS = {"kl_coef": 0.2, "sft_coef": 0.3}
PREFERENCE = {"toward_coef": 0, "away_coef": 0, "dpo_coef": 1.0}


def of_size(folder: Path, size: int, **settings: Any) -> LPATrainer:
    """One LPA step of four pairs in micro-batches of `size`, with rows of several lengths."""
    data = rows(4)
    data[1]["rejected"], data[2]["chosen"] = "I agree", "I do not agree with this statement at all , no ."
    return trainer_of(folder, data, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
                      **{"lpa_steps": 1, "defence_steps": 3, **settings})  # fmt: skip


CASES: list[tuple[str, set[int], int, dict[str, Any]]] = [
    ("attack", {1}, 2, {"attack_engine": "packed"} | TERMS),
    ("attack", {1, 2}, 1, {"attack_random_start": True, "lora_dropout": 0.2}),
    ("forward", {2}, 2, {"attack_engine": "packed"} | TERMS),  # in the second update, when the attack is there
    ("backward", {1}, 2, {"lora_dropout": 0.2}),
    ("backward", {2, 3}, 1, {"attack_engine": "packed", "offload_attacks": True} | TERMS),
    ("backward", {3}, 2, PREFERENCE),
]


@pytest.mark.parametrize(("where", "calls", "left", "settings"), CASES)
def test_a_step_that_runs_out_of_memory_equals_one_of_smaller_micro_batches(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    calls: set[int],
    left: int,
    settings: dict[str, Any],
    caplog: Any,
) -> None:
    small = of_size(tmp_path, left, **settings)
    small.train()
    trainer = of_size(tmp_path, 4, **settings)
    start = weights(trainer)
    run_out(monkeypatch, trainer, where, calls)
    trainer.train()
    assert trainer._memory.size == left
    assert caplog.text.count("out of memory in the") == len(calls)
    assert_same(weights(trainer), weights(small), within=2e-6)
    assert max(float((w - start[n]).abs().max()) for n, w in weights(trainer).items()) > 1e-3
    for name in ("attack_toward_first", "attack_away_last", "defence_toward", "defence_dpo", "defence_kl",
                 "defence_total", "norm/embedding", "boundary_fraction"):  # fmt: skip
        assert logged(trainer)[0].get(name) == pytest.approx(logged(small)[0].get(name), abs=1e-5), name


@pytest.mark.parametrize(("graphs", "left"), [("auto", 2), ("on", 1)])
def test_memory_that_runs_out_for_a_graph(
    tmp_path: Path, graphs: str, left: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Only where graphs are asked for are micro-batches halved to make room for them."""
    tries: list[int] = []

    def record(step: Any, restore: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no room")
        return step

    trainer = of_size(tmp_path, 2, attack_engine="packed", attack_capture_graph=graphs, lpa_steps=2)
    device = next(trainer.model.parameters()).device.type
    monkeypatch.setitem(capturing.RECORDERS, device, record)
    monkeypatch.setattr(modes, "KEPT_ON", {device})
    trainer.train()
    assert trainer._memory.size == left
    assert (len(tries) > 1, capturing.OUT_OF_MEMORY in caplog.text) == (graphs == "on", True)


def test_earlier_micro_batches_of_the_update_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of_size(tmp_path, 2)
    whole.train()
    trainer = of_size(tmp_path, 2)
    run_out(monkeypatch, trainer, "backward", {4})  # the second micro-batch of the second update
    trainer.train()
    assert_same(weights(trainer), weights(whole), within=2e-6)
    assert logged(trainer)[0]["defence_total"] == pytest.approx(logged(whole)[0]["defence_total"], abs=1e-5)


def test_later_steps_keep_to_the_smaller_size(tmp_path: Path) -> None:
    trainer = of_size(tmp_path, 4, lpa_steps=2)
    sizes: list[int] = []
    attack = trainer.pgd.attack

    def watched(pairs: PairBatch, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(pairs))
        return attack(pairs, *args, **kwargs)

    trainer.pgd.attack = failing(watched, {1})  # type: ignore[method-assign]
    trainer.train()
    assert sizes == [2, 2, 2, 2]


def test_micro_batches_means_are_the_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of_size(tmp_path, 4, normaliser="micro")
    whole.train()
    trainer = of_size(tmp_path, 4, normaliser="micro")
    run_out(monkeypatch, trainer, "attack", {1})
    trainer.train()
    assert_same(weights(trainer), weights(whole), within=2e-6)


def test_a_single_pair_that_does_not_fit_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = of_size(tmp_path, 4)
    start = weights(trainer)
    run_out(monkeypatch, trainer, "backward", set(range(1, 100)))
    with pytest.raises(torch.OutOfMemoryError, match=r"in the update with a single pair of up to \d+ tokens; use grad"):
        trainer.train()
    assert trainer._memory.size == 1
    assert_same(weights(trainer), start)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"auto_micro_batch": False}, "auto_micro_batch is False"),
     ({"kl": "public", "kl_coef": 0.1, "normaliser": "micro"}, "kl='public' depends on the micro-batch's size")],
)  # fmt: skip
def test_where_it_cannot_be_split_the_error_names_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], why: str
) -> None:
    trainer = of_size(tmp_path, 4, **settings)
    run_out(monkeypatch, trainer, "attack", {1})
    with pytest.raises(torch.OutOfMemoryError, match=f"with 4 pairs at once, and {why}; halve per_device_train_batch"):
        trainer.train()


@pytest.mark.parametrize("where", ["attack", "backward"])
def test_parts_with_nothing_to_attack_or_to_score_are_as_in_the_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (of_size(tmp_path, 4, attack_engine="packed") for _ in range(2))
    collate = whole.data_collator

    def emptied(data: Any) -> dict[str, torch.Tensor]:
        """One pair without an attacked position, one without a rejected completion, one without a chosen one."""
        batch = dict(collate(data))
        for row, name in enumerate(("attack_mask", "rejected_mask", "chosen_mask")):
            batch[name][row] = False
        return batch

    whole.data_collator = parts.data_collator = emptied
    whole.train()
    run_out(monkeypatch, parts, where, {1, 2})
    parts.train()
    assert parts._memory.size == 1
    assert_same(weights(parts), weights(whole), within=2e-6)
    for name in ("attack_toward_last", "attack_away_last", "defence_total", "norm/embedding"):
        assert logged(parts)[0][name] == pytest.approx(logged(whole)[0][name], abs=1e-5), name


def test_a_whole_batch_with_nothing_to_attack_is_refused(tmp_path: Path) -> None:
    trainer = of_size(tmp_path, 2)
    collate = trainer.data_collator
    trainer.data_collator = lambda data: collate(data) | {"attack_mask": torch.zeros(len(data), 3)}
    with pytest.raises(ValueError, match="attack_mask has no True"):
        trainer.train()


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    trainer = of_size(tmp_path, 4)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.pgd.attack = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        trainer.train()


def test_offloaded_perturbations_change_nothing(tmp_path: Path) -> None:
    kept = of_size(tmp_path, 2, attack_engine="packed", **TERMS)
    kept.train()
    trainer = of_size(tmp_path, 2, attack_engine="packed", offload_attacks=True, **TERMS)
    moved: list[str] = []
    attack = trainer.pgd.attack

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = attack(*args, **kwargs)
        found.to = lambda device: moved.append(str(device))  # type: ignore[method-assign, return-value]
        return found

    trainer.pgd.attack = watched  # type: ignore[method-assign]
    trainer.train()
    assert moved == ["cpu", "cpu"]
    assert_same(weights(trainer), weights(kept))


@pytest.mark.parametrize("engine", ["reference", "packed"])
def test_a_part_of_an_attack_is_the_attack_on_the_part(engine: str, tmp_path: Path) -> None:
    trainer = of_size(tmp_path, 4)
    batch = PairBatch.from_dict(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    pgd = LatentPGD(trainer.model, ["embedding", "mlp:1"], engine=engine, step_size=0.05, steps=3)
    whole, part = pgd.attack(batch), batch.part(1, 3)
    assert part.rejected_ids.shape[1] <= batch.rejected_ids.shape[1]
    found = pgd.attack(part, batch.counts)
    taken = whole.part(1, 3, part)
    for site in found.names:
        assert torch.allclose(taken.delta(site), found.delta(site), atol=1e-5)
    logits = pgd.rows(part, taken).logits
    assert torch.allclose(logits, pgd.rows(part, found).logits, atol=1e-4)
    assert len(logits) == sum(part.counts)
