"""What an inner loop carries from step to step, all of it on the device: perturbations, moments, losses, counters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import pgd_update_
from ..ops.reference import gather_grad
from .attack import LatentAttack
from .batch import PairBatch
from .objective import PairRows
from .packing import text_lengths

if TYPE_CHECKING:
    from .pgd import LatentPGD, Plan

STATEFUL = {"adamw": 2, "adam": 2, "rmsprop": 1}  # how many moments a rule keeps


@dataclass
class Group:
    """The sites of one width and device, whose perturbations share one tensor and one launch.

    Attributes:
        sites: their numbers in the attack's order.
        delta: [s, R, H], the moments alike.
        norms: [s, R] float32. clipped: [s] int32.
        epsilon: [] or [s, R] float32. step_size: [] float32.
    """

    sites: list[int]
    delta: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    norms: Tensor
    clipped: Tensor
    epsilon: Tensor
    step_size: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, without the moments that the rule does not keep."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class AttackState:
    """The state of one inner loop; `update` is one step of it.

    Attributes:
        grid: [B, La] int64, see `PairBatch.grid`. size: B. rows: R. steps: how many the loop has.
        row_example: [R] int64, the pair of each row. own_rows: [R, 1] int64, its own number, -1 where no scored token
            depends on it: rows at or past the last label of both texts, which are left as they are.
        counts: [2] float32, the tokens that the means of "toward" and "away" divide by.
        positions: [] float32, B x La, which the penalty's mean divides by.
        step: [] float32, the number of steps begun. index: [1] int64, where the next one's losses go.
        done: [B] bool, the examples that have stopped.
        history: name -> [steps] losses and accuracies, each of before its step's update.
        groups: the perturbations.
    """

    def __init__(self, pgd: LatentPGD, batch: PairBatch, counts: tuple[float, float]) -> None:
        device = batch.attack_mask.device
        self.grid = batch.grid
        self.row_example = batch.attack_mask.nonzero()[:, 0]
        self.rows = self.row_example.shape[0]
        self.size = len(batch)
        self.steps = pgd.steps
        self.stop_below = pgd.stop_below
        scored = batch.only(*pgd.halves)
        ends = torch.maximum(text_lengths(scored.rejected_mask), text_lengths(scored.chosen_mask))
        used = batch.attack_mask.nonzero()[:, 1] < ends[self.row_example]
        self.own_rows = torch.where(used, torch.arange(self.rows, device=device), -1)[:, None]
        self.counts = torch.tensor([max(float(count), 1.0) for count in counts], device=device)
        self.positions = torch.full((), float(batch.attack_mask.numel()), device=device)
        self.step = torch.zeros((), dtype=torch.float32, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.done = torch.zeros(self.size, dtype=torch.bool, device=device)
        self.history: dict[str, Tensor] = {}
        widths = pgd.widths()
        self.groups = [
            self._group(pgd, [i for i, other in enumerate(widths) if other == key], *key)
            for key in dict.fromkeys(widths)
        ]

    def _group(self, pgd: LatentPGD, sites: list[int], width: int, device: torch.device) -> Group:
        shape, moments = (len(sites), self.rows, width), STATEFUL.get(pgd.rule, 0)
        new = lambda: torch.zeros(shape, dtype=pgd.state_dtype, device=device)  # noqa: E731
        return Group(
            sites,
            new(),
            new() if moments > 1 else None,
            new() if moments > 0 else None,
            torch.zeros(shape[:2], device=device),
            torch.zeros(shape[0], dtype=torch.int32, device=device),
            torch.full((), float(pgd.epsilon), device=device),
            torch.full((), float(pgd.step_size), device=device),
        )

    @property
    def deltas(self) -> list[Tensor]:
        """Each site's perturbation [R, H], a view."""
        return self.per_site("delta")

    def per_site(self, name: str) -> list[Tensor]:
        """A field of the groups by site, as views."""
        found = {site: getattr(g, name)[k] for g in self.groups for k, site in enumerate(g.sites)}
        return [found[site] for site in range(len(found))]

    # ---- before the first step ---------------------------------------------------------------------------------

    def set_relative_radius(self, epsilon: float, norm: str, hidden_norms: Tensor) -> None:
        """Radii relative to the norms [S, R] of the hidden states perturbed, or to their sequence's joint norm."""
        if norm == "l2_sequence":
            hidden_norms = torch.stack([self._sequence_norms(row[:, None]) for row in hidden_norms])
        hidden_norms = hidden_norms.clamp(min=torch.finfo(torch.float32).tiny)  # rows past the end of both texts
        for group in self.groups:
            group.epsilon = (epsilon * hidden_norms[group.sites]).to(group.delta.device).contiguous()

    def start_randomly(self, norm: str, generator: torch.Generator | None) -> None:
        """Uniform in the ball: of each coordinate for "linf", of each sequence for "l2_sequence", else of each row."""
        for group in self.groups:
            for k, delta in enumerate(group.delta):
                drawn = partial(_drawn, generator=generator, device=delta.device)
                radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k][:, None]
                if norm == "linf":
                    delta.copy_((drawn("rand", delta.shape) * 2 - 1) * radius)
                    continue
                noise = drawn("randn", delta.shape)
                if norm == "l2_sequence":
                    example = self.row_example.to(delta.device)
                    size = torch.bincount(example, minlength=self.size) * delta.shape[1]
                    share = (drawn("rand", size.shape) ** (1 / size.clamp(min=1)))[example]
                    length = self._sequence_norms(noise)
                else:
                    share = drawn("rand", delta.shape[:1]) ** (1 / delta.shape[1])
                    length = noise.norm(dim=-1)
                delta.copy_(noise * (share / length)[:, None] * radius)

    def _sequence_norms(self, values: Tensor) -> Tensor:
        """[R] float32: for each row of values [R, H], the joint Euclidean norm of all rows of its example."""
        example = self.row_example.to(values.device)
        squares = torch.zeros(self.size, device=values.device)
        return squares.index_add(0, example, values.float().square().sum(-1)).sqrt()[example]

    # ---- one step ----------------------------------------------------------------------------------------------

    def record(self, terms: dict[str, Tensor], losses: Tensor, hits: Tensor, rows: PairRows) -> None:
        """Write this step's terms and accuracies into the history, on the device; mark the examples that may stop."""
        scored = rows.labels != -100
        values = dict(terms)
        for name, mask in (("toward_accuracy", rows.rejected & scored), ("away_accuracy", ~rows.rejected & scored)):
            values[name] = (hits & mask).sum() / mask.sum().clamp(min=1)
        for name, value in values.items():
            if name not in self.history:
                self.history[name] = torch.zeros(self.steps, dtype=value.dtype, device=self.index.device)
            self.history[name].index_copy_(0, self.index, value.detach().reshape(1).to(self.index.device))
        self.index += 1
        if self.stop_below is not None:
            toward = (rows.rejected & scored).float()
            zeros = torch.zeros(self.size, device=losses.device)
            total = zeros.index_add(0, rows.example, losses.float() * toward)
            tokens = zeros.index_add(0, rows.example, toward)
            self.done |= (total < self.stop_below * tokens).to(self.done.device)

    def update(self, pgd: LatentPGD, grads: list[Tensor], tokens: Tensor) -> None:
        """One update of every site. grads: one [T, H] a site; tokens: [R, K], the tokens of each row."""
        tokens = self._live(tokens)
        if pgd.clip_grad is not None:
            grads, tokens = clip_jointly(grads, tokens, pgd.clip_grad), self._live(self.own_rows)
        self.step += 1
        for group in self.groups:
            device = group.delta.device
            pgd_update_(
                group.delta,
                [grads[i] for i in group.sites],
                tokens.to(device),
                exp_avg=group.exp_avg,
                exp_avg_sq=group.exp_avg_sq,
                step=self.step.to(device),
                step_size=group.step_size,
                epsilon=group.epsilon,
                norms=group.norms,
                clipped=group.clipped,
                rule=pgd.rule,
                norm="none" if pgd.norm == "l2_sequence" else pgd.norm,
                weight_decay=pgd.weight_decay,
                backend=pgd.backend,
            )
            if pgd.norm == "l2_sequence":
                self._project_sequences(group)

    def _live(self, tokens: Tensor) -> Tensor:
        """`tokens` [R, K] without those of examples that have stopped: such rows are left as they are."""
        if self.stop_below is None:
            return tokens
        return torch.where(self.done[self.row_example][:, None], -1, tokens)

    def _project_sequences(self, group: Group) -> None:
        for k, delta in enumerate(group.delta):
            norms = self._sequence_norms(delta)
            radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k]
            group.norms[k].copy_(norms)
            group.clipped[k] += (norms > radius).sum()
            delta.div_((norms / radius).clamp(min=1)[:, None])

    # ---- after the last step -----------------------------------------------------------------------------------

    def finish(self, pgd: LatentPGD, batch: PairBatch, plan: Plan, captured: str) -> LatentAttack:
        """The attack on `batch` that this loop has found."""
        device = self.grid.device
        epsilon: float | Tensor = math.inf if pgd.norm == "none" else float(pgd.epsilon)
        if self.groups[0].epsilon.dim() and pgd.norm != "none":
            epsilon = torch.stack([e.to(device) for e in self.per_site("epsilon")])
        return LatentAttack(
            sites=pgd.sites,
            deltas_by_row=self.deltas,
            grid=self.grid,
            epsilon=epsilon,
            history=self.history,
            row_norms=torch.stack([n.to(device) for n in self.per_site("norms")]),
            clipped=torch.stack([c.to(device) for c in self.per_site("clipped")]),
            engine=plan.engine,
            reason=plan.reason,
            layout=plan.layout,
            batch=batch,
            backend=pgd.backend,
            captured=captured,
        )

    # ---- copies of another size, for captured graphs -----------------------------------------------------------

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step reads, in a fixed order; the history is written alone."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor) and value is not self.grid]
        return own + [value for group in self.groups for value in group.tensors.values()]

    def padded(self, rows: int) -> AttackState:
        """A copy with `rows` rows, of which those beyond this state's belong to no token and stay where they are."""
        extra = rows - self.rows
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.clone())
        other.rows = rows
        other.row_example = padded(self.row_example, 0, extra, 0)
        other.own_rows = padded(self.own_rows, 0, extra, -1)
        other.history = {name: value.clone() for name, value in self.history.items()}
        other.groups = []
        for group in self.groups:
            by_row = {name: value.dim() > 1 for name, value in group.tensors.items()}
            copies: dict[str, Any] = {
                name: padded(value, 1, extra, 1 if name == "epsilon" else 0) if by_row[name] else value.clone()
                for name, value in group.tensors.items()
            }
            other.groups.append(replace(group, **copies))
        return other

    def take(self, found: AttackState) -> None:
        """What a loop on a padded copy of this state has found, copied out."""
        self.history = {name: value.clone() for name, value in found.history.items()}
        for group, other in zip(self.groups, found.groups, strict=True):
            group.delta = other.delta[:, : self.rows].clone()
            group.norms = other.norms[:, : self.rows].clone()
            group.clipped = other.clipped.clone()


def padded(values: Tensor, dim: int, extra: int, fill: float) -> Tensor:
    """A copy of `values` with `extra` more entries of `fill` along `dim`."""
    shape = list(values.shape)
    shape[dim] = extra
    return torch.cat([values, values.new_full(shape, fill)], dim)


def _drawn(kind: str, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Float32 numbers of `kind` "rand" or "randn", drawn where the generator is, on `device`."""
    where = device if generator is None else generator.device
    draw = torch.rand if kind == "rand" else torch.randn
    return draw(shape, generator=generator, device=where).to(device)


def clip_jointly(grads: list[Tensor], tokens: Tensor, limit: float) -> list[Tensor]:
    """Row gradients [R, H] of every site, scaled so that their joint norm is at most `limit`.

    Args:
        grads: one [T, H] a site. tokens: [R, K], the tokens of each row. What is not finite counts as 0.
    """
    rows = [gather_grad(grad, tokens.to(grad.device)) for grad in grads]
    rows = [torch.where(row.isfinite(), row, 0) for row in rows]
    norms = torch.stack([row.norm().to(rows[0].device) for row in rows])
    scale = (limit / (norms.norm() + 1e-6)).clamp(max=1)
    return [row * scale.to(row.device) for row in rows]
