"""AttackSettings: every setting of an attack, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..ops import RULES, requested, rule_named
from .objective import THRESHOLD, Objective

ENGINES = ("auto", "reference", "packed", "stack")
NORMS = ("l2", "linf", "l2_sequence", "none")
GRAPHS = ("auto", "on", "off")
NONFINITE = ("raise", "zero")
ADVERSARIES = ("pgd", "vector", "ablate", "random")


def _half_each() -> dict[str, float]:
    return {"toward": 0.5, "away": 0.5}


@dataclass(frozen=True)
class AttackSettings:
    """Settings of an attack on hidden states. The defaults are those of LPA (arXiv 2607.07918).

    Attributes:
        adversary: "pgd", projected gradient descent, which costs `steps` forward and backward passes. The others cost
            none: "vector" adds a fixed direction (preventative steering, arXiv 2507.21509), "ablate" projects one out
            (ReFAT, arXiv 2409.20089; DeepRefusal, arXiv 2509.15202), "random" adds noise at the radius, the control.
            Their equations are in `lpa_kernels.attack.directions`; of the settings below they read epsilon, norm,
            relative, seed and share.
        share: of the attacked tokens at each site, drawn at random for each batch, that "vector", "ablate" and "random"
            act on.
        epsilon: radius of the ball that each perturbation stays in. With `relative`, a share of the norm of the
            hidden state that is perturbed.
        step_size, steps: of the update.
        norm: "l2" a token, "l2_sequence" (one ball an example), "linf", or "none".
        rule: "adamw" (torch's defaults, as in LAT), "normalised", "sign"; also "adam", "rmsprop", "sgd".
        coefs: weights of the terms of `Objective`, used as given.
        engine: "reference" (two plain passes a step), "packed" (one pass, the prompt shared), "stack" (the same, with
            the decoder's forward and backward written by hand); the latter two raise an error where the model cannot.
            "auto" takes the fastest that gives the plain passes' results, else one unshared pass, with a warning.
        backend: of the ops: "auto", "reference", "triton", "native".
        l2_penalty: weight of a penalty on the perturbations' norms.
        clip_grad: clip the gradients of all sites jointly to this norm.
        random_start, seed: start uniformly in the ball instead of at zero.
        stop_below: an example whose "toward" loss falls below this is left as it is from then on.
        relative: see epsilon.
        weight_decay: of "adamw".
        state_dtype: of the perturbations and moments.
        beta, label_smoothing, reference_free, threshold: see `Objective`.
        nonfinite: what gradients that are not finite do: "raise" after the loop, or count as "zero" with a warning.
        merge_adapters: merge LoRA into the weights for the inner loop (weights come back bit for bit).
        capture_graph: capture one step in a CUDA graph and replay it: "on" (an error where that is impossible), "off",
            or "auto" (where possible, and no module has a hook of one's own, which a graph would run once;
            `AttackResult.captured` says why not). True and False mean "on" and "off".
        autocast: a dtype to run the model under autocast in; by default none, whatever is active outside.

    Raises:
        ValueError: an unknown or impossible setting; the message names it, its value and what would be right.

    >>> AttackSettings(steps=4).reach(width=576)
    0.0962...
    """

    epsilon: float = 6.0
    step_size: float = 1e-3
    steps: int = 16
    norm: str = "l2"
    rule: str = "adamw"
    coefs: Mapping[str, float] = field(default_factory=_half_each)
    engine: str = "auto"
    backend: str = "auto"
    l2_penalty: float = 0.0
    clip_grad: float | None = None
    random_start: bool = False
    seed: int | None = None
    stop_below: float | None = None
    relative: bool = False
    weight_decay: float = 0.01
    state_dtype: torch.dtype = torch.float32
    beta: float = 0.3
    label_smoothing: float = 0.0
    reference_free: bool = False
    threshold: float = THRESHOLD
    nonfinite: str = "raise"
    merge_adapters: bool = False
    capture_graph: str | bool = "auto"
    autocast: torch.dtype | None = None
    adversary: str = "pgd"
    share: float = 1.0

    def __post_init__(self) -> None:
        self._set("rule", rule_named(self.rule))
        self._set("coefs", _half_each() if self.coefs is None else dict(self.coefs))
        if isinstance(self.capture_graph, bool):
            self._set("capture_graph", "on" if self.capture_graph else "off")
        for name, allowed in (
            ("engine", ENGINES),
            ("norm", NORMS),
            ("rule", RULES),
            ("capture_graph", GRAPHS),
            ("nonfinite", NONFINITE),
            ("adversary", ADVERSARIES),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
        for name in ("epsilon", "step_size", "steps"):
            if not (value := getattr(self, name)) > 0:  # NaN too
                raise ValueError(f"{name}={value} must be positive")
        if not float(self.steps).is_integer():
            raise ValueError(f"steps={self.steps} must be a whole number")
        self._set("steps", int(self.steps))
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad={self.clip_grad} must be positive, or None")
        if self.random_start and not math.isfinite(self.epsilon):
            raise ValueError(f"random_start needs a ball to start in, and epsilon is {self.epsilon}")
        self._check_adversary()
        if not self.state_dtype.is_floating_point:
            raise ValueError(f"state_dtype={self.state_dtype} is no float dtype")
        requested(self.backend)
        objective = self.objective  # raises what is wrong with the terms
        if self.stop_below is not None and not objective.needs(True):
            raise ValueError(
                f"stop_below={self.stop_below} goes by the 'toward' loss, and coefs={self.coefs} leave it out"
            )
        if self.merge_adapters and objective.needs_reference:
            raise ValueError(
                f"merge_adapters=True leaves no model without adapters for {objective.preference!r} to refer to; "
                "use reference_free=True or merge_adapters=False"
            )

    def _check_adversary(self) -> None:
        if not 0 < self.share <= 1 or (self.share != 1 and self.adversary == "pgd"):
            raise ValueError(f"share={self.share} must be above 0 and at most 1, and 1 for adversary='pgd'")
        if self.adversary == "random" and (self.norm == "none" or not math.isfinite(self.epsilon)):
            raise ValueError(f"adversary='random' needs a radius; norm is {self.norm!r} and epsilon {self.epsilon}")
        if self.adversary == "vector" and self.norm != "none" and not math.isfinite(self.epsilon):
            raise ValueError(f"adversary='vector' is scaled to epsilon={self.epsilon}; norm='none' adds it as it is")
        if self.adversary == "vector" and self.norm == "l2_sequence":
            raise ValueError("adversary='vector' is the same at every token; use norm='l2', 'linf' or 'none'")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(
            coefs=self.coefs,
            threshold=self.threshold,
            l2_penalty=self.l2_penalty,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            reference_free=self.reference_free,
        )

    @property
    def halves(self) -> tuple[bool, bool]:
        """Whether the rejected and the chosen completion take part."""
        return self.objective.needs(True), self.objective.needs(False)

    def reach(self, width: int) -> float:
        """How far from its start a perturbation of this width can get at most: steps of step_size a coordinate."""
        steps = _adam_reach(self.steps) if self.rule in ("adamw", "adam") else self.steps
        each = self.step_size if self.norm == "linf" else self.step_size * math.sqrt(width)
        return steps * (self.step_size if self.rule == "normalised" else each)

    def never_binds(self, width: int) -> str:
        """What to say where no perturbation of this width can reach the radius; "" where one may."""
        fixed = self.rule in ("adamw", "adam", "sign", "normalised") and not (self.relative or self.random_start)
        if self.adversary != "pgd" or not fixed or self.norm not in ("l2", "linf") or self.reach(width) >= self.epsilon:
            return ""
        return (
            f"epsilon={self.epsilon:g} never binds: {self.steps} steps of {self.step_size:g} reach a norm of "
            f"{self.reach(width):.3g} at width {width}"
        )


def _adam_reach(steps: int, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """How many step sizes Adam can move a coordinate at most, by Cauchy and Schwarz: a little more than one a step."""
    moved = 0.0
    for t in range(1, steps + 1):
        first = [(1 - beta1) * beta1**k / (1 - beta1**t) for k in range(t)]
        second = [(1 - beta2) * beta2**k / (1 - beta2**t) for k in range(t)]
        moved += math.sqrt(sum(m * m / v for m, v in zip(first, second, strict=True)))
    return moved
