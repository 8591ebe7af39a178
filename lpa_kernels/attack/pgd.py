"""LatentPGD: the attack as people call it, by gradient descent or by a fixed direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..model.blocks import UnsupportedStack
from ..model.facts import known, model_key, remembered, say_once
from ..model.frozen import can_freeze, frozen_depth
from ..model.modes import as_if_trained, inner_mode
from ..model.perturbation import fixed_rows, grid_rows, kept_for_recompute
from ..model.sharding import is_sharded
from ..model.sites import Site, resolve_sites, site_widths
from ..ops import noted
from . import graphs, loop, two_pass
from .batch import PairBatch
from .directions import Directions, acting, check_widths, checked, fill
from .engine import Plan, plan
from .layout import pack, unshared
from .loop import HookedForward
from .passes import PairRows, layout_rows, two_pass_rows
from .result import AttackResult
from .settings import AttackSettings
from .slopes import wrong_gradients
from .stacked import StackForward
from .state import AttackState
from .verdicts import prefix_kept, way_of


class LatentPGD:
    """Projected gradient descent on hidden states: finds what makes a model prefer `rejected` over `chosen`.

    Args:
        model: any decoder language model of transformers, with or without PEFT adapters.
        sites: where to perturb: "embedding", "mlp:8", "attn:8", "block:8", 8 (= "mlp:8") or any module's name.
        settings: of the attack; by default those of LPA.
        directions: of the adversaries "vector" and "ablate": by the site's name, or one for all, [H] of any length;
            see `mean_difference` and `read_directions`.
        changes: fields of `AttackSettings` that differ from `settings`: LatentPGD(model, sites, epsilon=2.0, steps=8).

    Raises:
        ValueError: an impossible setting or an unknown site; the message names it and its value.
        TypeError: a name that is no setting.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**size))
    >>> ids, last = torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]])
    >>> batch = PairBatch(ids, last, torch.tensor([[1, 2, 4]]), last, ~last)  # the prompt 1, 2 is attacked
    >>> attack = LatentPGD(model, ["embedding", "mlp:0"], epsilon=1.0, steps=2).attack(batch)
    >>> len(attack.losses), {site: tuple(norms.shape) for site, norms in attack.norms.items()}
    (2, {'embedding': (2,), 'mlp:0': (2,)})
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | int | Site | Sequence[str | int | Site],
        settings: AttackSettings | None = None,
        *,
        directions: Directions | None = None,
        **changes: Any,
    ) -> None:
        unknown = sorted(set(changes) - set(AttackSettings.__dataclass_fields__))
        if unknown:
            raise TypeError(f"{unknown[0]}={changes[unknown[0]]!r} is no setting of an attack; see AttackSettings")
        self.model = model
        self.settings = replace(settings or AttackSettings(), **changes)
        self.sites = resolve_sites(model, sites)
        adversary = self.settings.adversary
        self._directions = checked(directions, self.sites, adversary) if adversary in ("vector", "ablate") else []
        seed = self.settings.seed
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def widths(self) -> list[tuple[int, torch.device]]:
        """Width and device of each site, measured by one small pass of the model, once where it is."""
        key = tuple(id(site.module) for site in self.sites), model_key(self.model)
        found = remembered(self.model, "widths", key, lambda: site_widths(self.model, self.sites))
        if message := self.settings.never_binds(max(width for width, _ in found)):
            say_once(self.model, message)
        return found

    def attack(
        self,
        batch: PairBatch | Mapping[str, Any],
        counts: tuple[float, float] | None = None,
        *,
        part: bool = False,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Find the perturbations of one batch.

        The model runs in eval mode, without autocast, its parameters frozen; all of that is put back, and no
        gradient is left on it.

        Args:
            batch: a `PairBatch`, or a mapping with its fields, on any device.
            counts: tokens that the means of (toward, away) divide by; by default this batch's own numbers.
            part: it is a part of a larger batch, and may have nothing to score or to attack.
            generator: of a random start, instead of the one that `seed` made.

        Raises:
            ValueError: the batch has no completion token or no attacked position, and is no part.
            RuntimeError: the model cannot be attacked, or not by the engine asked for; the message says why.
            FloatingPointError: the model's losses or gradients are not finite.
        """
        pairs, settings, model = self._pairs(batch), self.settings, self.model
        host = pairs.on_host()
        own = host.counts
        if not part:
            self.check_counts(*own, int(host.attack_mask.sum()))
        with self.held():
            widths = self.widths()  # which refuses sites by name before passes are made
            if self._directions:
                check_widths(self._directions, self.sites, widths)
            inner = settings.adversary == "pgd"
            planned = plan(model, self.sites, settings, pairs.only(*settings.halves), loop=inner)
            if inner:
                self._check_gradients(pairs, planned, sum(own))
            state = AttackState(settings, widths, pairs, counts or own, planned.alone)
            if settings.relative:
                alone = way_of(model, pairs, packing=False).engine == "alone"
                state.set_relative_radius(two_pass.hidden_norms(model, self.sites, pairs, alone))
            if not inner:
                return self._without_steps(pairs, planned, state, generator or self._generator)
            if settings.random_start:
                state.start_randomly(generator or self._generator)
            with noted() as kernels:
                planned, captured = self._run(planned, state, pairs)
        found = self._result(pairs, planned, state, captured)
        found.kernels = kernels
        wrong = (~found.history["total"].isfinite()).any().to(state.grid.device), (state.nonfinite > 0).any()
        if bool(torch.stack(wrong).any()):
            _check_finite(found)
            self._check_gradients_finite(state)
        return found

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it the model is as attacks run it, so that several attacks need not make it so each.

        Nothing else may be done with the model meanwhile.
        """
        with known(self.model), inner_mode(self.model, self.settings.merge_adapters, self.settings.autocast):
            yield

    def _without_steps(
        self, pairs: PairBatch, planned: Plan, state: AttackState, generator: torch.Generator | None
    ) -> AttackResult:
        """What an adversary without inner steps gives."""
        on = acting(self.settings, state, generator)
        ablate = self.settings.adversary == "ablate"
        if not ablate:
            fill(self.settings, state, self._directions, on, generator)
        found = self._result(pairs, planned, state, "there are no inner steps")
        if ablate:
            found.ablated, found.acting = [direction / direction.norm() for direction in self._directions], on
        return found

    def _run(self, planned: Plan, state: AttackState, pairs: PairBatch) -> tuple[Plan, str]:
        """The inner loop. Returns what was run, and whether it was replayed, or why not."""
        model, sites, settings = self.model, self.sites, self.settings
        layout, stacked = planned.layout, None
        if planned.engine == "stack" and layout is not None:
            try:
                stacked = StackForward(model, sites, layout, settings.backend)
            except UnsupportedStack as error:  # a mask or a rotation that the pairs compared did not have
                if settings.engine == "stack":
                    raise RuntimeError(f"engine='stack' cannot run {type(model).__name__}: {error}") from error
                planned = replace(planned, engine="packed", reason=str(error))
        depth = frozen_depth(sites) if planned.engine in ("packed", "unshared") else 0
        depth = depth if depth and can_freeze(model, depth) else 0
        captured = graphs.run(model, sites, settings, state, layout if planned.engine == "packed" else None, depth)
        if captured == graphs.YES:
            return planned, captured
        if layout is None:
            two_pass.run(model, sites, settings, state, pairs, planned.alone)
        elif stacked is not None:
            loop.run(model, settings, state, layout, stacked)
        else:
            if not settings.objective.needs_reference:  # the prefix is another one without adapters
                layout = prefix_kept(model, layout)
            forward = HookedForward(model, sites, layout, settings.backend)
            forward.trim()
            loop.run(model, settings, state, layout, forward, depth)
        return planned, captured

    def _check_gradients(self, pairs: PairBatch, planned: Plan, labels: int) -> None:
        """Ask once a model and its sites whether backward passes belong to forward passes."""
        if not labels and not is_sharded(self.model):
            return
        how = self.settings.merge_adapters, self.settings.autocast  # a merged adapter has no backward pass of its own
        key = tuple(id(site.module) for site in self.sites), model_key(self.model), how
        few = planned.layout is not None
        widths = self.widths()

        def ask() -> str:
            with as_if_trained(self.model):
                return wrong_gradients(self.model, self.sites, widths, pairs, self.settings.backend, few)

        if message := remembered(self.model, "gradients", key, ask):
            raise RuntimeError(message)

    def _check_gradients_finite(self, state: AttackState) -> None:
        """Raise, or say once, that gradients were not finite; what to do is a setting."""
        counts = state.nonfinite.cpu()
        if not (number := int(counts.sum())):
            return
        step, site = (int(i) for i in counts.nonzero()[0])
        name, rows = self.sites[site].name, int(counts[step, site])
        if self.settings.nonfinite == "raise":
            raise FloatingPointError(
                f"the gradient of site {name!r} at inner step {step} is not finite in {rows} of {state.rows} rows; "
                'look for overflow in its backward pass, or take such gradients as 0 by nonfinite="zero"'
            )
        say_once(
            self.model,
            f"{number} rows of gradients were not finite, the first at site {name!r} in inner step {step}: they count "
            "as 0, which leaves the attack weaker than it seems",
        )

    def _result(self, pairs: PairBatch, planned: Plan, state: AttackState, captured: str) -> AttackResult:
        device = state.grid.device
        ball = self.settings.norm != "none"
        epsilon: float | torch.Tensor = float(self.settings.epsilon) if ball else math.inf
        if ball and self.settings.relative:
            epsilon = torch.stack([e.to(device) for e in state.per_site("epsilon")])
        return AttackResult(
            sites=self.sites,
            deltas_by_row=state.deltas,
            grid=state.grid,
            epsilon=epsilon,
            history=state.history,
            row_norms=torch.stack([n.to(device) for n in state.per_site("norms")]),
            clipped=torch.stack([c.to(device) for c in state.per_site("clipped")]),
            engine=planned.engine,
            reason=planned.reason,
            layout=planned.layout,
            batch=pairs,
            model=self.model,
            backend=self.settings.backend,
            captured=captured,
        )

    def rows(self, batch: PairBatch | Mapping[str, Any], attack: AttackResult | None = None) -> PairRows:
        """The logits that predict completion tokens, under an attack or not, with gradients for the weights.

        The batch is run as `attack` was (or as one would be): the defence's losses come from these rows. Both
        completions are there, whatever the attack's objective, and activations may be checkpointed.

        Raises:
            ValueError: the attack is on another batch.
        """
        pairs = self._pairs(batch)
        if attack is None:
            planned = plan(self.model, self.sites, self.settings, pairs, loop=False)
        elif attack.batch is None or (difference := attack.batch.difference(pairs)):
            raise ValueError(f"the attack is on another batch ({difference}); call attack() on this one first")
        else:
            planned = Plan(attack.engine, attack.reason, attack.layout)
            if attack.layout is not None and not all(self.settings.halves):  # the attack's has one completion alone
                first = attack.layout.first_position
                both = pack(pairs, first_position=first) if attack.layout.packed else unshared(pairs)
                planned = replace(planned, layout=both)
        layout = planned.layout
        if layout is None:
            under = None if attack is None else lambda grid: attack.perturbing(grid_rows(grid))
            return two_pass_rows(self.model, pairs, alone=planned.alone, under=under)
        if attack is None:
            return layout_rows(self.model, layout)
        with kept_for_recompute(self.model, lambda: attack.perturbing(fixed_rows(layout.token_rows))):
            return layout_rows(self.model, layout)

    def check_counts(self, rejected: float, chosen: float, attacked: float) -> None:
        """Refuse a batch with nothing to do.

        Args:
            rejected, chosen: its completion tokens. attacked: its attacked positions.

        Raises:
            ValueError: there are none of some kind.
        """
        counts = zip(("rejected", "chosen"), (rejected, chosen), self.settings.halves, strict=True)
        for name, count, needed in counts:
            if needed and not count:
                raise ValueError(f"{name}_mask has no completion token after position 0; there is nothing to score")
        if not attacked:
            raise ValueError("attack_mask has no True: there is no position to attack")

    def _pairs(self, batch: PairBatch | Mapping[str, Any]) -> PairBatch:
        pairs = batch if isinstance(batch, PairBatch) else PairBatch.from_dict(batch)
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return pairs if pairs.rejected_ids.device == device else pairs.to(device)


def _check_finite(attack: AttackResult) -> None:
    total = attack.history["total"]
    if not bool(total.isfinite().all()):
        step = int((~total.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"the adversary's loss is {float(total[step])} at inner step {step}: the logits are not finite; "
            "look for NaN in its weights, or load it in bfloat16 or float32 instead of float16"
        )
