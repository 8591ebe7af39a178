"""What becomes of every setting of `TrainingArguments` and every option of `Trainer`: used, harmless, or refused.

A new release of transformers may bring others. They are refused where they are set, and a test names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

# They do what transformers' documentation says of them. A resumed run has its checkpoint's values of these:
_BOUND = """
max_grad_norm learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay
optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon
metric_for_best_model greater_is_better seed data_seed
"""
# It may change these: where it runs, how it is computed, and what is watched and kept.
_FREE_TO_RESUME = """
output_dir max_steps per_device_train_batch_size gradient_accumulation_steps
tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps
logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen
log_level log_level_replica disable_tqdm report_to run_name
project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end
save_only_model save_strategy save_steps save_on_each_node save_total_limit restore_callback_states_from_checkpoint
push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
full_determinism use_cpu debug skip_memory_metrics
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout fsdp fsdp_config
"""
FREE_TO_RESUME = frozenset(_FREE_TO_RESUME.split())
USED = FREE_TO_RESUME | set(_BOUND.split())
# They change nothing here, as one expects.
HARMLESS = {
    "do_train": "for scripts",
    "do_eval": "for scripts",
    "do_predict": "for scripts",
    "local_rank": "the launcher's environment says it",
    "remove_unused_columns": "the collator gets every column",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
}
_SAMPLING = "each LPA step shuffles, and cuts its batch by length"
_METRICS = "evaluate() gathers no predictions; it tells eval_loss, eval_preferred and eval_margin"
_COMPILED = "a compiled model does not see the hooks that perturb it"
_DTYPE = "the model runs in the dtype that it is loaded in (lpa train --dtype)"
# Refused where they are set to another value than their default: why, and what to use.
REFUSED = {
    "num_train_epochs": "a run's length is lpa_steps",
    "average_tokens_across_devices": "normaliser says what a loss is a mean of",
    "label_smoothing_factor": "the losses are those of a pair's completions; see sft_coef and kl_coef",
    "bf16": f"there is no autocast; {_DTYPE}",
    "fp16": f"there is no autocast; {_DTYPE}",
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "neftune_noise_alpha": "its noise would add to the attack on the embedding; attack_random_start draws at random",
    "auto_find_batch_size": "it starts anew with another batch; auto_micro_batch goes on with the same one",
    "prediction_loss_only": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": _METRICS,
    "enable_jit_checkpoint": "request_stop() saves the last whole LPA step, and lpa train calls it on SIGTERM",
    "ignore_data_skip": "a resumed run takes up its batches where it left them",
    "parallelism_config": "use DDP, or FSDP2 to share the weights (fsdp=True)",
    "deepspeed": "use DDP, or FSDP2 to share the weights (fsdp=True)",
    "dataloader_drop_last": "no row is dropped: epochs follow one another without a border",
    "train_sampling_strategy": _SAMPLING,
    "length_column_name": _SAMPLING,
    "ddp_static_graph": "DDP would not exchange all gradients, and the ranks would train different models",
    "resume_from_checkpoint": "give it to train(); lpa train has --resume",
    "accelerator_config": f"accelerate does not make the batches here: {_SAMPLING}",
}
OPTIONS_USED = {"model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "callbacks",
                "optimizers", "optimizer_cls_and_kwargs"}  # fmt: skip
OPTIONS_REFUSED = {
    "model_init": "give the model, or its name",
    "compute_loss_func": "the losses are LPA's; LPAConfig has their weights (toward_coef, sft_coef, ...)",
    "compute_metrics": _METRICS,
    "preprocess_logits_for_metrics": _METRICS,
}
_OPTIMISER = ("optim", "optim_args", "optim_target_modules", "learning_rate",
              "adam_beta1", "adam_beta2", "adam_epsilon")  # fmt: skip
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_UNKNOWN = "this release does not know what it would do here"
_OF_ACCELERATOR = {"split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking",
                   "gradient_accumulation_kwargs"}  # fmt: skip


def check_settings(config: TrainingArguments) -> None:
    """Refuse settings of `TrainingArguments` that would not do what they say.

    Raises:
        ValueError: there is one; the message names it, its value and what to use.
    """
    inherited = {field.name for field in fields(TrainingArguments)}
    for field in fields(config):
        if field.name not in inherited or field.name in USED or field.name in HARMLESS:
            continue
        value = getattr(config, field.name)
        if not (_accelerator_as_usual(value) if field.name == "accelerator_config" else _as_usual(field, value)):
            raise ValueError(
                f"{_shown(field.name, value)} cannot be used with LPA: {REFUSED.get(field.name, _UNKNOWN)}"
            )
    _check_effect(config)


def check_options(options: Mapping[str, Any], config: TrainingArguments) -> None:
    """The same for the options of `Trainer`, and for settings that one of them replaces.

    Raises:
        ValueError: there is one.
    """
    for name, value in options.items():
        if value is not None and name not in OPTIONS_USED:
            raise ValueError(f"{name} cannot be used with LPA: {OPTIONS_REFUSED.get(name, _UNKNOWN)}")
    optimizer, schedule = options.get("optimizers") or (None, None)
    by: dict[str, str] = {}  # setting -> what has it instead
    if options.get("optimizer_cls_and_kwargs"):
        by |= dict.fromkeys(_OPTIMISER, "optimizer_cls_and_kwargs")
    if optimizer is not None:
        by |= dict.fromkeys((*_OPTIMISER, "weight_decay"), "optimizers")
    if schedule is not None:
        by |= dict.fromkeys(_SCHEDULE, "the schedule in optimizers")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in by and not _as_usual(field, value):
            raise ValueError(f"{_shown(field.name, value)} would have no effect: {by[field.name]} has its own")


def _shown(name: str, value: Any) -> str:
    return f"{name}={'(a secret)' if name == 'hub_token' else repr(getattr(value, 'value', value))}"


def _as_usual(field: Field[Any], value: Any) -> bool:
    usual = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(value == usual) or not (value or usual)


def _accelerator_as_usual(value: Any) -> bool:
    """Whether an accelerator_config (None, a dict, a file or an object) leaves what LPA does not use at its default."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    if not value:
        return True
    usual = vars(AcceleratorConfig())
    given = value if isinstance(value, dict) else vars(value) if isinstance(value, AcceleratorConfig) else None
    if given is None:
        given = vars(AcceleratorConfig.from_json_file(value))
    return all(given.get(name, usual[name]) == usual[name] for name in _OF_ACCELERATOR & usual.keys())


# What each optimiser reads of optim_args in transformers' trainer_optimizer.py; the others read none. weight_decay is
# not among them: the trainer's parameter groups set it.
_GALORE = "rank update_proj_gap scale proj_type"
_OPTIM_ARGS = {
    "sgd": "momentum dampening nesterov",
    "adagrad": "lr_decay eps",
    "rmsprop": "momentum alpha eps centered",
    "adamw_anyprecision": "use_kahan_summation momentum_dtype variance_dtype compensation_buffer_dtype",
    "grokadamw": "alpha_init lamb gamma grokking_signal_decay_rate gradient_clipping",
    "stable_adamw": "max_lr kahan_sum decouple_lr",
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "block_size bf16_stochastic_round"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
                    "beta1 beta2 beta3 alpha eps t_alpha t_beta3"),
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), _GALORE),
    "apollo_adamw": f"{_GALORE} proj scale_type",
}  # fmt: skip
_NOT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor", "galore", "grokadamw")  # nor do they read its settings


def _check_optim_args(optimiser: str, given: str | None) -> None:
    if not given or optimiser.startswith("rmsprop_bnb"):  # these hand all of them on
        return
    read = _OPTIM_ARGS.get(optimiser, "").split()
    for part in given.replace(" ", "").split(","):
        if (name := part.partition("=")[0]) not in read:
            hint = "; use the setting weight_decay" if name == "weight_decay" else ""
            raise ValueError(
                f"optim_args={given!r}: {name} would have no effect: optim={optimiser!r} reads "
                f"{', '.join(read) or 'none'}{hint}"
            )


def _check_effect(config: Any) -> None:
    """Refuse settings that depend on another one, which is not set.

    Raises:
        ValueError: there is one.
    """
    optimiser = str(getattr(config.optim, "value", config.optim))
    schedule = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    checkpoints = config.gradient_checkpointing or getattr(config, "activation_checkpointing", False)
    evaluation = str(getattr(config.eval_strategy, "value", config.eval_strategy))
    evaluates = evaluation != "no"
    saves = str(getattr(config.save_strategy, "value", config.save_strategy))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    needs = (
        ("warmup_steps", schedule not in ("constant", "reduce_lr_on_plateau", "greedy"),
         f"lr_scheduler_type={schedule!r} has no warm-up; use constant_with_warmup"),
        ("lr_scheduler_kwargs", schedule not in ("constant", "constant_with_warmup"),
         f"lr_scheduler_type={schedule!r} takes none"),
        ("optim_target_modules", optimiser.startswith(("galore", "apollo")), "only galore and apollo use it"),
        ("liger_kernel_config", config.use_liger_kernel, "it needs use_liger_kernel=True"),
        ("gradient_checkpointing_kwargs", checkpoints, "it needs gradient_checkpointing=True"),
        ("activation_checkpointing_kwargs", checkpoints, "it needs activation_checkpointing=True"),
        ("load_best_model_at_end", evaluates, "nothing is evaluated; set eval_strategy, or canary_steps"),
        ("ddp_backend", several, "this is one process; start several with torchrun or accelerate launch"),
        ("eval_steps", evaluation == "steps", "it needs eval_strategy='steps'"),
        *((name, evaluates, "nothing is evaluated; set eval_strategy")
          for name in ("eval_delay", "metric_for_best_model", "greater_is_better")),
        *((f"adam_{name}", not optimiser.startswith(_NOT_ADAM), f"optim={optimiser!r} does not read it")
          for name in ("beta1", "beta2", "epsilon")),
        ("adam_epsilon", "lion" not in optimiser, f"optim={optimiser!r} does not read it"),
        ("fsdp_config", config.fsdp or os.environ.get("ACCELERATE_USE_FSDP"), "it needs fsdp=True"),
        *((f"hub_{name}", config.push_to_hub, "it needs push_to_hub=True")
          for name in ("token", "private_repo", "model_id", "strategy", "always_push", "revision")),
        *((f"dataloader_{name}", config.dataloader_num_workers, "it needs dataloader_num_workers")
          for name in ("persistent_workers", "multiprocessing_context", "prefetch_factor", "in_order")),
    )  # fmt: skip
    usual = {field.name: field for field in fields(TrainingArguments)}
    for name, holds, why in needs:
        value = getattr(config, name, None)
        if holds or name not in usual:
            continue
        if not _as_usual(usual[name], value) or (value is False and usual[name].default is None):
            raise ValueError(f"{_shown(name, value)} would have no effect: {why}")
    _check_optim_args(optimiser, config.optim_args)
    if saves == "best" and not evaluates:
        raise ValueError("save_strategy='best' would never save: nothing is evaluated; set eval_strategy")
    if optimiser.startswith("schedule_free"):
        raise ValueError(
            f"optim={optimiser!r} averages the weights of a whole run, and LPA begins the optimiser anew in each LPA "
            "step; use adamw_torch"
        )
    if "lomo" in optimiser or optimiser.endswith("layerwise"):
        raise ValueError(
            f"optim={optimiser!r} updates weights within the backward pass, before all micro-batches are added up; use "
            f"{optimiser.removesuffix('_layerwise') if 'layerwise' in optimiser else 'adamw_torch'}"
        )
