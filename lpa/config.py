"""LPAConfig: every setting of a run, with the published ones of LPA as defaults."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from lpa_kernels.attack import AttackSettings, Objective

from .data import ASSESSMENT_PROMPT, ATTACK_ON, system_prompt_text
from .inherited import FREE_TO_RESUME, USED, check_settings

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
NORMALISERS = ("global", "micro")
KL_FORMS = ("standard", "public")
PAIR_TERMS = ("toward", "away", "dpo", "ipo")
BENIGN_TERMS = ("sft", "kl")
_SITES_OF_32 = (8, 16, 24, 30)
# fields of `AttackSettings` that are settings of a run as they are, here with the prefix attack_
_ATTACK = ("epsilon", "step_size", "norm", "rule", "engine", "backend", "random_start", "relative", "merge_adapters",
           "capture_graph")  # fmt: skip
_ADVERSARY = ("adversary", "share")  # the same, without a former name
_NAMES = "|".join((*_ATTACK, *_ADVERSARY, "steps"))
_DIRECTION = ".safetensors"
# names until 0.1 -> names; old run folders still hold the former
RENAMED = {name: f"attack_{name}" for name in ("sites", "steps", *_ATTACK)}
_PLAIN: dict[Any, type] = {int: Integral, float: Real, bool: bool, str: str, type(None): type(None)}
# what a resumed run may change: how long it is, how it runs, what is watched and kept
_FREE = {"lpa_steps", "attack_engine", "attack_backend", "attack_capture_graph", "auto_micro_batch", "offload_attacks",
         "max_length", "logging_nan_inf_filter", "canary_steps", "canary_max_refusal", "canary_max_perplexity",
         "canary_patience", "canary_keep_best"} | FREE_TO_RESUME  # fmt: skip
_CANARIES = {"canary_prompts", "canary_max_new_tokens", "canary_set"}  # what is asked: its answers are compared
# the first setting of each group of `lpa train --help`, and the group's name
GROUPS = {
    "lpa_steps": "the run", "toward_coef": "the defence's losses", "attack_sites": "the attack",
    "auto_micro_batch": "memory", "system_prompt": "data", "lora": "adapters", "canary_steps": "canaries",
    "learning_rate": "the model updates",
}  # fmt: skip


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})  # HfArgumentParser shows this text as the flag's help


def default_sites(depth: int) -> list[str]:
    """LPA's sites for a model of `depth` blocks: embedding, 8, 16, 24 and 30 of 32, scaled and rounded down."""
    layers = dict.fromkeys(layer * depth // 32 for layer in _SITES_OF_32)
    return ["embedding", *(f"mlp:{layer}" for layer in layers)]


@dataclass
class LPAConfig(TrainingArguments):
    """Settings of `LPATrainer`: transformers' `TrainingArguments` and LPA's own.

    One LPA step attacks one global batch (per_device_train_batch_size x gradient_accumulation_steps x ranks pairs) and
    then updates the model `defence_steps` times on it. `lpa_steps` says how long a run is; `max_steps` counts model
    updates and follows from it. Steps of saving, logging and evaluating count model updates too and are rounded up to
    whole LPA steps.

    The defaults are those of arXiv 2607.07918 for Qwen3-8B and Llama-3-8B: 30 LPA steps of 16 pairs, 16 inner steps of
    AdamW at 1e-3 within radius 6, 4 model updates of AdamW (made anew each LPA step) at a constant 8e-5, LoRA of rank
    64, no KL term. `lpa.presets` has these and those of the first paper (arXiv 2605.08496) by name.

    Raises:
        ValueError: a setting that is unknown, contradicts another or cannot be used; the message says which.

    >>> config = LPAConfig("run", lpa_steps=8, kl_coef=0.5, use_cpu=True)
    >>> config.max_steps, config.coefs
    (32, {'toward': 0.333..., 'away': 0.333..., 'kl': 0.333...})
    """

    # the run
    lpa_steps: int = _setting(30, "LPA steps: batches that are attacked and then trained on.")
    defence_steps: int = _setting(4, "Model updates an LPA step, all on the same attacked batch.")
    reset_optimizer: bool = _setting(True, "Start each LPA step with a new optimiser state.")
    normaliser: str = _setting("global", "'global': losses are means over the global batch's tokens. 'micro': the sum "
                               "of the micro-batches' means, as in the public code.")  # fmt: skip
    toward_coef: float = _setting(0.5, "Weight of the defence's loss toward the chosen completion. The trainer divides "
                                  "all weights by their sum.")  # fmt: skip
    away_coef: float = _setting(0.5, "Weight of the defence's loss away from the rejected completion.")
    sft_coef: float = _setting(0.0, "Weight of the cross entropy on benign responses, without the adversary.")
    kl_coef: float = _setting(0.0, "Weight of the divergence from the base model on benign responses.")
    benign_every: int = _setting(
        1, "The sft and kl terms enter every so many model updates, with so many times their weight."
    )
    dpo_coef: float = _setting(0.0, "Weight of the preference loss DPO of the pair, instead of toward and away.")
    ipo_coef: float = _setting(0.0, "Weight of the preference loss IPO of the pair, instead of toward and away.")
    preference_beta: float = _setting(0.3, "beta of dpo and ipo, in defence and attack.")
    reference_free: bool = _setting(False, "Take dpo and ipo without the base model's log-probabilities.")
    kl: str = _setting("standard", "'standard': KL(base || model), a mean over response tokens. 'public': the public "
                       "code's form, kept for comparison.")  # fmt: skip

    # the attack
    attack_sites: list[str] | None = field(default=None, metadata={
        "help": "Where to perturb: embedding, mlp:8, attn:8, block:8 or module names. By default embedding and layers "
                "8, 16, 24, 30 of 32, scaled to the model's depth; those layers alone for a direction."})  # fmt: skip
    attack_on: str = _setting("prompt+completions", f"Which tokens are perturbed: {', '.join(ATTACK_ON)}.")
    attack_epsilon: float = _setting(6.0, "Radius of a token's perturbation.")
    attack_step_size: float = _setting(1e-3, "Step size of the attack.")
    attack_steps: int = _setting(16, "Inner steps of the attack; 0 trains without an adversary.")
    attack_adversary: str = _setting("pgd", "Adversary: pgd, vector (a direction is added), ablate (one is projected "
                                     "out) or random. All but pgd cost no inner pass.")  # fmt: skip
    attack_direction: list[str] | None = field(default=None, metadata={
        "help": "Of vector and ablate: a .safetensors file, or two sets of prompts, for the mean hidden state of the "
                "first less that of the second."})  # fmt: skip
    attack_share: float = _setting(1.0, "Of the attacked tokens at each site, the share, drawn at random, that an "
                                   "adversary other than pgd acts on.")  # fmt: skip
    attack_start: float = _setting(0, "LPA steps at the beginning that are trained without the adversary; below 1 a "
                                   "share of the run.")  # fmt: skip
    attack_growth: int = _setting(0, "LPA steps from then on over which the radius grows evenly to attack_epsilon.")
    attack_norm: str = _setting("l2", "Ball that a perturbation stays in: l2, linf, l2_sequence or none.")
    attack_rule: str = _setting("adamw", "Update rule of the attack: adamw, normalised, sign, adam, rmsprop or sgd.")
    attack_toward_coef: float = _setting(0.5, "Weight of the attack's loss toward the rejected completion.")
    attack_away_coef: float = _setting(0.5, "Weight of the attack's loss away from the chosen completion. The trainer "
                                       "divides the attack's weights by their sum.")  # fmt: skip
    attack_dpo_coef: float = _setting(0.0, "Weight of DPO in the attack, instead of toward and away.")
    attack_ipo_coef: float = _setting(0.0, "Weight of IPO in the attack, instead of toward and away.")
    attack_random_start: bool = _setting(False, "Start the attack at a random point of the ball.")
    attack_relative: bool = _setting(False, "Take epsilon as a share of the norm of the hidden state it perturbs.")
    attack_engine: str = _setting(
        "auto",
        "auto, stack (the prompt once, blocks by hand), packed (the prompt once) or reference (two plain passes).",
    )
    attack_backend: str = _setting("auto", "Backend of the ops: auto, reference, triton or native.")
    attack_merge_adapters: bool = _setting(False, "Merge LoRA into the weights while attacking.")
    attack_capture_graph: str = _setting("auto", "Capture an inner step in a CUDA graph: auto, on or off.")

    # memory
    auto_micro_batch: bool = _setting(True, "Where memory runs out, go on with the same batch in micro-batches of half "
                                      "the size. Under FSDP2 an error says what to set.")  # fmt: skip
    offload_attacks: bool = _setting(False, "Keep perturbations and base logits in the host's memory between their "
                                     "uses.")  # fmt: skip

    # data
    system_prompt: str | None = _setting(ASSESSMENT_PROMPT, "System prompt of the pairs; an empty one for none, @NAME "
                                        "for one of ours, @FILE for a file's text.")  # fmt: skip
    benign_system_prompt: str | None = _setting(None, "System prompt of benign examples. By default that of the pairs "
                                                "for the shipped statements, and none for other sets.")  # fmt: skip
    benign_eos: bool = _setting(False, "End benign answers with the tokenizer's EOS, as the public code does. Pairs "
                                "never end with it.")  # fmt: skip
    max_length: int | None = _setting(None, "Longest prompt and completion in tokens; by default the model's context.")
    chat_template_kwargs: dict[str, Any] | str | None = field(default=None, metadata={
        "help": "Variables for the chat template, in JSON: {\"reasoning_effort\": \"low\"}. Thinking is off where a "
                "template has a switch for it."})  # fmt: skip
    chat_template_date: str | None = _setting(None, "What chat templates print as today's date, YYYY-MM-DD. By default "
                                              "the day on which the run begins.")  # fmt: skip

    # adapters
    lora: bool = _setting(True, "Train LoRA adapters; otherwise all weights.")
    lora_r: int = _setting(64, "Rank of the adapters.")
    lora_alpha: float = _setting(8.0, "Scale of the adapters: they are multiplied by alpha / rank.")
    lora_dropout: float = _setting(0.0, "Dropout before the adapters, in the defence alone.")
    lora_targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS), metadata={
        "help": "Linear modules that get an adapter; 'all-linear' for all."})  # fmt: skip

    # canaries: what is watched during training
    canary_steps: int = _setting(0, "Ask the canaries every so many LPA steps, before the first and after the last; 0 "
                                 "for never.")  # fmt: skip
    canary_prompts: int = _setting(24, "Benign requests, at most 24, and harmful ones where there is a canary_set.")
    canary_max_new_tokens: int = _setting(48, "Longest answer of a canary.")
    canary_set: str | None = _setting(None, "Harmful requests to watch too: strongreject, harmbench, a file, ... By "
                                      "default none, and safety is that statements are answered rightly.")  # fmt: skip
    canary_max_refusal: float = _setting(0.05, "Most added share of benign requests not done.")
    canary_max_perplexity: float = _setting(0.05, "Most added share of perplexity.")
    canary_patience: int = _setting(2, "Stop when so many canaries in a row are beyond either; a collapse stops at "
                                    "once.")  # fmt: skip
    canary_keep_best: bool = _setting(True, "End with the safest step within these limits instead of the last.")

    # TrainingArguments with other defaults
    learning_rate: float = _setting(8e-5, "Step size of the model updates.")
    lr_scheduler_type: str = _setting("constant", "Schedule of the learning rate over the model updates.")
    weight_decay: float = _setting(0.01, "Weight decay of the model updates.")
    per_device_train_batch_size: int = _setting(4, "Pairs a micro-batch, on each device.")
    gradient_accumulation_steps: int = _setting(4, "Micro-batches a model update; each keeps its own attack.")
    logging_steps: float = _setting(1, "Log every so many model updates, rounded up to whole LPA steps.")
    save_steps: float = _setting(1, "Save every so many model updates, rounded up to whole LPA steps.")
    save_total_limit: int | None = _setting(2, "Checkpoints to keep.")
    logging_nan_inf_filter: bool = _setting(False, "Not used: a loss that is not finite ends the run.")

    def __new__(cls, *args: Any, **settings: Any) -> LPAConfig:
        for name in settings:
            if name in RENAMED:
                raise ValueError(f"{name}={settings[name]!r}: this setting is called {RENAMED[name]} now")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):  # numbers of numpy, which JSON cannot hold, become Python's
            value = getattr(self, each.name)
            if isinstance(value, Real) and not isinstance(value, (int, float)):
                setattr(self, each.name, int(value) if isinstance(value, Integral) else float(value))
        for name in ("attack_sites", "attack_direction", "lora_targets"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        for name in ("system_prompt", "benign_system_prompt"):
            setattr(self, name, system_prompt_text(getattr(self, name)))
        self.chat_template_kwargs = json_object("chat_template_kwargs", self.chat_template_kwargs)
        self._check_types()
        self._check_settings()
        updates = self.lpa_steps * self.defence_steps
        given: int = self.max_steps  # type: ignore[has-type]
        if given not in (-1, updates):
            raise ValueError(
                f"max_steps={given} counts model updates and follows from lpa_steps={self.lpa_steps} x "
                f"defence_steps={self.defence_steps} = {updates}; leave it out and set lpa_steps"
            )
        self.max_steps = updates
        for name in ("logging_steps", "save_steps", "eval_steps"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, self._whole_lpa_steps(float(value)))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else every rank would take itself for the only one
        self.lr_scheduler_type = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        for name in ("checkpointing", "checkpointing_kwargs"):  # the former names, of which transformers would warn
            new, former = f"activation_{name}", f"gradient_{name}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, former))
        super().__post_init__()

    def _whole_lpa_steps(self, value: float) -> int:
        """Model updates, or a share of the run if below 1, rounded up to a whole number of LPA steps."""
        updates = value * self.max_steps if value < 1 else value
        return max(1, math.ceil(updates / self.defence_steps)) * self.defence_steps

    def _check_settings(self) -> None:
        allowed = {"normaliser": NORMALISERS, "kl": KL_FORMS, "attack_on": ATTACK_ON}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(values)}")
        for name in ("lpa_steps", "defence_steps", "gradient_accumulation_steps", "per_device_train_batch_size",
                     "benign_every", "lora_r", "max_length", "canary_prompts", "canary_max_new_tokens",
                     "canary_patience"):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.attack_steps < 0:
            raise ValueError(f"attack_steps={self.attack_steps} must be 0 (no attack) or more")
        for name in ("attack_start", "attack_growth"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value} must be 0 or more LPA steps")
        if self.attack_start >= 1 and self.attack_start != int(self.attack_start):
            raise ValueError(f"attack_start={self.attack_start} must be whole LPA steps, or a share of the run below 1")
        if self.attack_steps and self.attack_begin >= self.lpa_steps:
            raise ValueError(
                f"attack_start={self.attack_start} leaves no LPA step with an attack, of lpa_steps={self.lpa_steps}; "
                "make it smaller, or say attack_steps=0"
            )
        if self.attack_growth and not math.isfinite(self.attack_epsilon):
            raise ValueError(f"attack_growth={self.attack_growth} needs a finite attack_epsilon to grow to")
        if self.canary_steps < 0:
            raise ValueError(f"canary_steps={self.canary_steps} must be 0 (no canaries) or more")
        for name in ("canary_max_refusal", "canary_max_perplexity"):
            if not getattr(self, name) >= 0:  # NaN too
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        for prefix, names in (("", (*PAIR_TERMS, *BENIGN_TERMS)), ("attack_", PAIR_TERMS)):
            coefs = {f"{prefix}{name}_coef": getattr(self, f"{prefix}{name}_coef") for name in names}
            weights = ", ".join(f"{key}={value}" for key, value in coefs.items())
            if not min(coefs.values()) >= 0 or not 0 < sum(coefs.values()) < math.inf:
                raise ValueError(f"{weights}: weights must not be negative, and one of them must be above 0")
            pair = {name: coefs[f"{prefix}{name}_coef"] for name in PAIR_TERMS}
            if any(pair.values()):
                try:
                    Objective(coefs=pair, beta=self.preference_beta)
                except ValueError as error:  # what cannot be mixed
                    raise ValueError(f"{weights}: {error}") from error
        if self.benign_every > 1 and not any(getattr(self, f"{name}_coef") for name in PAIR_TERMS):
            raise ValueError(f"benign_every={self.benign_every} leaves updates without any term; it must be 1 here")
        if self.kl == "public" and self.normaliser != "micro":
            raise ValueError("kl='public' is a mean of one micro-batch; it needs normaliser='micro'")
        if self.attack_merge_adapters and not self.lora:
            raise ValueError(
                "attack_merge_adapters=True with lora=False: there are no adapters to merge; drop one of them"
            )
        self._check_direction()
        made = self.attack_settings  # raises what is wrong with the attack
        self.attack_rule, self.attack_capture_graph = made.rule, str(made.capture_graph)
        chosen = self.load_best_model_at_end or self.save_strategy == "best"
        if chosen and self.canary_steps and self.canary_keep_best:
            raise ValueError(
                "canary_steps and load_best_model_at_end or save_strategy='best' would each choose a best step; use "
                "canary_keep_best=False, or leave the others out"
            )
        check_settings(self)

    def _check_direction(self) -> None:
        given, needed = self.attack_direction, self.attack_adversary in ("vector", "ablate")
        if needed != (given is not None):
            raise ValueError(
                f"attack_adversary={self.attack_adversary!r} and attack_direction={given} do not fit: vector and "
                "ablate need a direction, the others none"
            )
        if given is not None and (len(given) not in (1, 2) or (len(given) == 1 and not given[0].endswith(_DIRECTION))):
            raise ValueError(f"attack_direction={given} must be one {_DIRECTION} file or two sets of prompts")

    def _check_types(self) -> None:
        """Refuse numbers, words and switches that are of another type than their setting."""
        hints = get_type_hints(type(self))
        for each in fields(self):
            hint = hints[each.name]
            allowed = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
            inherited = each.name not in LPAConfig.__annotations__  # transformers takes more than its hints say
            if not allowed <= _PLAIN.keys() or (inherited and len(allowed) > 1):
                continue
            value = getattr(self, each.name)
            odd = isinstance(value, bool) and bool not in allowed
            if odd or not isinstance(value, tuple(_PLAIN[kind] for kind in allowed)):
                wanted = " or ".join(sorted(getattr(kind, "__name__", str(kind)) for kind in allowed))
                why = " (0 does not clip)" if each.name == "max_grad_norm" else ""
                raise ValueError(f"{each.name}={value!r} is of type {type(value).__name__}; it must be {wanted}{why}")

    def _shares(self, prefix: str, names: Iterable[str]) -> dict[str, float]:
        """The weights of some terms, divided by their sum; terms of weight 0 are left out."""
        given = {name: getattr(self, f"{prefix}{name}_coef") for name in names}
        return {name: value / sum(given.values()) for name, value in given.items() if value}

    @property
    def coefs(self) -> dict[str, float]:
        """The defence's weights, divided by their sum; terms of weight 0 are left out."""
        return self._shares("", (*PAIR_TERMS, *BENIGN_TERMS))

    @property
    def attack_coefs(self) -> dict[str, float]:
        """The adversary's weights, divided by their sum."""
        return self._shares("attack_", PAIR_TERMS)

    @property
    def pair_objective(self) -> Objective | None:
        """What the defence minimises of the pairs; None where it takes benign text alone."""
        coefs = {name: value for name, value in self.coefs.items() if name in PAIR_TERMS}
        return Objective(coefs, beta=self.preference_beta, reference_free=self.reference_free) if coefs else None

    @property
    def why_not_split(self) -> str:
        """Why these settings do not let micro-batches be halved where memory runs out; "" where they do."""
        if not self.auto_micro_batch:
            return "auto_micro_batch is False"
        if self.kl == "public" and "kl" in self.coefs:
            return "kl='public' depends on the micro-batch's size"
        return ""

    @property
    def attack_settings(self) -> AttackSettings:
        """The settings of the attack; with attack_steps=0, those of one step.

        Raises:
            ValueError: one is unknown or impossible; the message names it as it is called here.
        """
        try:
            return AttackSettings(
                coefs=self.attack_coefs,
                steps=max(self.attack_steps, 1),
                beta=self.preference_beta,
                reference_free=self.reference_free,
                **{name: getattr(self, f"attack_{name}") for name in (*_ATTACK, *_ADVERSARY)},
            )
        except ValueError as error:
            raise ValueError(re.sub(rf"\b({_NAMES})=", r"attack_\1=", str(error))) from error

    @property
    def inner_steps(self) -> int:
        """Inner passes of an attack: none for an adversary other than pgd."""
        return self.attack_steps if self.attack_adversary == "pgd" else 0

    @property
    def attack_begin(self) -> int:
        """The first LPA step with the adversary, counted from 0."""
        return int(self.attack_start * (self.lpa_steps if self.attack_start < 1 else 1))

    def benign_updates(self, lpa_step: int) -> int:
        """How many model updates of an LPA step (counted from 0) have the benign terms."""
        first = lpa_step * self.defence_steps
        return sum(update % self.benign_every == 0 for update in range(first, first + self.defence_steps))

    def attack_radius(self, lpa_step: int) -> float:
        """The attack's radius in an LPA step (counted from 0): 0 before it enters, then growing to its epsilon."""
        made = lpa_step - self.attack_begin + 1
        if not self.attack_steps or made < 1:
            return 0.0
        return self.attack_epsilon * min(1.0, made / max(1, self.attack_growth))

    @property
    def chat_options(self) -> dict[str, Any]:
        """The chat template's variables and date, as arguments of `lpa.data.ChatEncoder`."""
        return {"chat_template_kwargs": self.chat_template_kwargs, "date": self.chat_template_date}

    @property
    def bound_settings(self) -> dict[str, Any]:
        """Settings that decide what a run's next LPA step is; a resumed run has those of its checkpoint."""
        # with these, what a step is depends on the run's length
        timed = self.lr_scheduler_type != "constant" or 0 < self.attack_start < 1
        free = _FREE - ({"lpa_steps"} if timed else set())
        if not self.canary_steps:
            free = free | _CANARIES
        if self.normaliser == "micro":  # the loss depends on how a batch, whose size is kept too, is split
            free = free - {"per_device_train_batch_size"}
        if self.metric_for_best_model is None:  # no step was or will be chosen by one
            free = free | {"metric_for_best_model", "greater_is_better"}
        names = (each.name for each in fields(self) if each.name in USED or each.name in LPAConfig.__annotations__)
        own = {name: getattr(self, name) for name in names if name not in free}
        return {name: _written(getattr(value, "value", value)) for name, value in own.items()}

    @property
    def own_settings(self) -> dict[str, Any]:
        """LPA's settings and the changed ones of `TrainingArguments`, as plain values, for records and model cards."""
        usual = _Usual(use_cpu=self.use_cpu).to_dict()
        usual["accelerator_config"].pop("use_configured_state", None)  # looking at the devices would have removed it
        own = {*LPAConfig.__annotations__, "seed"}
        left_out = {"output_dir", "run_name", "logging_nan_inf_filter", "eval_steps", "max_steps"}
        return {
            name: _written(value)
            for name, value in self.to_dict().items()
            if name not in left_out and (name in own or value != usual[name])
        }


def _written(value: Any) -> Any:
    """A setting as JSON can hold it: an infinite number becomes the word "inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_object(name: str, value: Any) -> Any:
    """A setting that is a mapping, from JSON where it is text.

    Raises:
        ValueError: it is not.
    """
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f'{name}={value!r} is not JSON ({error}); write it as \'{{"name": "value"}}\'') from error
    if read is not None and not isinstance(read, dict):
        raise ValueError(f"{name}={value!r} must be a JSON object of names and values")
    return read


class _Usual(LPAConfig):
    """The defaults. It does not look at the devices, since that would wait for the other ranks."""

    _setup_devices = torch.device("cpu")
