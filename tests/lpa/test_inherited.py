"""Every setting of TrainingArguments and option of Trainer is used, harmless or refused, and refused by its name."""

from __future__ import annotations

import inspect
from dataclasses import fields, make_dataclass, replace
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from lpa import LPAConfig
from lpa.inherited import HARMLESS, OPTIONS_REFUSED, OPTIONS_USED, REFUSED, USED, check_options


def test_every_setting_and_option_is_classified_once() -> None:
    names = {field.name for field in fields(TrainingArguments)}
    assert not names - USED - HARMLESS.keys() - REFUSED.keys(), "say in lpa/inherited.py what becomes of these"
    assert not (USED & HARMLESS.keys()) | (USED & REFUSED.keys()) | (HARMLESS.keys() & REFUSED.keys())
    options = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert not options - OPTIONS_USED - OPTIONS_REFUSED.keys(), "say in lpa/inherited.py what becomes of these"
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since transformers 5.22
    assert (USED | HARMLESS.keys() | REFUSED.keys()) - names <= newer, "these are no settings"


OTHER: dict[str, Any] = {
    "average_tokens_across_devices": False, "eval_do_concat_batches": False, "num_train_epochs": 1.0,
    "label_names": ["labels"], "include_for_metrics": ["loss"], "eval_accumulation_steps": 2,
    "accelerator_config": {"split_batches": True}, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "train_sampling_strategy": "group_by_length", "length_column_name": "size", "resume_from_checkpoint": "here",
    "torch_compile_backend": "inductor", "torch_compile_mode": "default", "deepspeed": "zero.json",
    "parallelism_config": object(),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options_are_named_with_a_reason(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* cannot be used with LPA") as found:
        LPAConfig("out", use_cpu=True, **{name: OTHER.get(name, True)})
    assert REFUSED[name] in str(found.value)


@pytest.mark.parametrize("name", sorted(OPTIONS_REFUSED))
def test_refused_options_are_named(name: str) -> None:
    config = LPAConfig("out", use_cpu=True)
    check_options({name: None}, config)
    with pytest.raises(ValueError, match=f"{name} cannot be used with LPA"):
        check_options({name: print}, config)


def test_a_setting_of_a_later_release_is_refused_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    later = make_dataclass("Later", [("turbo", bool, False)], bases=(LPAConfig,))
    both = [*fields(TrainingArguments), *(field for field in fields(later) if field.name == "turbo")]
    ours = fields
    monkeypatch.setattr("lpa.inherited.fields", lambda of: both if of is TrainingArguments else ours(of))
    later("out", use_cpu=True)
    with pytest.raises(ValueError, match="turbo=True cannot be used with LPA: this release does not know"):
        later("out", use_cpu=True, turbo=True)
    with pytest.raises(ValueError, match="novelty cannot be used with LPA"):
        check_options({"novelty": 1}, later("out", use_cpu=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 3}, "warmup_steps=3 would have no effect: .*constant_with_warmup"),
        ({"warmup_steps": 3, "lr_scheduler_type": "greedy"}, "lr_scheduler_type='greedy' has no warm-up"),
        ({"warmup_steps": 3, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "has no warm-up"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs=.* would have no effect"),
        ({"optim_target_modules": ["q"]}, "optim_target_modules=.* only galore and apollo"),
        ({"liger_kernel_config": {"rope": True}}, "it needs use_liger_kernel=True"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "it needs gradient_checkpointing=True"),
        ({"dataloader_persistent_workers": True}, "it needs dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "spawn"}, "it needs dataloader_num_workers"),
        ({"dataloader_in_order": False}, "dataloader_in_order=False would have no effect: it needs dataloader_num_wo"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor=2 would have no effect"),
        ({"optim_args": "foo=1"}, "foo would have no effect: optim='adamw_torch_fused' reads none"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,foo=1"}, "foo would have no effect: optim='sgd' reads momentum,"),
        ({"optim": "sgd", "optim_args": "weight_decay=1"}, "weight_decay would have no effect: .*use the setting"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1=0.5 would have no effect: optim='sgd' does not read it"),
        ({"optim": "adafactor", "adam_epsilon": 1e-3}, "adam_epsilon=0.001 would have no effect"),
        ({"optim": "lion_8bit", "adam_epsilon": 1e-3}, "adam_epsilon=0.001 would have no effect"),
        ({"eval_steps": 4}, "eval_steps=4 would have no effect: it needs eval_strategy='steps'"),
        ({"eval_steps": 4, "eval_strategy": "epoch"}, "eval_steps=4 would have no effect"),
        ({"metric_for_best_model": "margin"}, "metric_for_best_model='margin' would have no effect: nothing is eval"),
        ({"greater_is_better": False}, "greater_is_better=False would have no effect"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config=.* would have no effect: it needs fsdp"),
        ({"hub_model_id": "a/b"}, "hub_model_id='a/b' would have no effect: it needs push_to_hub=True"),
        ({"hub_strategy": "end"}, "hub_strategy='end' would have no effect"),
        ({"hub_token": "hidden"}, r"hub_token=\(a secret\) would have no effect"),
        ({"ddp_backend": "gloo"}, "ddp_backend='gloo' would have no effect: this is one process"),
        ({"save_strategy": "best"}, "save_strategy='best' would never save: nothing is evaluated"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' averages the weights of a whole run"),
        ({"optim": "lomo"}, "optim='lomo' updates weights within the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "use galore_adamw$"),
        ({"canary_steps": 1, "eval_strategy": "steps", "load_best_model_at_end": True}, "each choose a best step"),
        ({"max_grad_norm": None}, r"max_grad_norm=None is of type NoneType; it must be float \(0 does not clip\)"),
        ({"lpa_steps": 2.0}, "lpa_steps=2.0 is of type float; it must be int"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' is of type str; it must be float"),
        ({"defence_steps": True}, "defence_steps=True is of type bool; it must be int"),
        ({"lora": "no"}, "lora='no' is of type str; it must be bool"),
        ({"max_length": 1.5}, "max_length=1.5 is of type float; it must be NoneType or int"),
    ],
)
def test_options_without_effect_or_of_another_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPAConfig("out", use_cpu=True, **settings)


def test_the_defaults_in_other_words_are_taken() -> None:
    LPAConfig("out", use_cpu=True, accelerator_config={"use_configured_state": False}, label_names=[], deepspeed=None,
              eval_accumulation_steps=None, save_strategy="no", report_to="none")  # fmt: skip


def test_a_config_is_copied_with_what_transformers_filled_in() -> None:
    made = LPAConfig("out", use_cpu=True, optim="sgd", optim_args="momentum=0.9, nesterov=true")
    assert replace(made, lora_r=2).optim_args == made.optim_args


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointing_is_asked_for_by_either_name_without_a_warning() -> None:
    made = LPAConfig("out", use_cpu=True, gradient_checkpointing=True)
    assert made.gradient_checkpointing
    assert getattr(made, "activation_checkpointing", True)
