"""Canaries: they leave training as it was, stop it where it loses utility, and keep the best step, resumed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lpa import LPATrainer
from lpa.data import canary_text, load_pairs, perplexity_text
from lpa.evaluation import benign_prompts, load_set
from lpa.training.canaries import FILE, Canaries
from lpa.training.selection import Limits, best, entries_of, faults, frontier, safety, stop_reason
from tests.support import trainers
from tests.support.measurements import entry
from tests.support.tiny import rows, tiny_config, tiny_model
from tests.support.trainers import TOKENIZER, assert_same, weights

CONTEXT = 256


def trainer_of(folder: Path, **settings: Any) -> LPATrainer:
    chosen = {"lpa_steps": 4, "canary_steps": 1, "canary_max_new_tokens": 4, "canary_prompts": 4} | settings
    model = tiny_model(len(TOKENIZER), max_position_embeddings=CONTEXT)
    return trainers.trainer_of(folder, model=model, **chosen)


def timeless(trainer: LPATrainer) -> list[dict[str, float]]:
    assert trainer.canaries is not None
    return [{name: v for name, v in entry.items() if name != "seconds"} for entry in trainer.canaries.entries]


def scripted(monkeypatch: pytest.MonkeyPatch, found: Callable[[int], dict[str, float]]) -> list[int]:
    """Canaries that find what a function of the LPA step says; the steps at which they were asked."""
    asked: list[int] = []

    def measure(self: Canaries, model: Any, pgd: Any) -> dict[str, float]:
        step = trainers[-1].lpa_step
        asked.append(step)
        return {name: value for name, value in found(step).items() if name != "lpa_step"}

    trainers: list[LPATrainer] = []
    begin = LPATrainer.train

    def train(self: LPATrainer, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(Canaries, "measure", measure)
    monkeypatch.setattr(LPATrainer, "train", train)
    return asked


# ---- the rules -----------------------------------------------------------------------------------------------------


def test_safety_without_harmful_requests_is_half_for_a_model_that_says_one_thing() -> None:
    assert safety(entry(right=0.75)) == 0.75
    assert safety(entry() | {"disagrees_undesirable": 1.0, "agrees_desirable": 0.0}) == 0.5
    assert safety(entry(harmful_done=0.25)) == 0.75


def test_a_step_is_best_by_safety_within_the_limits() -> None:
    base = entry(0, done=0.8, right=0.5)
    cheap, dear = entry(1, done=0.76, right=0.6), entry(2, done=0.5, right=0.9)
    costly, fallen = entry(3, perplexity=32.0, right=0.9), entry(4, right=0.9, collapsed=1.0)
    assert best([base, cheap, dear, costly, fallen], Limits()) == cheap
    assert best([base, dear, costly, fallen], Limits()) == base, "the untrained model is always within them"
    assert best([base, cheap, dear], Limits(refusal=0.4)) == dear
    surer = entry(5, done=0.76, right=0.6, margin_undesirable=1.0)
    assert best([base, cheap, surer, dict(surer, lpa_step=6.0)], Limits()) == surer, "then log-odds, then the earliest"
    assert faults(dear, base, Limits()) == ["benign requests done -30 points"]
    assert faults(costly, base, Limits()) == ["perplexity +6.7%"]
    assert faults(fallen, base, Limits())[0].startswith("collapsed (100% of answers are distinct, 0% a training")


def test_a_run_stops_at_a_collapse_or_after_some_losses_in_a_row() -> None:
    base, good, bad = entry(0), entry(1), entry(2, done=0.1)
    assert stop_reason([base], Limits()) == ""
    assert stop_reason([base, bad], Limits()) == ""
    assert stop_reason([base, bad], Limits(patience=1)) == "benign requests done -70 points"
    assert stop_reason([base, bad, good, bad], Limits()) == ""
    assert stop_reason([base, bad, bad], Limits()) == "benign requests done -70 points, for 2 measurements"
    assert stop_reason([base, entry(1, collapsed=1.0)], Limits()).startswith("collapsed")
    odd = entry(0, collapsed=1.0)
    assert stop_reason([odd, entry(1, collapsed=1.0)], Limits()) == "", "what was so from the start is no collapse"


def test_the_frontier_holds_what_nothing_beats() -> None:
    points = [entry(0, done=0.9, right=0.5), entry(1, done=0.8, right=0.7), entry(2, done=0.7, right=0.7),
              entry(3, done=0.6, right=0.9)]  # fmt: skip
    assert [point["lpa_step"] for point in frontier(points)] == [0, 1, 3]


# ---- what is asked -------------------------------------------------------------------------------------------------


def test_canaries_are_in_no_evaluation_and_not_trained_on() -> None:
    asked = {prompt.text for prompt in benign_prompts(FILE)}
    assert len(asked) == 24
    assert not asked & {prompt.text for prompt in benign_prompts()}
    for kind in ("undesirable", "desirable"):
        own = set(load_pairs(kind=kind, split="canary")["prompt"])
        assert len(own) == 8
        for split in ("train", "heldout"):
            assert not own & set(load_pairs(kind=kind, split=split)["prompt"])
    assert not set(canary_text().split("\n\n")) & set(perplexity_text().split("\n\n"))


def test_harmful_canaries_are_those_an_evaluation_takes_last(tmp_path: Path) -> None:
    file = tmp_path / "standins.txt"
    file.write_text("\n".join(f"stand-in {i}" for i in range(12)), encoding="utf-8")
    trainer = trainer_of(tmp_path / "run", canary_set=str(file), lpa_steps=1)
    trainer.train()
    assert trainer.canaries is not None
    taken = {prompt.text for prompt in trainer.canaries.canaries.harmful}
    assert len(taken) == 4
    assert not taken & {prompt.text for prompt in load_set(str(file), 8).prompts}
    record = trainer.canaries.record()
    assert record["asked"]["harmful"] | {"sha256": ""} == {
        "set": str(file), "source": "standins.txt", "rows": 12, "used": 4, "sha256": "",
        "format": "a prompt a line"}  # fmt: skip
    assert all(0 <= found["harmful_done"] <= 1 for found in record["measured"])
    assert "stand-in" not in json.dumps(record["measured"])
    with pytest.raises(ValueError, match=r"canary_set='gone\.txt' is unavailable: there is no file gone\.txt"):
        trainer_of(tmp_path / "other", canary_set="gone.txt")


def test_a_canary_longer_than_the_context_is_left_out_until_none_is_left(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lpa_steps=1, canary_max_new_tokens=CONTEXT)
    with pytest.raises(
        ValueError, match=rf"no canary fits .* the context holds {CONTEXT}; lower canary_max_new_tokens"
    ):
        trainer.train()


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "packed"])
def test_canaries_leave_training_as_it_was(tmp_path: Path, engine: str) -> None:
    noisy: dict[str, Any] = {"attack_engine": engine, "lora_dropout": 0.2, "attack_random_start": True, "lpa_steps": 3,
                             "gradient_checkpointing": engine == "reference"}  # fmt: skip
    without = trainer_of(tmp_path / "without", canary_steps=0, **noisy)
    without.train()
    watched = trainer_of(tmp_path / "with", canary_keep_best=False, **noisy)
    state = torch.random.get_rng_state()
    assert watched.canaries is not None
    watched.canaries.canaries.measure(watched.model, watched.pgd)
    assert torch.equal(state, torch.random.get_rng_state())
    watched.train()
    assert_same(weights(watched), weights(without))
    assert [found["lpa_step"] for found in watched.canaries.entries] == [0, 1, 2, 3]
    assert not list((tmp_path / "with").glob("checkpoint-*")), "nothing was to be kept"
    losses = [[e["defence_total"] for e in t.state.log_history if "lpa_step" in e] for t in (watched, without)]
    assert losses[0] == losses[1]


def test_every_so_many_steps_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(monkeypatch, lambda step: entry(step, right=0.5 + step / 10))
    trainer = trainer_of(tmp_path, lpa_steps=5, canary_steps=2)
    trainer.train()
    assert asked == [0, 2, 4, 5]
    assert trainer.state.best_global_step == 10
    assert trainer.canaries is not None
    assert trainer.canaries.record()["kept_lpa_step"] == 5
    assert trainer.canaries.record()["stopped"] is None
    seconds = [e["seconds_other"] for e in trainer.state.log_history if "lpa_step" in e]
    assert min(seconds) >= 0


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Safer after one LPA step, within the limits after two, collapsed after three."""
    found = [entry(0), entry(1, right=0.8), entry(2, right=0.7), entry(3, right=1.0, collapsed=1.0), entry(4)]
    return scripted(monkeypatch, lambda step: found[step])


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_a_collapse_ends_the_run_with_the_best_step(tmp_path: Path, collapsing: list[int], saves: str) -> None:
    trainer = trainer_of(tmp_path / "run", save_strategy=saves, save_total_limit=1)
    trainer.train()
    assert trainer.lpa_step == 3, "it stops at once"
    assert not trainer.interrupted
    assert trainer.canaries is not None
    record = trainer.canaries.record()
    assert (record["best_lpa_step"], record["kept_lpa_step"]) == (1, 1)
    assert record["stopped"].startswith("collapsed")
    one = trainer_of(tmp_path / "one", lpa_steps=1)
    one.train()
    assert_same(weights(trainer), weights(one))
    assert (tmp_path / "run" / "checkpoint-2").is_dir(), "rotation spares it"
    trainer.save_model()  # what is saved is the best
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert_same(saved, load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"))


def test_a_stopped_run_that_is_resumed_ends_at_once(tmp_path: Path, collapsing: list[int]) -> None:
    first = trainer_of(tmp_path, save_strategy="steps")
    first.train()
    asked = list(collapsing)
    again = trainer_of(tmp_path, save_strategy="steps")
    again.train(resume_from_checkpoint=True)
    assert collapsing == asked, "nothing is asked or trained again"
    assert again.lpa_step == 3
    assert not again.interrupted
    assert_same(weights(again), weights(first))
    assert again.canaries is not None
    assert first.canaries is not None
    assert again.canaries.record() == first.canaries.record()


def test_where_no_step_is_good_the_untrained_adapter_is_kept_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripted(monkeypatch, lambda step: entry(step, done=0.8 if step == 0 else 0.2, right=0.5 + step / 10))
    trainer = trainer_of(tmp_path)
    before = weights(trainer)
    trainer.train()
    assert trainer.lpa_step == 2
    assert_same(weights(trainer), before)
    assert "stopped by the canaries after LPA step 2: benign requests done -60 points, for 2 meas" in caplog.text
    assert "weights of LPA step 0, the best by its canaries: no later step was safer" in caplog.text


class Stop(TrainerCallback):
    """Asks for a stop, as Ctrl-C does, at a model update."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.trainer: LPATrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update and self.trainer is not None:
            self.trainer.request_stop()


def test_interrupted_and_resumed_gives_the_same_canaries(tmp_path: Path) -> None:
    noisy: dict[str, Any] = {
        "lora_dropout": 0.1,
        "attack_random_start": True,
        "save_strategy": "steps",
        "learning_rate": 1e-2,
    }
    whole = trainer_of(tmp_path / "whole", **noisy)
    whole.train()
    stop = Stop(5)
    first = trainer_of(tmp_path / "parts", callbacks=[stop], **noisy)
    stop.trainer = first
    first.train()
    assert first.interrupted
    second = trainer_of(tmp_path / "parts", **noisy)
    second.train(resume_from_checkpoint=True)
    assert timeless(second) == timeless(whole)
    assert len(timeless(second)) == 5
    assert len({found["margin_undesirable"] for found in timeless(second)}) == 5, "they see the weights change"
    assert_same(weights(second), weights(whole))


def test_an_interrupted_run_has_its_last_weights(tmp_path: Path, collapsing: list[int]) -> None:
    stop = Stop(4)
    trainer = trainer_of(tmp_path / "run", callbacks=[stop])
    stop.trainer = trainer
    trainer.train()
    assert trainer.interrupted
    two = trainer_of(tmp_path / "two", lpa_steps=2, canary_steps=0)
    two.train()
    assert_same(weights(trainer), weights(two))
    assert trainer.state.best_global_step == 2
    assert collapsing == [0, 1, 2]


def test_full_fine_tuning_keeps_its_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda step: entry(step, right=0.9 if step == 1 else 0.5))
    trainer = trainer_of(tmp_path / "run", lora=False, lpa_steps=2)
    trainer.train()
    one = trainer_of(tmp_path / "one", lora=False, lpa_steps=1)
    one.train()
    mine, other = trainer.model.state_dict(), one.model.state_dict()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_canaries_without_their_needs_raise(tmp_path: Path) -> None:
    for name, value in (("canary_steps", -1), ("canary_prompts", 0), ("canary_patience", 0),
                        ("canary_max_refusal", float("nan"))):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            tiny_config(tmp_path, **{name: value})
    model = tiny_model(len(TOKENIZER))
    with pytest.raises(ValueError, match="canary_steps=1 needs processing_class"):
        LPATrainer(model, tiny_config(tmp_path, canary_steps=1), rows(8), data_collator=dict)


def test_a_resumed_run_asks_what_its_earlier_measurements_asked(tmp_path: Path) -> None:
    asked = {"canary_set", "canary_prompts", "canary_max_new_tokens"}
    assert asked <= tiny_config(tmp_path, canary_steps=1).bound_settings.keys()
    assert not asked & tiny_config(tmp_path).bound_settings.keys()


def test_entries_are_those_of_the_log_alone() -> None:
    log = [{"canary/lpa_step": 0.0, "step": 0, "epoch": 0.0}, {"lpa_step": 1, "loss": 2.0}]
    assert entries_of(log) == [{"lpa_step": 0.0}]
