"""Every setting of TrainingArguments and option of Trainer set to something: is it refused by name, or does it act?

    python -m benchmarks.sweep_arguments        # into benchmarks/results/sweep-arguments.json and .md
    python -m benchmarks.sweep_arguments optim  # the cases of some settings again, in their places there

Each case trains a tiny random model for two LPA steps of two updates on a CPU, and is set beside a run without it. What
shows is compared: weights, learning rates, log entries, files, and how often the trainer evaluates and saves. A setting
that is used and shows nothing has a reason in SHOWS_NOTHING, and nothing else is there; otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from benchmarks import measure
from benchmarks.tiny_models import VOCAB, build
from lpa import LPAConfig, LPATrainer
from lpa.files import write_json, write_text
from lpa.inherited import HARMLESS, OPTIONS_REFUSED, OPTIONS_USED, REFUSED, USED

WORDS = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, VOCAB))]
PAIRS = [{"prompt": f"w{n} w{n + 1} w{n + 2}", "rejected": f"w{n + 40} w{n + 41}", "chosen": f"w{n + 60}"}
         for n in range(3, 11)]  # fmt: skip
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
# What a setting is set to, where flipping a switch or adding to a number would say little, and what it needs beside it.
VALUES: dict[str, list[Any]] = {
    "optim": [name.value for name in OptimizerNames], "lr_scheduler_type": ["linear", "cosine", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "warmup_stable_decay"], "lr_scheduler_kwargs": [{"num_cycles": 2}],
    "optim_args": ["momentum=0.5", "foo=1"], "optim_target_modules": [["q_proj"]], "max_steps": [3, 4],
    "num_train_epochs": [1.0],
    "max_grad_norm": [0.0, 1e-3, None], "adam_beta1": [0.5], "adam_beta2": [0.9], "adam_epsilon": [1e-2],
    "gradient_checkpointing_kwargs": [{"use_reentrant": False}], "liger_kernel_config": [{"rope": True}],
    "activation_checkpointing_kwargs": [{"use_reentrant": False}],
    "torch_compile_backend": ["eager"], "torch_compile_mode": ["default"], "neftune_noise_alpha": [5.0],
    "torch_empty_cache_steps": [1, 0], "logging_strategy": ["no", "epoch"], "logging_steps": [3, 0.5],
    "include_num_input_tokens_seen": ["all", "non_padding"], "log_level": ["error"], "log_level_replica": ["error"],
    "report_to": ["none", "tensorboard"], "run_name": ["name"], "project": ["name"], "trackio_space_id": ["name"],
    "trackio_bucket_id": ["name"], "trackio_static_space_id": ["name"], "eval_strategy": ["steps", "epoch"],
    "eval_steps": [3, 0.9], "eval_delay": [3], "eval_accumulation_steps": [1], "include_for_metrics": [["loss"]],
    "save_strategy": ["steps", "epoch", "best"], "save_steps": [3, 0.9], "save_total_limit": [1],
    "hub_token": ["token"], "hub_model_id": ["name"], "hub_strategy": ["end"], "hub_revision": ["main"],
    "metric_for_best_model": ["margin"], "accelerator_config": [{"split_batches": True}, {"dispatch_batches": True},
    {"even_batches": False}, {"gradient_accumulation_kwargs": {"num_steps": 2}}],
    "parallelism_config": [{"tp_size": 2}],
    "dataloader_num_workers": [1], "dataloader_prefetch_factor": [1, 3], "seed": [7], "data_seed": [7],
    "dataloader_multiprocessing_context": ["fork"], "label_names": [["labels"]],
    "train_sampling_strategy": ["sequential", "group_by_length"], "length_column_name": ["size"],
    "ddp_backend": ["gloo"], "ddp_bucket_cap_mb": [10],
    "fsdp": ["full_shard"], "fsdp_config": [{"version": 2}], "deepspeed": [{"stage": 2}],
    "debug": ["underflow_overflow"], "resume_from_checkpoint": ["here"],
    "per_device_train_batch_size": [1], "gradient_accumulation_steps": [1],
    "learning_rate": [1e-2], "label_smoothing_factor": [0.1], "output_dir": [None],
    "use_cpu": [False], "tf32": [True],
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"}, "warmup_steps": {"lr_scheduler_type": "linear"},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True}, "eval_steps": {"eval_strategy": "steps"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "eval_delay": EVALUATES, "per_device_eval_batch_size": EVALUATES, "save_steps": {"save_strategy": "steps"},
    "save_total_limit": {"save_strategy": "steps"}, "save_only_model": {"save_strategy": "steps"},
    "load_best_model_at_end": EVALUATES | {"save_strategy": "steps", "save_steps": 1},
    "metric_for_best_model": EVALUATES | {"save_strategy": "best", "metric_for_best_model": "loss"},
    "greater_is_better": EVALUATES | {"save_strategy": "best", "metric_for_best_model": "margin"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "optim_args": {"optim": "sgd"}, "adam_beta1": {"reset_optimizer": False}, "adam_beta2": {"reset_optimizer": False},
}  # fmt: skip
_SAME = "the same values by another way of computing them"
_OUTSIDE = "it shows outside the run's folder, on the console or a service"
_SEVERAL = "it needs several processes or machines"
_LOADING = "batches are the same however they are loaded"
# Why a setting that is used shows nothing here: by its name, or its name and value.
SHOWS_NOTHING: dict[str, str] = {
    "max_steps 4": "the run's length is that already", "lr_scheduler_type 'constant_with_warmup'": "no warm-up is set",
    "lr_scheduler_type 'warmup_stable_decay'": "its decay begins after the last update",
    "optim 'adamw_torch_fused'": "it is the default", "logging_steps 0.5": "it is every LPA step, as by default",
    "activation_checkpointing": _SAME, "activation_checkpointing_kwargs": _SAME, "gradient_checkpointing": _SAME,
    "gradient_checkpointing_kwargs": _SAME, "use_cache": _SAME, "torch_empty_cache_steps": "it is about memory",
    "per_device_eval_batch_size": _SAME, "full_determinism": "a CPU computes so already",
    "use_cpu": "there is no other device", "log_level": _OUTSIDE, "disable_tqdm": _OUTSIDE, "report_to": _OUTSIDE,
    "run_name": _OUTSIDE, "project": _OUTSIDE, "trackio_space_id": _OUTSIDE, "trackio_bucket_id": _OUTSIDE,
    "trackio_static_space_id": _OUTSIDE, "log_level_replica": _SEVERAL, "log_on_each_node": _SEVERAL,
    "save_on_each_node": _SEVERAL, "ddp_find_unused_parameters": _SEVERAL, "ddp_bucket_cap_mb": _SEVERAL,
    "ddp_broadcast_buffers": _SEVERAL, "ddp_timeout": _SEVERAL, "load_best_model_at_end": "the last step is the best",
    "metric_for_best_model": "both metrics are best at the same steps",
    "greater_is_better": "it is the default of that metric",
    "restore_callback_states_from_checkpoint": "it acts on a resumed run", "dataloader_num_workers": _LOADING,
    "dataloader_pin_memory": _LOADING, "dataloader_persistent_workers": _LOADING,
    "dataloader_prefetch_factor": _LOADING, "dataloader_multiprocessing_context": _LOADING,
    "eval_dataset": "evaluate() reads it, which is not called here",
}  # fmt: skip
NOTHING = "nothing of it shows here"
# What one value of a setting needs beside it.
BESIDE_ONE: dict[tuple[str, str], dict[str, Any]] = {
    ("save_strategy", "best"): EVALUATES | {"metric_for_best_model": "loss"},
    ("lr_scheduler_type", "reduce_lr_on_plateau"): EVALUATES,
    ("lr_scheduler_type", "warmup_stable_decay"): {"lr_scheduler_kwargs": {"num_decay_steps": 1}},
}


@dataclass
class Result:
    """What a case came to.

    Attributes:
        kind: as `lpa.inherited` has it. verdict: refused, late (an error after set-up), or trained.
        told: the error, or what differs from the run without the case.
    """

    name: str
    value: str
    kind: str
    verdict: str
    told: str


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, unk_token="<unk>", eos_token="</s>",
                                   pad_token="</s>")  # fmt: skip


def trained(settings: dict[str, Any], options: dict[str, Any], seen: dict[str, Any]) -> None:
    """Train, and write into `seen` what shows; `seen["built"]` once the trainer is there."""
    own = bool({"optimizers", "optimizer_cls_and_kwargs"} & options.keys())  # which have these themselves
    other = own or re.match("sgd|adagrad|rmsprop|adafactor|galore|grokadamw|.*lion", settings.get("optim", ""))
    with tempfile.TemporaryDirectory() as folder:
        config = LPAConfig(**{
            "output_dir": folder, "lpa_steps": 2, "defence_steps": 2, "attack_steps": 2, "attack_step_size": 0.05,
            **({} if own else {"learning_rate": 1e-3}), **({} if other else {"adam_epsilon": 1e-3}),
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_r": 2,
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "attack_engine": "reference",
            "system_prompt": "", **settings,
        })  # fmt: skip
        made = {key: value() if callable(value) and key != "data_collator" else value for key, value in options.items()}
        given = {"model": build("llama"), "train_dataset": PAIRS, "processing_class": tokenizer(), **made}
        trainer = LPATrainer(given.pop("model"), config, **given)
        seen["built"] = True
        trainer.train()
        logs = trainer.state.log_history
        weights = hashlib.sha256()
        for name, p in trainer.model.named_parameters():
            if p.requires_grad:
                weights.update(name.encode() + p.detach().numpy().tobytes())
        rates = [entry["learning_rate"] for entry in logs if "learning_rate" in entry]
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        seen |= {
            "weights": weights.hexdigest(), "learning rates": rates, "log entries": len(logs),
            "logged names": sorted({name for entry in logs for name in entry}), "files": files,
            "evaluations": sum("eval_loss" in entry for entry in logs),
            "tokens seen": trainer.state.num_input_tokens_seen,
            "callbacks": [type(each).__name__ for each in trainer.callback_handler.callbacks],
        }  # fmt: skip


def result(name: str, value: Any, kind: str, settings: dict[str, Any], options: dict[str, Any], beside: Any) -> Result:
    """One case beside the run without it."""
    shown = value.__name__ if isinstance(value, (type, Callable)) else repr(value)  # type: ignore[arg-type]
    seen: dict[str, Any] = {}
    try:
        trained(settings, options, seen)
    except Exception as error:
        told = re.sub(r"https?://\S+", "(address)", " ".join(f"{type(error).__name__}: {error}".split())[:300])
        return Result(name, shown, kind, "late" if "built" in seen else "refused", told)
    differs = [key for key, found in seen.items() if key != "built" and found != beside[key]]
    return Result(name, shown, kind, "trained", ", ".join(differs) or NOTHING)


def values_of(field: Any) -> list[Any]:
    """What a setting is set to."""
    if field.name in VALUES:
        return VALUES[field.name]
    usual = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(usual, bool) or usual is None:
        return [not usual]
    return [usual + 1] if isinstance(usual, (int, float)) else [True]


class Mine(ProgressCallback):
    """A user's own."""


def optimizers() -> tuple[Any, Any]:
    """Made before the adapters are there."""
    return torch.optim.SGD(build("llama").parameters(), lr=0.1), None


def options() -> dict[str, Any]:
    """Option of Trainer -> something to give it; functions are called for it."""
    return {
        "eval_dataset": lambda: PAIRS[:3], "callbacks": lambda: [Mine(), TrainerCallback()], "optimizers": optimizers,
        "optimizer_cls_and_kwargs": lambda: (torch.optim.SGD, {"lr": 0.1}), "model_init": lambda: build,
        "compute_loss_func": lambda: print, "compute_metrics": lambda: print,
        "preprocess_logits_for_metrics": lambda: print,
    }  # fmt: skip


def kind_of(name: str, used: Any, refused: Any) -> str:
    """As `lpa.inherited` has it."""
    return "used" if name in used else "refused" if name in refused else "harmless" if name in HARMLESS else "unknown"


def results(names: list[str]) -> list[Result]:
    """All cases, or those of some settings and options."""
    found: list[Result] = []
    without: dict[str, dict[str, Any]] = {}

    def baseline(settings: dict[str, Any]) -> dict[str, Any]:
        key = repr(sorted(settings.items()))
        if key not in without:
            without[key] = {}
            trained(settings, {}, without[key])
        return without[key]

    for field in fields(TrainingArguments):
        if names and field.name not in names:
            continue
        for value in values_of(field):
            if field.name == "output_dir":
                continue  # every case has one
            more = BESIDE.get(field.name) or BESIDE_ONE.get((field.name, str(value)), {})
            kind = kind_of(field.name, USED, REFUSED)
            beside = baseline(more if field.name in BESIDE else {})
            found.append(result(field.name, value, kind, {**more, field.name: value}, {}, beside))
            print(*asdict(found[-1]).values(), sep=" | ", flush=True)
    for name, value in options().items():
        if names and name not in names:
            continue
        kind = kind_of(name, OPTIONS_USED, OPTIONS_REFUSED)
        found.append(result(name, "given", kind, {}, {name: value}, baseline({})))
        print(*asdict(found[-1]).values(), sep=" | ", flush=True)
    return found


def unexplained(found: list[Result]) -> list[str]:
    """Cases of used settings that show nothing without a reason, and reasons for what is no such case."""
    cases = [each for each in found if (each.kind, each.verdict, each.told) == ("used", "trained", NOTHING)]
    silent = {f"{each.name} {each.value}": each.name for each in cases}
    left_out = {*(field.name for field in fields(TrainingArguments)), *options()} - {each.name for each in found}
    expected = {reason for reason in SHOWS_NOTHING if reason.partition(" ")[0] not in left_out}
    stale = expected - silent.keys() - {*silent.values()}
    return [case for case, name in silent.items() if not SHOWS_NOTHING.keys() & {name, case}] + sorted(stale)


def table(found: list[Result]) -> str:
    """A page, the counts first."""
    count = Counter((each.kind, each.verdict) for each in found)
    every = len(fields(TrainingArguments)) + len(inspect.signature(Trainer.__init__).parameters) - 1
    lines = [
        "# Settings of transformers: refused, harmless or used", "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, CPU. {len(found)} cases of {every} "
        "settings and options; `python -m benchmarks.sweep_arguments`. Weights differ by any bit.", "",
        *(f"- {kind}: {n} {verdict}" for (kind, verdict), n in sorted(count.items())), "",
    ]  # fmt: skip
    rows = [(each.name, f"`{each.value}`", each.kind, each.verdict, each.told) for each in found]
    head = ("setting or option", "set to", "it is", "came to", "told, or what differs")
    return "\n".join(lines) + "\n" + measure.table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="settings and options; all of them by default")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "sweep-arguments.json")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = results(args.names)
    if args.names and args.out.exists():
        kept = [Result(**each) for each in json.loads(args.out.read_text()) if each["name"] not in args.names]
        order = [*(field.name for field in fields(TrainingArguments)), *options()]
        found = sorted([*kept, *found], key=lambda each: order.index(each.name))
    write_json(args.out, [asdict(each) for each in found])
    write_text(args.out.with_suffix(".md"), table(found))
    if without := unexplained(found):
        parser.exit(1, f"SHOWS_NOTHING lacks a reason for these, or has one too many: {', '.join(without)}\n")


if __name__ == "__main__":
    main()
