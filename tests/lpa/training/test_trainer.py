"""LPATrainer: what it does with micro-batches, losses, checkpoints and bad input, on a tiny random model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from lpa import LPATrainer
from lpa.data import DataError
from lpa.training.microbatch import MicroBatch
from lpa.training.step import LPAStep
from lpa_kernels.model import modes
from tests.support.tiny import rows, tiny_config, tiny_model
from tests.support.trainers import TOKENIZER, assert_same, logged, trainer_of, weights


def step_of(trainer: LPATrainer) -> LPAStep:
    assert trainer._step is not None
    return trainer._step


def test_every_micro_batch_is_perturbed_by_its_own_attack_in_every_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, lpa_steps=1,
                         defence_steps=3)  # fmt: skip
    used: list[tuple[int, int]] = []
    found: list[int] = []
    attack, losses = trainer.pgd.attack, LPAStep.losses

    def watched_attack(pairs: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(id(pairs))
        return attack(pairs, *args, **kwargs)

    def watched_losses(step: LPAStep, micro: MicroBatch) -> Any:
        assert micro.attack is not None
        assert float(torch.stack([d.norm() for d in micro.attack.deltas_by_row]).min()) > 0
        clean = micro.attack
        with_attack = losses(step, micro)
        micro.attack = None
        without = losses(step, micro)
        micro.attack = clean
        assert float(with_attack[1]["toward"]) != float(without[1]["toward"])  # the perturbation reaches the loss
        used.append((id(micro.pairs), id(micro.attack)))
        return with_attack

    trainer.pgd.attack = watched_attack  # type: ignore[method-assign]
    monkeypatch.setattr(LPAStep, "losses", watched_losses)
    trainer.train()
    assert len(found) == len(set(found)) == 4
    assert len(used) == 12
    assert used[:4] == used[4:8] == used[8:]
    assert len(set(used[:4])) == 4
    assert trainer._step is None  # let go of at the end


def test_the_mode_of_attacks_is_entered_once_an_lpa_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []
    frozen_eval = modes.frozen_eval

    def counted(model: Any) -> Any:
        entered.append(model.training)
        return frozen_eval(model)

    monkeypatch.setattr(modes, "frozen_eval", counted)
    trainer_of(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, lpa_steps=2).train()
    assert len(entered) == 2


def test_attack_runs_without_dropout_and_training_flags_come_back(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora_dropout=0.5, lpa_steps=1)
    flags: list[bool] = []
    model, forward = trainer.model, trainer.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        flags.append(model.training)
        return forward(*args, **kwargs)

    model.forward = watched
    trainer.train()
    assert flags.count(True) == 8  # two micro-batches, two updates, two texts
    assert flags.count(False) >= 2 * 3 * 2  # two micro-batches, three inner steps, two texts


@pytest.mark.parametrize("normaliser", ["global", "micro"])
def test_global_normaliser_alone_is_blind_to_micro_batches(tmp_path: Path, normaliser: str) -> None:
    data = rows(4)
    data[1]["rejected"], data[2]["chosen"] = "I agree", "I do not agree with this statement at all , no ."
    runs = []
    for size in (1, 2, 4):
        trainer = trainer_of(tmp_path, data, normaliser=normaliser, per_device_train_batch_size=size,
                             gradient_accumulation_steps=4 // size, sft_coef=0.3)  # fmt: skip
        trainer.train()
        runs.append((weights(trainer), logged(trainer)))
    for values, log in runs[1:]:
        worst = max(float((values[n] - runs[0][0][n]).abs().max()) for n in values)
        if normaliser == "micro":
            assert worst > 1e-4
            continue
        assert worst < 1e-5
        for entry, first in zip(log, runs[0][1], strict=True):
            for name in ("attack_toward_last", "defence_toward", "defence_away", "defence_sft", "norm/embedding"):
                assert entry[name] == pytest.approx(first[name], abs=2e-5), name


@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_what_is_logged(tmp_path: Path, engine: str) -> None:
    trainer = trainer_of(tmp_path, kl_coef=0.2, sft_coef=0.3, attack_engine=engine)
    trainer.train()
    entries = logged(trainer)
    assert [entry["lpa_step"] for entry in entries] == [1, 2]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert entry["attack_toward_last"] < entry["attack_toward_first"]
        parts = [entry[f"defence_{name}"] for name in ("toward", "away", "sft", "kl")]
        assert entry["defence_total"] == pytest.approx(sum(parts))
        assert {"norm/embedding", "norm/mlp:0", "norm/mlp:1"} <= entry.keys()
        assert 0 < entry["norm/embedding"] <= 3 * 0.05 * math.sqrt(32)
        assert entry["boundary_fraction"] == 0
        assert ("padding_share" in entry) == (engine == "packed")
        assert 0 <= entry.get("padding_share", 0) < 0.5
        assert entry["tokens_per_second"] > 0
        phases = [entry[f"seconds_{name}"] for name in ("attack", "defence", "other")]
        assert min(phases[:2]) > 0
        assert min(phases) >= 0
    assert entries[0]["defence_kl"] > 0  # of the second update: the first has changed the model
    coefs = trainer.args.coefs
    assert sum(coefs.values()) == pytest.approx(1)


def test_a_binding_radius_shows_in_the_boundary_fraction(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, attack_epsilon=0.1, lpa_steps=1)
    trainer.train()
    assert logged(trainer)[0]["boundary_fraction"] > 0.5
    assert logged(trainer)[0]["norm/embedding"] == pytest.approx(0.1, rel=0.1)


class Loop(TrainerCallback):
    """Something done at a given model update."""

    def __init__(self, update: int, act: Any) -> None:
        self.update, self.act = update, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            self.act(control)


SETTINGS: dict[str, Any] = {
    "lpa_steps": 3,
    "save_strategy": "steps",
    "kl_coef": 0.2,
    "lora_dropout": 0.1,
    "attack_random_start": True,
}


@pytest.mark.parametrize("more", [{}, {"reset_optimizer": False, "lr_scheduler_type": "linear"}])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, more: dict[str, Any]) -> None:
    settings = SETTINGS | more
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()

    def stop(control: Any) -> None:
        control.should_training_stop = True

    first = trainer_of(tmp_path / "parts", callbacks=[Loop(3, stop)], **settings)
    first.train()
    assert first.state.global_step == 4  # asked for inside the second LPA step, done at its end
    second = trainer_of(tmp_path / "parts", **settings)
    second.train(resume_from_checkpoint=True)
    assert_same(weights(second), weights(whole))
    later = [entry["defence_total"] for entry in logged(whole)][2:]
    assert [entry["defence_total"] for entry in logged(second)][2:] == later


@pytest.mark.parametrize("update", [2, 3])
def test_a_requested_stop_saves_the_last_whole_step(tmp_path: Path, update: int) -> None:
    settings = SETTINGS | {"save_steps": 100}
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    first = trainer_of(tmp_path / "parts", **settings)
    first.add_callback(Loop(update, lambda control: first.request_stop()))
    first.train()
    done = 2 if update == 2 else 4
    assert first.interrupted
    assert first.state.global_step == done
    assert [folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")] == [f"checkpoint-{done}"]
    second = trainer_of(tmp_path / "parts", **settings)
    second.train(resume_from_checkpoint=True)
    assert not second.interrupted
    assert_same(weights(second), weights(whole))


def test_a_stop_in_the_attack_leaves_the_weights_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **SETTINGS)
    attack, seen, trained = trainer.pgd.attack, [], weights(trainer)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if n in trained})
        if len(seen) == 3:  # the first micro-batch of the second LPA step
            trainer.request_stop()
        return attack(*args, **kwargs)

    trainer.pgd.attack = watched  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == 3
    assert trainer.state.global_step == 2
    assert_same(weights(trainer), seen[-1])


def test_saves_asked_for_inside_a_step_are_made_at_its_end(tmp_path: Path) -> None:
    def save(control: Any) -> None:
        control.should_save = True

    trainer = trainer_of(tmp_path, callbacks=[Loop(1, save)], lpa_steps=2)
    trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_inside_a_step_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, save_strategy="steps", defence_steps=3, lpa_steps=1).train()
    with pytest.raises(ValueError, match="was made with defence_steps=3, now 2"):
        trainer_of(tmp_path, save_strategy="steps").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_reset_optimizer_is_a_new_adamw(tmp_path: Path) -> None:
    kept = trainer_of(tmp_path, reset_optimizer=False)
    kept.train()
    reset = trainer_of(tmp_path)
    states: list[int] = []
    reset.add_callback(Loop(2, lambda control: states.append(len(reset.optimizer.state))))
    end = reset._end_lpa_step

    def after() -> None:
        end()
        states.append(len(reset.optimizer.state))

    reset._end_lpa_step = after  # type: ignore[method-assign]
    reset.train()
    assert states[0] > 0
    assert states[1] == 0
    one, other = weights(kept), weights(reset)
    assert max(float((one[n] - other[n]).abs().max()) for n in one) > 1e-6


def test_training_moves_the_answers(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lpa_steps=6, learning_rate=1e-2, defence_steps=4, attack_steps=2)
    trainer.train()
    entries = logged(trainer)
    assert entries[-1]["defence_toward"] < 0.6 * entries[0]["defence_toward"]


def test_no_attack_at_steps_0(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, attack_steps=0)
    trainer.train()
    assert not any(name.startswith(("attack_", "norm/")) for name in logged(trainer)[0])
    assert logged(trainer)[0]["defence_toward"] > 0


def test_full_fine_tuning_with_sft(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora=False, sft_coef=0.5)
    before = weights(trainer)
    assert len(before) == len(dict(trainer.model.named_parameters()))
    trainer.train()
    assert sum(not torch.equal(before[n], w) for n, w in weights(trainer).items()) > 10
    with pytest.raises(ValueError, match="needs the base model"):
        trainer_of(tmp_path, lora=False, kl_coef=0.5)


def test_kl_of_full_fine_tuning_takes_a_reference_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora=False, kl_coef=0.5, ref_model=tiny_model(len(TOKENIZER)), lpa_steps=1)
    trainer.train()
    assert logged(trainer)[0]["defence_kl"] > 0


def test_any_peft_config(tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = trainer_of(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    trainer.train()
    assert all("q_proj" in name for name in weights(trainer))


def test_nan_in_the_model_raises_before_anything_changes(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER))
    trainer = trainer_of(tmp_path, model=model, save_strategy="steps", lpa_steps=3)

    def spoil(control: Any) -> None:
        model.model.layers[-1].mlp.down_proj.weight.data.fill_(float("nan"))

    trainer.add_callback(Loop(2, spoil))
    with pytest.raises(FloatingPointError, match=r"LPA step 2: the adversary's loss is nan"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_nan_in_the_defence_raises_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, save_strategy="steps", lpa_steps=1)
    before, losses = weights(trainer), LPAStep.losses
    monkeypatch.setattr(LPAStep, "losses", lambda *given: (losses(*given)[0] * float("nan"), {}))
    with pytest.raises(FloatingPointError, match=r"LPA step 1, update 1: the gradient's norm is nan"):
        trainer.train()
    assert_same(weights(trainer), before)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        trainer_of(tmp_path, [])
    with pytest.raises(DataError, match="no column chosen"):
        trainer_of(tmp_path, [{"prompt": "I agree", "rejected": "no"}])
    long = [*rows(2), {"prompt": "I agree " * 100, "rejected": "I agree", "chosen": "no"}]
    with pytest.raises(DataError, match=r"row 3: prompt and completion have \d+ tokens .* the context holds 128"):
        trainer_of(tmp_path, long)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_row_is_enough_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the data set has 1 row and a batch 4"):
        trainer = trainer_of(tmp_path, rows(1))
    trainer.train()
    assert len(logged(trainer)) == 2


def test_a_model_without_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(LlamaModel\) has no LM head"):
        trainer_of(tmp_path, model=tiny_model(len(TOKENIZER)).model)


def test_models_without_the_usual_modules_get_adapters_everywhere(tmp_path: Path, caplog: Any) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=128))
    trainer = trainer_of(tmp_path, model=model)
    assert "has no modules ['q_proj'" in caplog.text
    assert any("c_fc" in name for name in weights(trainer))


def test_lora_targets_are_names_of_modules(tmp_path: Path) -> None:
    one = weights(trainer_of(tmp_path, lora_targets="q_proj"))
    assert one
    assert all("q_proj" in name for name in one)
    assert any("gate_proj" in name for name in weights(trainer_of(tmp_path, lora_targets="all-linear")))
    assert len(weights(trainer_of(tmp_path, lora_targets=["0.self_attn.q_proj"]))) == 2
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no modules wi; use names"):
        trainer_of(tmp_path, lora_targets=["q_proj", "wi"])


def test_max_length_is_within_the_context(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length=129 is above the model's context of 128 tokens"):
        trainer_of(tmp_path, max_length=129)
    with pytest.raises(DataError, match="the context holds 5"):
        trainer_of(tmp_path, max_length=5)


def test_unused_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the benign data set is not used: sft_coef and kl_coef are 0"):
        trainer_of(tmp_path, benign_dataset=[{"prompt": "I agree", "response": "no"}])
    with pytest.raises(ValueError, match="mlp:9"):  # before any step
        trainer_of(tmp_path, attack_sites="mlp:9")


def test_large_seeds(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, seed=2**32 - 1, attack_random_start=True, lpa_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1


def test_the_attack_enters_late_and_its_radius_grows(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lpa_steps=5, attack_start=2, attack_growth=2, attack_epsilon=0.2, defence_steps=1)
    made: list[list[float | None]] = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            attacks = [micro.attack for parts in step_of(trainer).micro for micro in parts]
            made.append([None if each is None else float(each.epsilon) for each in attacks])

    trainer.add_callback(Watch())
    trainer.train()
    assert made == [[None] * 2, [None] * 2, [0.1] * 2, [0.2] * 2, [0.2] * 2]
    entries = logged(trainer)
    assert ["attack_toward_first" in entry for entry in entries] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attack_start": -1}, "attack_start=-1 must be 0 or more"),
        ({"attack_start": 2}, "attack_start=2 leaves no LPA step with an attack, of lpa_steps=2"),
        ({"attack_start": 2.5}, "attack_start=2.5 must be whole LPA steps, or a share of the run below 1"),
        ({"attack_growth": 3, "attack_epsilon": math.inf}, "attack_growth=3 needs a finite attack_epsilon"),
    ],
)
def test_an_impossible_schedule_of_the_attack_raises(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(tmp_path, **settings)


def test_the_attack_enters_after_a_share_of_the_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, lpa_steps=10, attack_start=0.75, attack_epsilon=0.2)
    assert [config.attack_radius(step) for step in (0, 6, 7, 9)] == [0, 0, 0.2, 0.2]
    assert "lpa_steps" in config.bound_settings  # where it enters hangs on the run's length
    assert tiny_config(tmp_path, lpa_steps=1, attack_start=0.75).attack_radius(0) > 0


@pytest.mark.parametrize(("name", "rows"), [("undesirable", 64), ("desirable", 64), ("both", 128)])
def test_the_shipped_statements_are_named_as_on_the_command_line(tmp_path: Path, name: str, rows: int) -> None:
    assert len(trainer_of(tmp_path, name).train_dataset) == rows


@pytest.mark.parametrize(
    "settings",
    [
        {"attack_adversary": "random"},
        {"attack_adversary": "vector", "attack_direction": "FILE"},
        {"attack_adversary": "ablate", "attack_direction": ["FIRST", "SECOND"], "attack_share": 0.5},
    ],
)
def test_adversaries_without_inner_steps(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_file({"direction": torch.ones(tiny_model(len(TOKENIZER)).config.hidden_size)}, tmp_path / "one.safetensors")
    for name, lines in (("first", "Open the door\nClose it"), ("benign", "Good morning")):
        (tmp_path / f"{name}.txt").write_text(lines)
    places = {"FILE": "one.safetensors", "FIRST": "first.txt", "SECOND": "benign.txt"}
    given = settings.get("attack_direction", [])
    if given:
        names = [given] if isinstance(given, str) else given
        settings = settings | {"attack_direction": [str(tmp_path / places[name]) for name in names]}
    trainer = trainer_of(tmp_path, lpa_steps=2, defence_steps=1, **settings)
    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.extend(micro.attack for parts in step_of(trainer).micro for micro in parts)

    trainer.add_callback(Watch())
    trainer.train()
    assert seen
    assert all((attack.ablated is not None) == (settings["attack_adversary"] == "ablate") for attack in seen)
    entries = logged(trainer)
    assert len(entries) == 2
    assert not any(name.startswith("attack_") for entry in entries for name in entry)
    assert all(math.isfinite(entry["defence_total"]) for entry in entries)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attack_adversary": "gcg"}, "attack_adversary='gcg' is unknown; use one of pgd, vector, ablate, random"),
        ({"attack_adversary": "vector"}, "attack_direction=None do not fit: vector and ablate need a direction"),
        ({"attack_direction": "a.safetensors"}, "attack_adversary='pgd' and attack_direction=.* do not fit"),
        ({"attack_adversary": "ablate", "attack_direction": "a.pt"}, "must be one .safetensors file or two sets"),
        ({"attack_share": 0.5}, "attack_share=0.5 must be above 0 and at most 1, and 1 for attack_adversary='pgd'"),
    ],
)
def test_adversaries_that_cannot_be(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(tmp_path, **settings)


def test_a_missing_set_of_prompts_is_named(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("Good morning")
    sets = [str(tmp_path / "some.txt"), str(tmp_path / "none.txt")]
    with pytest.raises(ValueError, match=r"the set '.*none.txt' is unavailable"):
        trainer_of(tmp_path, attack_adversary="vector", attack_direction=sets)


def test_the_published_radius_is_no_news_and_ones_own_is(tmp_path: Path, caplog: Any) -> None:
    trainer_of(tmp_path / "default", lpa_steps=1).train()
    assert "never binds" not in caplog.text
    trainer_of(tmp_path / "own", lpa_steps=1, attack_epsilon=5.0).train()
    assert "epsilon=5 never binds" in caplog.text
