"""LatentPGD: the attack as people configure and call it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from ..model.frozen import can_freeze, frozen_depth
from ..model.hooks import kept_for_recompute
from ..model.modes import inner_mode
from ..model.sites import Site, resolve_sites, site_widths
from ..model.walk import parameters_of
from ..ops import requested, rule_named
from . import capture, packed, reference
from .attack import LatentAttack
from .batch import PairBatch
from .objective import Objective, PairRows
from .packing import PackedLayout, pack, unshared
from .probe import can_pack
from .state import AttackState

logger = logging.getLogger(__name__)

ENGINES = ("auto", "reference", "packed")
NORMS = ("l2", "linf", "l2_sequence", "none")
_warned: WeakSet[nn.Module] = WeakSet()  # models that run unshared and have been told of
# by model, then by sites and devices; drop-ins make a LatentPGD for every batch
_widths: WeakKeyDictionary[nn.Module, dict[object, list[tuple[int, torch.device]]]] = WeakKeyDictionary()
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # what has been said of a model


@dataclass(frozen=True)
class Plan:
    """How a batch is run: by which engine, why not packed, and how it is laid out (None: two plain passes)."""

    engine: str
    reason: str = ""
    layout: PackedLayout | None = None


def _adam_reach(steps: int, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """How many step sizes Adam can move a coordinate at most, by Cauchy and Schwarz: a little more than one a step."""
    moved = 0.0
    for t in range(1, steps + 1):
        first = [(1 - beta1) * beta1**k / (1 - beta1**t) for k in range(t)]
        second = [(1 - beta2) * beta2**k / (1 - beta2**t) for k in range(t)]
        moved += math.sqrt(sum(m * m / v for m, v in zip(first, second, strict=True)))
    return moved


class LatentPGD:
    """Projected gradient descent on hidden states: finds what makes a model prefer `rejected` over `chosen`.

    Args:
        model: any decoder language model of transformers, with or without PEFT adapters.
        sites: where to perturb: "embedding", "mlp:8", "attn:8", "block:8", 8 (= "mlp:8") or any module's name.
        epsilon: radius of the ball that each perturbation stays in. With `relative`, a share of the norm of the
            hidden state that is perturbed.
        step_size, steps: of the update.
        norm: "l2" a token, "l2_sequence" (one ball an example), "linf", or "none".
        rule: "adamw" (torch's defaults, as in LAT), "normalised", "sign"; also "adam", "rmsprop", "sgd".
        coefs: weights of the terms of `Objective`, used as given.
        engine: "reference" (two plain passes a step), "packed" (one pass, the prompt shared; an error where the model
            cannot), "auto" (packed where that is exact, else one unshared pass, with a warning).
        backend: of the ops: "auto", "reference", "triton", "native".
        l2_penalty: weight of a penalty on the perturbations' norms.
        clip_grad: clip the gradients of all sites jointly to this norm.
        random_start, seed: start uniformly in the ball instead of at zero.
        stop_below: an example whose "toward" loss falls below this is left as it is from then on.
        relative: see epsilon.
        state_dtype: of the perturbations and moments.
        beta, label_smoothing, reference_free, threshold: see `Objective`.
        merge_adapters: merge LoRA into the weights for the inner loop (weights come back bit for bit).
        capture_graph: capture one step in a CUDA graph and replay it: True (an error where that is impossible), False,
            or "auto" (where possible; `LatentAttack.captured` says why not; after a failure not again for this model).
        autocast: a dtype to run the model under autocast in; by default none, whatever is active outside.

    Raises:
        ValueError: an unknown or impossible setting; the message names it and its value.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | int | Site | Sequence[str | int | Site],
        *,
        epsilon: float = 6.0,
        step_size: float = 1e-3,
        steps: int = 16,
        norm: str = "l2",
        rule: str = "adamw",
        coefs: Mapping[str, float] | None = None,
        engine: str = "auto",
        backend: str = "auto",
        l2_penalty: float = 0.0,
        clip_grad: float | None = None,
        random_start: bool = False,
        seed: int | None = None,
        stop_below: float | None = None,
        relative: bool = False,
        weight_decay: float = 0.01,
        state_dtype: torch.dtype = torch.float32,
        beta: float = 0.3,
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        threshold: float = -5.0,
        merge_adapters: bool = False,
        capture_graph: bool | str = "auto",
        autocast: torch.dtype | None = None,
    ) -> None:
        rule = rule_named(rule)
        for name, value, allowed in (("engine", engine, ENGINES), ("norm", norm, NORMS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
        if not epsilon > 0 or not step_size > 0 or steps < 1:
            raise ValueError(f"epsilon={epsilon}, step_size={step_size} and steps={steps} must be positive")
        if clip_grad is not None and not clip_grad > 0:
            raise ValueError(f"clip_grad={clip_grad} must be positive, or None")
        if random_start and not math.isfinite(epsilon):
            raise ValueError(f"random_start needs a ball to start in, and epsilon is {epsilon}")
        if not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype={state_dtype} is no float dtype")
        if capture_graph not in ("auto", True, False):
            raise ValueError(f"capture_graph={capture_graph!r} is unknown; use 'auto', True or False")
        requested(backend)
        self.model = model
        self.sites = resolve_sites(model, sites)
        self.epsilon, self.step_size, self.steps = epsilon, step_size, steps
        self.norm, self.rule, self.weight_decay = norm, rule, weight_decay
        self.objective = Objective(
            coefs={"toward": 0.5, "away": 0.5} if coefs is None else dict(coefs),
            threshold=threshold,
            l2_penalty=l2_penalty,
            beta=beta,
            label_smoothing=label_smoothing,
            reference_free=reference_free,
        )
        if stop_below is not None and not self.objective.needs(True):
            raise ValueError(f"stop_below={stop_below} goes by the 'toward' loss, and coefs={coefs} leave it out")
        if merge_adapters and self.objective.needs_reference:
            raise ValueError(
                f"merge_adapters=True leaves no model without adapters for {self.objective.preference!r} to refer to; "
                "use reference_free=True or merge_adapters=False"
            )
        self.engine, self.backend = engine, backend
        self.clip_grad, self.stop_below = clip_grad, stop_below
        self.random_start, self.relative, self.state_dtype = random_start, relative, state_dtype
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.merge_adapters, self.capture_graph, self.autocast = merge_adapters, capture_graph, autocast

    @property
    def halves(self) -> tuple[bool, bool]:
        """Whether the rejected and the chosen completion take part."""
        return self.objective.needs(True), self.objective.needs(False)

    def widths(self) -> list[tuple[int, torch.device]]:
        """Width and device of each site, measured by one small pass of the model, once where it is."""
        known = _widths.setdefault(self.model, {})
        where = tuple(site.name for site in self.sites), tuple(p.device for p in parameters_of(self.model))
        if where not in known:
            known[where] = site_widths(self.model, self.sites)
        self._warn_if_never_binding(max(width for width, _ in known[where]))
        return known[where]

    def reach(self, width: int) -> float:
        """How far from its start a perturbation of this width can get at most: steps of step_size a coordinate."""
        steps = _adam_reach(self.steps) if self.rule in ("adamw", "adam") else self.steps
        each = self.step_size if self.norm == "linf" else self.step_size * math.sqrt(width)
        return steps * (self.step_size if self.rule == "normalised" else each)

    def _warn_if_never_binding(self, width: int) -> None:
        fixed = self.rule in ("adamw", "adam", "sign", "normalised") and not (self.relative or self.random_start)
        if fixed and self.norm in ("l2", "linf") and self.reach(width) < self.epsilon:
            message = (
                f"epsilon={self.epsilon:g} never binds: {self.steps} steps of {self.step_size:g} reach a norm of "
                f"{self.reach(width):.3g} at width {width}"
            )
            told = _told.setdefault(self.model, set())
            if message not in told:
                told.add(message)
                logger.warning(message)

    def attack(
        self, batch: PairBatch | Mapping[str, Any], counts: tuple[float, float] | None = None, *, part: bool = False
    ) -> LatentAttack:
        """Find the perturbations of one batch.

        The model runs in eval mode, without autocast, its parameters frozen; all of that is put back, and no
        gradient is left on it.

        Args:
            batch: a `PairBatch`, or a mapping with its fields, on any device.
            counts: tokens that the means of (toward, away) divide by; by default this batch's own numbers.
            part: it is a part of a larger batch, and may have nothing to score or to attack.

        Raises:
            ValueError: the batch has no completion token or no attacked position, and is no part.
            RuntimeError: engine="packed" and the model cannot run packed; the message says why.
            FloatingPointError: the model's losses are not finite.
        """
        pairs = self._pairs(batch)
        own = pairs.counts
        if not part:
            self.check_counts(*own, int(pairs.attack_mask.sum()))
        with inner_mode(self.model, self.merge_adapters, self.autocast):
            state = AttackState(self, pairs, counts or own)
            if self.relative:
                hidden_norms = reference.hidden_norms(self.model, self.sites, pairs)
                state.set_relative_radius(self.epsilon, self.norm, hidden_norms)
            if self.random_start:
                state.start_randomly(self.norm, self.generator)
            plan = self.plan(pairs.only(*self.halves))
            captured = capture.run(self, state, plan.layout if plan.engine == "packed" else None)
            if captured != capture.YES:
                if plan.layout is None:
                    reference.run(self, pairs, state)
                else:
                    packed.run(self, state, plan.layout, plan.engine == "packed")
        found = state.finish(self, pairs, plan, captured)
        self._check(found)
        return found

    def check_counts(self, rejected: float, chosen: float, attacked: float) -> None:
        """Refuse a batch with nothing to do.

        Args:
            rejected, chosen: its completion tokens. attacked: its attacked positions.

        Raises:
            ValueError: there are none of some kind.
        """
        for name, count, needed in zip(("rejected", "chosen"), (rejected, chosen), self.halves, strict=True):
            if needed and not count:
                raise ValueError(f"{name}_mask has no completion token after position 0; there is nothing to score")
        if not attacked:
            raise ValueError("attack_mask has no True: there is no position to attack")

    def _pairs(self, batch: PairBatch | Mapping[str, Any]) -> PairBatch:
        pairs = batch if isinstance(batch, PairBatch) else PairBatch.from_dict(batch)
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return pairs if pairs.rejected_ids.device == device else pairs.to(device)

    def plan(self, batch: PairBatch) -> Plan:
        """How `batch` is to be run, by the setting `engine` and what the model can do.

        Raises:
            RuntimeError: engine="packed" and the model cannot; the message says why.
        """
        if self.engine == "reference":
            return Plan("reference", "engine='reference'")
        layout = pack(batch)
        verdict = can_pack(self.model, layout.shape[1])
        if verdict:
            return Plan("packed", "", layout)
        if self.engine == "packed":
            raise RuntimeError(f"engine='packed' cannot run {type(self.model).__name__}: {verdict.reason}")
        if self.model not in _warned:
            _warned.add(self.model)
            logger.warning("%s runs unshared, two texts a pair: %s", type(self.model).__name__, verdict.reason)
        return Plan("unshared", verdict.reason, unshared(batch))

    def rows(self, batch: PairBatch | Mapping[str, Any], attack: LatentAttack | None = None) -> PairRows:
        """The logits that predict completion tokens, under an attack or not, with gradients for the weights.

        The batch is run as `attack` was (or as one would be): the defence's losses come from these rows. Both
        completions are there, whatever the attack's objective, and activations may be checkpointed.

        Raises:
            ValueError: the attack is on another batch.
        """
        pairs = self._pairs(batch)
        if attack is None:
            plan = self.plan(pairs)
        elif attack.batch is None or (difference := attack.batch.difference(pairs)):
            raise ValueError(f"the attack is on another batch ({difference}); call attack() on this one first")
        else:
            plan = Plan(attack.engine, attack.reason, attack.layout)
            if plan.layout is not None and not all(self.halves):  # the attack's layout has one completion alone
                plan = replace(plan, layout=pack(pairs) if plan.engine == "packed" else unshared(pairs))
        if plan.layout is None:
            with nullcontext() if attack is None else kept_for_recompute(self.model, attack.applied):
                return reference.two_pass_rows(self.model, pairs)
        return packed.attacked_rows(self.model, plan.layout, len(pairs), plan.engine == "packed", attack)

    def frozen_depth(self) -> int:
        """How many of the lowest blocks may be run once an attack."""
        depth = frozen_depth(self.sites)
        return depth if depth and can_freeze(self.model, depth) else 0

    def _check(self, attack: LatentAttack) -> None:
        total = attack.history["total"]
        if not bool(total.isfinite().all()):
            step = int((~total.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the adversary's loss is {float(total[step])} at inner step {step}: the logits are not finite; "
                "look for NaN in its weights, or load it in bfloat16 or float32 instead of float16"
            )
