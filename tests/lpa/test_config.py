"""LPAConfig: the published defaults, whole LPA steps, and what each bad setting says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from lpa.config import LPAConfig, default_sites
from lpa.inherited import FREE_TO_RESUME, USED


def config(**settings: Any) -> LPAConfig:
    return LPAConfig("out", use_cpu=True, **settings)


def test_published_defaults() -> None:
    c = config()
    assert (c.lpa_steps, c.defence_steps, c.attack_steps, c.attack_epsilon, c.attack_step_size) == (
        30,
        4,
        16,
        6.0,
        1e-3,
    )
    assert (c.learning_rate, c.lr_scheduler_type, c.weight_decay, c.max_grad_norm) == (8e-5, "constant", 0.01, 1.0)
    assert (c.lora_r, c.lora_alpha, c.lora_targets) == (
        64, 8, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])  # fmt: skip
    assert c.per_device_train_batch_size * c.gradient_accumulation_steps == 16
    assert (c.coefs, c.attack_coefs) == ({"toward": 0.5, "away": 0.5}, {"toward": 0.5, "away": 0.5})
    assert c.attack_on == "prompt+completions"
    assert c.max_steps == 120
    assert c.reset_optimizer


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, [8, 16, 24, 30]), (30, [7, 15, 22, 28]), (36, [9, 18, 27, 33]), (4, [1, 2, 3]), (1, [0])]
)
def test_sites_follow_the_depth(depth: int, layers: list[int]) -> None:
    assert default_sites(depth) == ["embedding", *(f"mlp:{layer}" for layer in layers)]


def test_steps_are_whole_lpa_steps() -> None:
    c = config(lpa_steps=10, save_steps=5, logging_steps=1, eval_steps=0.25, eval_strategy="steps")
    assert (c.max_steps, c.save_steps, c.logging_steps, c.eval_steps) == (40, 8, 4, 12)
    assert dataclasses.replace(c, learning_rate=1.0).max_steps == 40


def test_weights_are_divided_by_their_sum() -> None:
    assert config(sft_coef=1.5).coefs == pytest.approx({"toward": 0.2, "away": 0.2, "sft": 0.6})
    assert config(toward_coef=0, away_coef=2.0).coefs == {"away": 1.0}
    assert config(attack_away_coef=1.5).attack_coefs == {"toward": 0.25, "away": 0.75}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normaliser": "batch"}, "normaliser='batch' is unknown; use one of global, micro"),
        ({"attack_on": "all"}, "attack_on='all' is unknown"),
        ({"kl": "reverse"}, "kl='reverse' is unknown"),
        ({"kl": "public"}, "needs normaliser='micro'"),
        ({"lpa_steps": 0}, "lpa_steps=0 must be at least 1"),
        ({"attack_steps": -1}, "attack_steps=-1 must be 0"),
        (
            {"toward_coef": -1.0},
            "toward_coef=-1.0, away_coef=0.5, dpo_coef=0.0, ipo_coef=0.0, sft_coef=0.0, kl_coef=0.0: weights must not",
        ),
        ({"attack_toward_coef": 0, "attack_away_coef": 0}, "one of them must be above 0"),
        ({"max_steps": 7}, r"max_steps=7 counts model updates and follows from lpa_steps=30 x defence_steps=4 = 120"),
        ({"bf16": True}, "bf16=True cannot be used with LPA: there is no autocast"),
        ({"attack_norm": "l7"}, "attack_norm='l7' is unknown; use one of l2, linf"),
        ({"attack_rule": "newton"}, "attack_rule='newton' is unknown"),
        ({"attack_engine": "steam"}, "attack_engine='steam' is unknown"),
        ({"attack_backend": "abacus"}, "attack_backend='abacus' is unknown"),
        ({"attack_epsilon": -1.0}, "attack_epsilon=-1.0 must be positive"),
        ({"attack_step_size": math.nan}, "attack_step_size=nan must be positive"),
        ({"kl_coef": math.nan}, "weights must not be negative"),
        ({"lora_r": 0}, "lora_r=0 must be at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be in \[0, 1\)"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"seed": 2**32}, "seed=4294967296 must be in"),
        ({"dpo_coef": 1.0}, "mixes 'dpo' with other losses"),
        ({"attack_ipo_coef": 1.0}, "mixes 'ipo' with other losses"),
        ({"lora": False, "attack_merge_adapters": True}, "there are no adapters to merge"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True would have no effect: nothing is evaluated"),
        ({"torch_compile": True}, "torch_compile=True cannot be used"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True cannot be used"),
        ({"num_train_epochs": 1.0}, "num_train_epochs=1.0 cannot be used with LPA: a run's length is lpa_steps"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_single_name_is_a_list_of_one() -> None:
    c = config(attack_sites="embedding", lora_targets="all-linear")
    assert (c.attack_sites, c.lora_targets) == (["embedding"], ["all-linear"])


def test_the_record_holds_what_was_changed() -> None:
    told = config(optim="sgd", max_grad_norm=0.5).own_settings
    assert (told["optim"], told["max_grad_norm"], told["attack_epsilon"], told["seed"]) == ("sgd", 0.5, 6.0, 42)
    json.dumps(told, allow_nan=False)
    usual = config().own_settings
    assert "optim" not in usual
    assert "max_grad_norm" not in usual


def test_the_record_can_be_made_when_the_other_ranks_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = config(optim="sgd")
    whole = told.own_settings
    monkeypatch.setattr(LPAConfig, "_setup_devices", property(lambda self: pytest.fail("waits for the other ranks")))
    assert told.own_settings == whole


def test_a_former_name_is_answered_with_the_new_one() -> None:
    with pytest.raises(ValueError, match="steps=3: this setting is called attack_steps now"):
        config(steps=3)


def test_the_attack_has_the_settings_of_the_run() -> None:
    made = config(attack_epsilon=2.0, attack_steps=0, attack_rule="normalized", attack_toward_coef=1.5).attack_settings
    assert (made.epsilon, made.steps, made.rule) == (2.0, 1, "normalised")
    assert made.coefs == {"toward": 0.75, "away": 0.25}


def test_a_resumed_run_is_bound_to_every_setting_that_is_not_listed_as_free(tmp_path: Path) -> None:
    config = LPAConfig(str(tmp_path), use_cpu=True, optim="galore_adamw", optim_target_modules=["q_proj"],
                       eval_strategy="steps", metric_for_best_model="margin")  # fmt: skip
    assert config.bound_settings["optim_target_modules"] == ["q_proj"]
    inherited = {each.name for each in dataclasses.fields(TrainingArguments)} & USED
    own = LPAConfig.__annotations__.keys()
    assert inherited - own - config.bound_settings.keys() <= FREE_TO_RESUME <= USED
