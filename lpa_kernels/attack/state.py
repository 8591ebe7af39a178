"""What an inner loop carries from step to step, all of it on the device: perturbations, moments, losses, counters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import gather_grad, pgd_update_
from .batch import PairBatch
from .layout import Layout, text_lengths
from .passes import PairRows
from .settings import AttackSettings

STATEFUL = {"adamw": 2, "adam": 2, "rmsprop": 1}  # how many moments a rule keeps
_BY_ROW = {"row_example": 0, "own_rows": -1}  # tensors with a row a row of delta, and what stands where there is none


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
        settings: of the attack. grid: [B, La] int64, see `PairBatch.grid`. size: B. rows: R.
        row_example: [R] int64, the pair of each row. own_rows: [R, 1] int64, its own number, -1 where no scored token
            depends on it: rows at or past the last label of both texts, which are left as they are.
        counts: [2] float32, the tokens that the means of "toward" and "away" divide by.
        positions: [] float32, B x La, which the penalty's mean divides by.
        step: [] float32, the number of steps begun. index: [1] int64, where the next one's losses go.
        done: [B] bool, the examples that have stopped.
        nonfinite: [steps, S] int32, at how many rows the gradient was NaN or infinite; it counts as 0 there.
        history: name -> [steps] losses and accuracies, each of before its step's update.
        groups: the perturbations.
    """

    def __init__(
        self,
        settings: AttackSettings,
        widths: Sequence[tuple[int, torch.device]],
        batch: PairBatch,
        counts: tuple[float, float],
        whole: bool = False,
    ) -> None:
        """A state of zeros. whole: the last label of a text is run too, and may matter to the tokens before it."""
        self.settings = settings
        device = batch.attack_mask.device
        self.grid = batch.grid
        self.row_example, position = batch.attack_mask.nonzero().unbind(1)
        self.rows = self.row_example.shape[0]
        self.size = len(batch)
        scored = batch.only(*settings.halves)
        ends = torch.maximum(text_lengths(scored.rejected_mask), text_lengths(scored.chosen_mask))
        used = position < (ends + 1 if whole else ends)[self.row_example]
        self.own_rows = torch.where(used, torch.arange(self.rows, device=device), -1)[:, None]
        self.counts = torch.tensor([max(float(count), 1.0) for count in counts], device=device)
        self.positions = torch.full((), float(batch.attack_mask.numel()), device=device)
        self.step = torch.zeros((), dtype=torch.float32, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.done = torch.zeros(self.size, dtype=torch.bool, device=device)
        self.nonfinite = torch.zeros(settings.steps, len(widths), dtype=torch.int32, device=device)
        self.history: dict[str, Tensor] = {}
        self.groups = [
            self._group([i for i, other in enumerate(widths) if other == key], *key) for key in dict.fromkeys(widths)
        ]

    def _group(self, sites: list[int], width: int, device: torch.device) -> Group:
        rule = self.settings.rule if self.settings.adversary == "pgd" else ""
        shape, moments = (len(sites), self.rows, width), STATEFUL.get(rule, 0)
        new = lambda: torch.zeros(shape, dtype=self.settings.state_dtype, device=device)  # noqa: E731
        return Group(
            sites,
            new(),
            new() if moments > 1 else None,
            new() if moments > 0 else None,
            torch.zeros(shape[:2], device=device),
            torch.zeros(shape[0], dtype=torch.int32, device=device),
            torch.full((), float(self.settings.epsilon), device=device),
            torch.full((), float(self.settings.step_size), device=device),
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

    def set_relative_radius(self, hidden_norms: Tensor) -> None:
        """Radii relative to the norms [S, R] of the hidden states perturbed, or to their sequence's joint norm."""
        if self.settings.norm == "l2_sequence":
            hidden_norms = torch.stack([self._sequence_norms(row[:, None]) for row in hidden_norms])
        hidden_norms = hidden_norms.clamp(min=torch.finfo(torch.float32).tiny)  # rows past the end of both texts
        for group in self.groups:
            group.epsilon = (self.settings.epsilon * hidden_norms[group.sites]).to(group.delta.device).contiguous()

    def start_randomly(self, generator: torch.Generator | None, boundary: bool = False) -> None:
        """Uniform in the ball: of each coordinate for "linf", of each sequence for "l2_sequence", else of each row.

        Args:
            boundary: at its boundary instead; for "linf" at its corners.
        """
        norm = self.settings.norm
        for group in self.groups:
            for k, delta in enumerate(group.delta):
                drawn = partial(_drawn, generator=generator, device=delta.device)
                radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k][:, None]
                if norm == "linf":
                    drawn_at = drawn("rand", delta.shape) * 2 - 1
                    delta.copy_((drawn_at.sign() if boundary else drawn_at) * radius)
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
                delta.copy_(noise * ((1 if boundary else share) / length)[:, None] * radius)

    def _sequence_norms(self, values: Tensor) -> Tensor:
        """[R] float32: for each row of values [R, H], the joint Euclidean norm of all rows of its example."""
        example = self.row_example.to(values.device)
        squares = torch.zeros(self.size, device=values.device)
        return squares.index_add(0, example, values.float().square().sum(-1)).sqrt()[example]

    # ---- one step ----------------------------------------------------------------------------------------------

    def record(self, terms: dict[str, Tensor], losses: Tensor, hits: Tensor, rows: PairRows | Layout) -> None:
        """Write this step's terms and accuracies into the history, on the device; mark the examples that may stop."""
        scored = rows.labels != -100
        halves = torch.stack([rows.rejected, ~rows.rejected]) & scored
        shares = (halves & hits).sum(1) / halves.sum(1).clamp(min=1)
        values = terms | dict(zip(("toward_accuracy", "away_accuracy"), shares, strict=True))
        for name, value in values.items():
            if name not in self.history:
                self.history[name] = torch.zeros(self.settings.steps, dtype=value.dtype, device=self.index.device)
            self.history[name].index_copy_(0, self.index, value.detach().reshape(1).to(self.index.device))
        self.index += 1
        if self.settings.stop_below is not None:
            toward = (rows.rejected & scored).float()
            zeros = torch.zeros(self.size, device=losses.device)
            total = zeros.index_add(0, rows.example, losses.float() * toward)
            tokens = zeros.index_add(0, rows.example, toward)
            self.done |= (total < self.settings.stop_below * tokens).to(self.done.device)

    def update(self, grads: list[Tensor], tokens: Tensor) -> None:
        """One update of every site. grads: one [T, H] a site; tokens: [R, K], the tokens of each row."""
        tokens = self._live(tokens)
        self._count(grads, tokens)
        settings = self.settings
        if settings.clip_grad is not None:
            grads, tokens = clip_jointly(grads, tokens, settings.clip_grad), self._live(self.own_rows)
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
                rule=settings.rule,
                norm="none" if settings.norm == "l2_sequence" else settings.norm,
                weight_decay=settings.weight_decay,
                backend=settings.backend,
            )
            if settings.norm == "l2_sequence":
                self._project_sequences(group)

    def _count(self, grads: list[Tensor], tokens: Tensor) -> None:
        """Count, on the device, the rows whose gradient at this step is not finite."""
        device, norms = self.index.device, []
        for grad in grads:
            wide = torch.promote_types(grad.dtype, torch.float32)  # where a row of finite numbers has a finite norm
            norms.append(torch.linalg.vector_norm(grad, dim=-1, dtype=wide).to(device))
        own = tokens.to(device)
        finite = torch.stack(norms).isfinite()[:, own.clamp(min=0)]
        wrong = (~finite & (own >= 0)).any(2).sum(1, dtype=torch.int32)
        self.nonfinite.index_copy_(0, self.index - 1, wrong[None])

    def _live(self, tokens: Tensor) -> Tensor:
        """`tokens` [R, K] without those of examples that have stopped: such rows are left as they are."""
        if self.settings.stop_below is None:
            return tokens
        return torch.where(self.done[self.row_example][:, None], -1, tokens)

    def _project_sequences(self, group: Group) -> None:
        for k, delta in enumerate(group.delta):
            norms = self._sequence_norms(delta)
            radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k]
            group.norms[k].copy_(norms)
            group.clipped[k] += (norms > radius).sum()
            delta.div_((norms / radius).clamp(min=1)[:, None])

    # ---- copies of another size, for captured graphs -----------------------------------------------------------

    def padded(self, rows: int) -> AttackState:
        """A copy with `rows` rows, of which those beyond this state's belong to no token and stay where they are."""
        other = copy.copy(self)
        other.rows, other.history = rows, {}
        for name, value in self._own.items():
            setattr(other, name, value.new_empty((rows, *value.shape[1:]) if name in _BY_ROW else value.shape))
        other.groups = []
        for group in self.groups:
            room: dict[str, Any] = {
                name: value.new_empty((value.shape[0], rows, *value.shape[2:]) if value.dim() > 1 else value.shape)
                for name, value in group.tensors.items()
            }
            other.groups.append(replace(group, **room))
        self.fill(other)
        return other

    def fill(self, other: AttackState) -> None:
        """Write this state to the tensors of `other`, which has as many rows or more; the history is left alone."""
        for name, value in self._own.items():
            room = getattr(other, name)
            if name in _BY_ROW:
                room[: self.rows].copy_(value)
                room[self.rows :].fill_(_BY_ROW[name])
            else:
                room.copy_(value)
        for group, into in zip(self.groups, other.groups, strict=True):
            for name, value in group.tensors.items():
                room = getattr(into, name)
                if value.dim() > 1:
                    room[:, : self.rows].copy_(value)
                    room[:, self.rows :].fill_(1 if name == "epsilon" else 0)
                else:
                    room.copy_(value)

    @property
    def _own(self) -> dict[str, Tensor]:
        """The tensors that a step reads, but for the groups'."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "grid"}

    @property
    def bytes(self) -> int:
        """The memory of all that a step reads."""
        tensors = [*self._own.values(), *(value for group in self.groups for value in group.tensors.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def take(self, found: AttackState) -> None:
        """What a loop on a padded copy of this state has found, copied out."""
        self.history = {name: value.clone() for name, value in found.history.items()}
        self.nonfinite = found.nonfinite.clone()
        for group, other in zip(self.groups, found.groups, strict=True):
            group.delta = other.delta[:, : self.rows].clone()
            group.norms = other.norms[:, : self.rows].clone()
            group.clipped = other.clipped.clone()


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
