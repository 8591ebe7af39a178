"""What transformers' Trainer can do: callbacks, optimisers, evaluation, counters and resumption keep their meaning."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from lpa import LPAConfig, LPATrainer
from lpa.data import load_pairs
from lpa.inherited import check_options
from lpa.training import prepare
from lpa.training.evaluating import eval_sets
from lpa.training.optimisers import Fresh
from lpa.training.progress import eval_line
from lpa.training.ranks import RankError
from lpa.training.resuming import check_resumed
from tests.support import jobs, ranks
from tests.support.tiny import rows, tiny_config, tiny_model
from tests.support.trainers import TOKENIZER, assert_same, logged, trainer_of, weights


class Stop(TrainerCallback):
    """Asks at a given event of a given update for a stop."""

    def __init__(self, event: str, update: int) -> None:
        setattr(self, event, lambda args, state, control, **_: self.ask(state, control))
        self.update = update

    def ask(self, state: Any, control: Any) -> None:
        control.should_training_stop |= state.global_step == self.update


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"])
def test_a_stop_within_an_update_ends_the_lpa_step_first(tmp_path: Path, event: str) -> None:
    trainer = trainer_of(tmp_path / "parts", lpa_steps=3)
    trainer.add_callback(Stop(event, 2))
    trainer.train()
    whole = trainer_of(tmp_path / "whole", lpa_steps=2)
    whole.train()
    assert trainer.state.global_step == 4
    assert_same(weights(trainer), weights(whole))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_users_own_progress_and_printer_callbacks_stay(tmp_path: Path) -> None:
    class Mine(ProgressCallback):
        """Its own."""

    class Printer(PrinterCallback):
        """Its own."""

    given = [Mine(), Printer(), PrinterCallback()]
    trainer = trainer_of(tmp_path, callbacks=given)
    held = trainer.callback_handler.callbacks
    assert all(each in held for each in given)
    assert sum(isinstance(each, PrinterCallback) for each in held) == 2


def test_an_optimizer_made_before_the_adapters_is_refused(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER))
    early = torch.optim.SGD(model.parameters(), lr=0.1)

    def make(model: Any, optimizers: Any) -> LPATrainer:
        return trainer_of(tmp_path, model=model, optimizers=optimizers)

    with pytest.raises(ValueError, match=r"optimizers holds 0 of the 24 tensors .*optimizer_cls_and_kwargs"):
        make(model, (early, None))
    with pytest.raises(ValueError, match="that schedule is of another optimiser"):
        make(tiny_model(len(TOKENIZER)), (None, torch.optim.lr_scheduler.LambdaLR(early, lambda step: 1.0)))
    adapted = trainer_of(tmp_path).model
    mine = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    trainer = make(adapted, (mine, torch.optim.lr_scheduler.LambdaLR(mine, lambda step: 1.0)))
    before = weights(trainer)
    trainer.train()
    assert max(float((before[n] - w).abs().max()) for n, w in weights(trainer).items()) > 1e-4


@pytest.mark.parametrize(
    ("option", "setting", "told"),
    [
        ("optimizers", {"adam_beta1": 0.5}, "adam_beta1=0.5 would have no effect: optimizers has its own"),
        ("optimizers", {"optim": "sgd"}, "optim='sgd' would have no effect: optimizers has"),
        ("optimizers", {"weight_decay": 0.5}, "weight_decay=0.5 would have no effect: optimizers has"),
        ("optimizers", {"lr_scheduler_type": "linear"}, "lr_scheduler_type='linear' .* the schedule in optimizers has"),
        ("optimizer_cls_and_kwargs", {"learning_rate": 1.0}, "learning_rate=1.0 .* optimizer_cls_and_kwargs has"),
    ],
)
def test_settings_that_an_optimizer_of_ones_own_replaces(option: str, setting: dict[str, Any], told: str) -> None:
    made = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    both = (made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0))
    given = {option: both if option == "optimizers" else (torch.optim.SGD, {"lr": 0.1})}
    check_options(given, LPAConfig("out", use_cpu=True))
    with pytest.raises(ValueError, match=told):
        check_options(given, LPAConfig("out", use_cpu=True, **setting))


class Counting(torch.optim.SGD):
    """Keeps its step counter in the parameter groups, as schedule-free and Prodigy do."""

    def step(self, closure: Any = None) -> Any:
        seen.append(self.param_groups[0].get("k", 0))
        self.param_groups[0]["k"] = seen[-1] + 1
        return super().step(closure)


seen: list[int] = []


def test_reset_optimizer_resets_counters_in_the_groups(tmp_path: Path) -> None:
    seen.clear()
    trainer = trainer_of(tmp_path)
    trainer.optimizer_cls_and_kwargs = (Counting, {"lr": 1e-3})
    trainer.train()
    assert seen == [0, 1, 0, 1]
    p = torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.AdamW([p], lr=1.0)
    fresh = Fresh(adam)
    p.sum().backward()
    adam.step()
    adam.param_groups[0] |= {"lr": 0.5, "betas": (0.1, 0.1), "extra": 1}
    fresh.restore(adam)
    assert adam.param_groups[0]["lr"] == 0.5
    assert adam.param_groups[0]["betas"] == (0.9, 0.999)
    assert "extra" not in adam.param_groups[0]
    assert not adam.state


class TwoFaced(torch.optim.SGD):
    """With modes, as schedule-free optimisers have them."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_an_optimizer_with_modes_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.optimizer_cls_and_kwargs = (TwoFaced, {"lr": 1e-3})
    with pytest.raises(ValueError, match="TwoFaced has weights of its own for evaluation"):
        trainer.train()


def test_options_that_would_have_no_effect_are_refused(tmp_path: Path) -> None:
    class OwnLoss(LPATrainer):
        """With a loss that nobody would call."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    model = tiny_model(len(TOKENIZER))
    with pytest.raises(ValueError, match=r"OwnLoss.compute_loss would never be called"):
        OwnLoss(model, tiny_config(tmp_path), rows(8), TOKENIZER)
    with pytest.raises(ValueError, match="args is a TrainingArguments; give an LPAConfig"):
        LPATrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), rows(8), TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute_metrics cannot be used with LPA: evaluate"):
        LPATrainer(model, tiny_config(tmp_path), rows(8), TOKENIZER, compute_metrics=print)
    with pytest.raises(ValueError, match="model_init cannot be used with LPA: give the model"):
        LPATrainer(None, tiny_config(tmp_path), rows(8), TOKENIZER, model_init=lambda: model)
    with pytest.raises(ValueError, match="use_liger_kernel=True needs a GPU"):
        trainer_of(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match=r"no predict\(\)"):
        trainer_of(tmp_path).predict(rows(2))


@pytest.mark.parametrize("how", ["all", "non_padding"])
def test_tokens_are_counted(tmp_path: Path, how: str) -> None:
    trainer = trainer_of(tmp_path, include_num_input_tokens_seen=how, lpa_steps=1)
    counted = 0
    for batch in trainer.get_train_dataloader():
        for kind in ("rejected", "chosen"):
            mask = batch[f"{kind}_mask"].bool()
            counted += mask.numel() if how == "all" else int((mask.flip(1).cumsum(1) > 0).sum())
    trainer.train()
    assert trainer.state.num_input_tokens_seen == counted > 0


def test_memory_is_emptied_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    trainer = trainer_of(tmp_path, torch_empty_cache_steps=2)
    monkeypatch.setattr("lpa.training.trainer.clear_device_cache", lambda: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == [0, 0, 2, 2]


def test_data_are_loaded_as_asked(tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3,
                "dataloader_multiprocessing_context": "fork"}  # fmt: skip
    loader = trainer_of(tmp_path, **settings).get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (1, True, 3)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [{}, {"dpo_coef": 1.0, "toward_coef": 0.0, "away_coef": 0.0}])
def test_evaluate_measures_held_out_statements_and_pairs(tmp_path: Path, objective: dict[str, float]) -> None:
    trainer = trainer_of(tmp_path, **objective)
    before = weights(trainer)
    found = trainer.evaluate()
    assert "preferred" in eval_line(found, "eval")
    assert all(math.isfinite(value) for value in found.values())
    assert {"eval_loss", "eval_preferred", "eval_margin", "eval_preferred_attacked", "eval_margin_attacked"} <= set(
        found
    )
    assert found["eval_margin_attacked"] < found["eval_margin"], "the attack pushes toward the rejected completion"
    assert_same(weights(trainer), before)
    own = trainer.evaluate({"some": rows(3), "others": rows(5)})
    assert own["eval_some_loss"] != own["eval_others_loss"]
    assert trainer.state.log_history[-1]["eval_some_loss"] == own["eval_some_loss"]
    small = trainer_of(tmp_path / "small", per_device_eval_batch_size=2, **objective).evaluate(rows(5))
    assert small["eval_loss"] == pytest.approx(own["eval_others_loss"], abs=1e-4)
    with pytest.raises(ValueError, match="no rows"):
        trainer.evaluate([])


def test_evaluate_draws_alike_and_leaves_the_random_state(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, attack_adversary="random", attack_share=0.5)
    state = torch.random.get_rng_state()
    one, other = trainer.evaluate(rows(4)), trainer.evaluate(rows(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    del one["eval_runtime"], other["eval_runtime"]
    assert one == other


def test_evaluate_takes_held_out_statements_by_name_and_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def prompts(given: Any) -> dict[str, list[str]]:
        trainer = trainer_of(tmp_path)
        sets = eval_sets(given, trainer.model, TOKENIZER, trainer.args, None)
        return {name: list(found["prompt"]) for name, (found, _) in sets.items()}

    held_out = load_pairs(kind="both", split="heldout")["prompt"]
    assert prompts("both") == prompts(None) == {"": list(held_out)}
    assert set(prompts({"one": "desirable", "two": rows(2)})) == {"one", "two"}
    assert not caplog.records
    assert len(prompts("shuffled")[""]) == len(held_out)
    assert prompts("irrelevant") == {"": list(load_pairs("irrelevant")["prompt"])}
    assert "'irrelevant' have no split 'heldout'" in caplog.text
    keyed = {"statement": ["I agree .", "I disagree ."], "key": ["+1", "-1"]}
    assert prompts(keyed) == {"": ["I agree .", "I disagree ."]}


def test_evaluation_during_training_keeps_the_best_step(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, lpa_steps=3, learning_rate=3e-2, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        save_strategy="best", load_best_model_at_end=True, metric_for_best_model="margin", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "eval_margin" in entry]
    assert [entry["step"] for entry in told] == [0, 2, 4, 6]
    best = max(told[1:], key=lambda entry: entry["eval_margin"])
    assert trainer.state.best_global_step == best["step"] != 6
    assert f"checkpoint-{best['step']}" in [path.name for path in tmp_path.iterdir()]
    assert trainer.evaluate()["eval_margin"] == pytest.approx(best["eval_margin"], abs=1e-5)
    plain = trainer_of(tmp_path / "plain", lpa_steps=3, learning_rate=3e-2)
    plain.train()
    assert [e["defence_total"] for e in logged(plain)] == [e["defence_total"] for e in logged(trainer)]


def test_a_malformed_eval_dataset_raises_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column chosen"):
        LPATrainer(tiny_model(len(TOKENIZER)), tiny_config(tmp_path), rows(8), TOKENIZER,
                   eval_dataset=[{"prompt": "I agree", "rejected": "no"}])  # fmt: skip


def test_a_plateau_lowers_the_learning_rate(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lpa_steps=3, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps",
                         eval_steps=1, lr_scheduler_kwargs={"patience": 0, "threshold": 1e6})  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in logged(trainer)]
    assert rates[-1] < rates[0]


# ---- resumption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"defence_steps": 4}, "defence_steps=2, now 4"),
        ({"defence_steps": 1}, "defence_steps=2, now 1"),
        ({"seed": 7}, "seed=42, now 7"),
        ({"attack_sites": ["mlp:1"]}, r"attack_sites=None, now \['mlp:1'\]"),
        ({"attack_epsilon": 2.0}, "attack_epsilon=6.0, now 2.0"),
        ({"kl_coef": 0.5}, "kl_coef=0.0, now 0.5"),
        ({"gradient_accumulation_steps": 1}, "pairs an LPA step=4, now 2"),
        ({"optim": "sgd"}, "optim='adamw_torch_fused', now 'sgd'"),
        ({"eval_strategy": "steps", "metric_for_best_model": "margin"}, "metric_for_best_model='loss', now 'margin'"),
        ({"model": tiny_model(len(TOKENIZER), seed=1)}, "base model="),
        (
            {"peft_config": LoraConfig(r=2, lora_alpha=99, target_modules=["q_proj"])},
            "adapter's lora_alpha=8.0, now 99",
        ),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, r"own optimizer=None, now \['SGD', {'lr': 0.1}"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    watched = {"eval_strategy": "steps", "metric_for_best_model": "loss"} if "metric_for_best_model" in other else {}
    trainer_of(tmp_path, save_strategy="steps", lpa_steps=1, **watched).train()
    with pytest.raises(ValueError, match=f"was made with .*{message}"):
        trainer_of(tmp_path, lpa_steps=2, **other).train(resume_from_checkpoint=True)


def test_resuming_on_other_data_raises_and_a_longer_run_goes_on(tmp_path: Path) -> None:
    trainer_of(tmp_path, save_strategy="steps", lpa_steps=1).train()
    with pytest.raises(ValueError, match=r"was made with .*data="):
        trainer_of(tmp_path, rows(9)[1:], lpa_steps=2).train(resume_from_checkpoint=True)
    again = trainer_of(tmp_path, lpa_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_resuming_with_another_chat_template_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(**settings: Any) -> LPATrainer:
        benign = [{"prompt": row["prompt"], "response": "I agree"} for row in rows(4)]
        return trainer_of(tmp_path, benign_dataset=benign, sft_coef=0.1, save_strategy="steps", **settings)

    trainer(lpa_steps=1).train()
    monkeypatch.setattr(TOKENIZER, "chat_template", "I agree " + TOKENIZER.chat_template)
    with pytest.raises(ValueError, match=r"made with tokens=.*the chat template or the tokenizer is .*benign tokens="):
        trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_keeps_less_is_resumed(tmp_path: Path) -> None:
    kept = trainer_of(tmp_path).kept_settings()
    old = {k: v for k, v in kept.items() if k not in ("tokens", "own optimizer", "optim_target_modules")}
    (tmp_path / "settings.json").write_text(json.dumps(old))
    check_resumed(tmp_path, kept)
    with pytest.raises(ValueError, match=r"was made with seed=42, now 1;"):
        check_resumed(tmp_path, kept | {"seed": 1})


@pytest.mark.parametrize("how", ["betas", "class"])
def test_resuming_with_another_optimizer_of_ones_own_raises(tmp_path: Path, how: str) -> None:
    def trainer(make: Any, **settings: Any) -> LPATrainer:
        model = get_peft_model(tiny_model(len(TOKENIZER)), LoraConfig(r=4, target_modules=["q_proj"]))
        made = make([p for p in model.parameters() if p.requires_grad])
        return trainer_of(tmp_path, model=model, optimizers=(made, None), save_strategy="steps", **settings)

    trainer(torch.optim.AdamW, lpa_steps=1).train()
    other = torch.optim.SGD if how == "class" else partial(torch.optim.AdamW, betas=(0.5, 0.9))
    with pytest.raises(ValueError, match="was made with own optimizer="):
        trainer(other).train(resume_from_checkpoint=True)
    trainer(torch.optim.AdamW).train(resume_from_checkpoint=True)


def test_resuming_on_other_benign_data_raises(tmp_path: Path) -> None:
    def trainer(answer: str, **settings: Any) -> LPATrainer:
        benign = [{"prompt": row["prompt"], "response": answer} for row in rows(4)]
        return trainer_of(tmp_path, benign_dataset=benign, sft_coef=0.1, save_strategy="steps", **settings)

    trainer("I agree", lpa_steps=1).train()
    with pytest.raises(ValueError, match="was made with benign data="):
        trainer("You are helpful").train(resume_from_checkpoint=True)
    trainer("I agree").train(resume_from_checkpoint=True)


def test_the_micro_normaliser_binds_how_a_batch_is_split(tmp_path: Path) -> None:
    trainer_of(tmp_path, save_strategy="steps", lpa_steps=1, normaliser="micro").train()
    other = trainer_of(tmp_path, normaliser="micro", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match=r"was made with .*per_device_train_batch_size=2, now 1"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("settings", [{"attack_epsilon": math.inf}, {"learning_rate": np.float32(1e-3)}])
def test_any_number_can_be_kept_and_resumed(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer_of(tmp_path, save_strategy="steps", lpa_steps=1, **settings).train()
    trainer_of(tmp_path, **settings).train(resume_from_checkpoint=True)
    json.dumps(trainer_of(tmp_path, **settings).args.own_settings, allow_nan=False)


def test_settings_that_json_cannot_hold_raise_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": math.nan})
    with pytest.raises(ValueError, match=r"settings of a checkpoint cannot be saved.*lr_scheduler_kwargs.min_lr = nan"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_is_resumed_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} " + TOKENIZER.chat_template
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    for number, day in enumerate(("2026-03-09", "2026-03-10"), 1):
        monkeypatch.setattr("lpa.data.rendering.today", lambda day=day: day)
        trainer = trainer_of(tmp_path, save_strategy="steps", lpa_steps=number)
        assert trainer.args.chat_template_date == "2026-03-09"
        trainer.train(resume_from_checkpoint=number == 2)


def test_tokenising_and_asking_the_model_do_not_change_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ strftime_now('%Y-%m-%d') }} " + TOKENIZER.chat_template)
    monkeypatch.setattr(prepare, "own_answers", lambda *_, **__: [{"prompt": "I agree", "response": "no"}])
    config, model = tiny_config(tmp_path, kl_coef=0.1, benign_system_prompt=""), tiny_model(len(TOKENIZER))
    before = config.to_dict()
    benign = prepare.benign_source("own", model, TOKENIZER, config)
    prepare.benign_as_tokens(benign, model, TOKENIZER, config, None)
    prepare.pairs_as_tokens(rows(2), model, TOKENIZER, config, None)
    assert config.to_dict() == before


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    first = trainer_of(tmp_path, save_strategy="steps", lpa_steps=1)
    first.train()
    first.train()  # its own may go on
    with pytest.raises(ValueError, match=r"holds an earlier run \(checkpoint-2\); give another one"):
        trainer_of(tmp_path, lpa_steps=1).train()
    first.save_model(str(tmp_path / "kept"))
    with pytest.raises(ValueError, match=r"holds an earlier run \(adapter_config.json\)"):
        trainer_of(tmp_path / "kept", lpa_steps=1).train()
    assert json.loads((tmp_path / "checkpoint-2/settings.json").read_text())["seed"] == 42


# ---- ranks ---------------------------------------------------------------------------------------------------------


def drift(folder: Path) -> None:
    """Train; on rank 1 something else changes the weights after the first update."""
    trainer = jobs.trainer_of(folder)

    class Drift(TrainerCallback):
        """As an exchange of gradients that leaves some out."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.process_index == 1:
                next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).data.add_(1e-4)

    trainer.add_callback(Drift())
    try:
        trainer.train()
    except RankError as error:
        assert "hold different weights" in str(error)  # noqa: PT017
        return
    raise AssertionError("nobody noticed")


@pytest.mark.ranks
def test_ranks_compare_their_weights_after_the_first_update(tmp_path: Path) -> None:
    ranks.run(drift, tmp_path, folder=tmp_path, world=2)
