"""LPAConfig: every setting of a run, with the published ones of LPA as defaults."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .data import ASSESSMENT_PROMPT, ATTACK_ON

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
NORMALISERS = ("global", "micro")
KL_FORMS = ("standard", "public")
GRAPHS = ("auto", "on", "off")
_SITES_OF_32 = (8, 16, 24, 30)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})  # HfArgumentParser shows this text as the flag's help


def default_sites(depth: int) -> list[str]:
    """LPA's sites for a model of `depth` blocks: embedding, 8, 16, 24 and 30 of 32, scaled and rounded down."""
    layers = dict.fromkeys(layer * depth // 32 for layer in _SITES_OF_32)
    return ["embedding", *(f"mlp:{layer}" for layer in layers)]


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for a name that is close to a known one, else nothing."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass
class LPAConfig(TrainingArguments):
    """Settings of `LPATrainer`: transformers' `TrainingArguments` and LPA's own.

    One LPA step attacks one global batch (per_device_train_batch_size x gradient_accumulation_steps x ranks pairs) and
    then updates the model `defence_steps` times on it. `lpa_steps` says how long a run is; `max_steps` counts model
    updates and follows from it. Steps of saving, logging and evaluating count model updates too and are rounded up to
    whole LPA steps.

    The defaults are the published ones (arXiv 2605.08496): 30 LPA steps of 16 pairs, 16 inner steps of AdamW at 1e-3
    within radius 6, 4 model updates of AdamW (made anew each LPA step) at a constant 8e-5, LoRA of rank 64.

    Raises:
        ValueError: a setting that is unknown, contradicts another or cannot be used; the message says which.
    """

    # the run
    lpa_steps: int = _setting(30, "LPA steps: batches that are attacked and then trained on.")
    defence_steps: int = _setting(4, "Model updates an LPA step, all on the same attacked batch.")
    reset_optimizer: bool = _setting(True, "Start each LPA step with a new optimiser state.")
    normaliser: str = _setting("global", "'global': losses are means over the global batch's tokens. 'micro': the sum "
                               "of the micro-batches' means, as in the public code.")  # fmt: skip
    toward_coef: float = _setting(0.5, "Weight of the defence's loss toward the chosen completion. The trainer divides "
                                  "the four weights by their sum.")  # fmt: skip
    away_coef: float = _setting(0.5, "Weight of the defence's loss away from the rejected completion.")
    sft_coef: float = _setting(0.0, "Weight of the cross entropy on benign responses, without the adversary.")
    kl_coef: float = _setting(0.0, "Weight of the divergence from the base model on benign responses.")
    kl: str = _setting("standard", "'standard': KL(base || model), a mean over response tokens. 'public': the public "
                       "code's form, kept for comparison.")  # fmt: skip

    # the attack
    sites: list[str] | None = field(default=None, metadata={
        "help": "Where to perturb: embedding, mlp:8, attn:8, block:8 or module names. By default embedding and layers "
                "8, 16, 24, 30 of 32, scaled to the model's depth."})  # fmt: skip
    attack_on: str = _setting("prompt+completions", f"Which tokens are perturbed: {', '.join(ATTACK_ON)}.")
    epsilon: float = _setting(6.0, "Radius of a token's perturbation.")
    step_size: float = _setting(1e-3, "Step size of the attack.")
    steps: int = _setting(16, "Inner steps of the attack; 0 trains without an adversary.")
    norm: str = _setting("l2", "Ball that a perturbation stays in: l2, linf, l2_sequence or none.")
    rule: str = _setting("adamw", "Update rule of the attack: adamw, normalized, sign, adam, rmsprop or sgd.")
    attack_toward_coef: float = _setting(0.5, "Weight of the attack's loss toward the rejected completion.")
    attack_away_coef: float = _setting(0.5, "Weight of the attack's loss away from the chosen completion. The trainer "
                                       "divides the two weights by their sum.")  # fmt: skip
    random_start: bool = _setting(False, "Start the attack at a random point of the ball.")
    relative: bool = _setting(False, "Take epsilon as a share of the norm of the hidden state it perturbs.")
    engine: str = _setting("auto", "auto, packed (the prompt once) or reference (two plain passes).")
    backend: str = _setting("auto", "Backend of the ops: auto, reference, triton or native.")
    merge_adapters: bool = _setting(False, "Merge LoRA into the weights while attacking.")
    capture_graph: str = _setting("auto", "Capture an inner step in a CUDA graph: auto, on or off.")

    # data
    system_prompt: str | None = _setting(ASSESSMENT_PROMPT, "System prompt of the pairs; an empty one for none.")
    benign_system_prompt: str | None = _setting(None, "System prompt of benign examples. By default that of the pairs "
                                                "for the shipped statements, and none for other sets.")  # fmt: skip
    max_length: int | None = _setting(None, "Longest prompt and completion in tokens; by default the model's context.")

    # adapters
    lora: bool = _setting(True, "Train LoRA adapters; otherwise all weights.")
    lora_r: int = _setting(64, "Rank of the adapters.")
    lora_alpha: float = _setting(8.0, "Scale of the adapters: they are multiplied by alpha / rank.")
    lora_dropout: float = _setting(0.0, "Dropout before the adapters, in the defence alone.")
    lora_targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS), metadata={
        "help": "Linear modules that get an adapter; 'all-linear' for all."})  # fmt: skip

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

    def __post_init__(self) -> None:
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
        self.lr_scheduler_type = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        super().__post_init__()

    def _whole_lpa_steps(self, value: float) -> int:
        """Model updates, or a share of the run if below 1, rounded up to a whole number of LPA steps."""
        updates = value * self.max_steps if value < 1 else value
        return max(1, math.ceil(updates / self.defence_steps)) * self.defence_steps

    def _check_settings(self) -> None:
        allowed = {"normaliser": NORMALISERS, "kl": KL_FORMS, "attack_on": ATTACK_ON, "capture_graph": GRAPHS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(values)}")
        for name in ("lpa_steps", "defence_steps", "gradient_accumulation_steps", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 (no attack) or more")
        for prefix, names in (("", ("toward", "away", "sft", "kl")), ("attack_", ("toward", "away"))):
            coefs = {f"{prefix}{name}_coef": getattr(self, f"{prefix}{name}_coef") for name in names}
            told = ", ".join(f"{key}={value}" for key, value in coefs.items())
            if min(coefs.values()) < 0 or sum(coefs.values()) <= 0:
                raise ValueError(f"{told}: weights must not be negative, and one of them must be above 0")
        if self.kl == "public" and self.normaliser != "micro":
            raise ValueError("kl='public' is a mean of one micro-batch; it needs normaliser='micro'")
        if self.bf16 or self.fp16:
            name = "bf16" if self.bf16 else "fp16"
            raise ValueError(
                f"{name}=True asks for autocast, which LPA does not use; load the model in the wanted dtype instead "
                "(lpa train --dtype bfloat16)"
            )

    @property
    def coefs(self) -> dict[str, float]:
        """The defence's weights, divided by their sum; terms of weight 0 are left out."""
        given = {name: getattr(self, f"{name}_coef") for name in ("toward", "away", "sft", "kl")}
        total = sum(given.values())
        return {name: value / total for name, value in given.items() if value}

    @property
    def attack_coefs(self) -> dict[str, float]:
        """The adversary's weights, divided by their sum."""
        given = {"toward": self.attack_toward_coef, "away": self.attack_away_coef}
        total = sum(given.values())
        return {name: value / total for name, value in given.items() if value}

    @property
    def attack_options(self) -> dict[str, Any]:
        """The keyword arguments of `LatentPGD`, without its model and sites."""
        names = ("epsilon", "step_size", "steps", "norm", "rule", "engine", "backend", "random_start", "relative",
                 "merge_adapters")  # fmt: skip
        graph = {"auto": "auto", "on": True, "off": False}[self.capture_graph]
        return {**{name: getattr(self, name) for name in names}, "coefs": self.attack_coefs, "capture_graph": graph}

    @property
    def own_settings(self) -> dict[str, Any]:
        """LPA's settings and the changed ones of `TrainingArguments`, for records and model cards."""
        names = LPAConfig.__annotations__
        return {name: getattr(self, name) for name in names if name != "logging_nan_inf_filter"} | {"seed": self.seed}


def read_yaml(path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """The settings in a YAML file; dashes in their names count as underscores.

    Raises:
        ValueError: no such file, not a mapping, or an unknown key (with the nearest known one).
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} holds a {type(values).__name__}; it must be a mapping of settings to values")
    names = set(known)
    settings = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in settings:
        if key not in names:
            raise ValueError(f"--config {path} has the unknown key {key!r}{nearest(key, names)}")
    return settings


def setting_names() -> list[str]:
    """All fields of `LPAConfig`."""
    return [f.name for f in dataclasses.fields(LPAConfig) if f.init]
