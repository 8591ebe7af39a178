"""What an inner loop carries from step to step, all of it on the device: perturbations, moments, losses, counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import pgd_update_
from .attack import LatentAttack
from .batch import PairBatch
from .objective import PairRows

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


class AttackState:
    """The state of one inner loop; `update` is one step of it."""

    def __init__(self, pgd: LatentPGD, batch: PairBatch, counts: tuple[float, float] | None = None) -> None:
        device = batch.grid.device
        self.grid = batch.grid
        self.row_example = batch.attack_mask.nonzero()[:, 0]
        self.rows = self.row_example.shape[0]
        self.size = len(batch)
        toward, away = counts or batch.counts
        self.counts = (max(float(toward), 1.0), max(float(away), 1.0))
        self.own_rows = torch.arange(self.rows, device=device)[:, None]
        self.step = torch.zeros((), dtype=torch.float32, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.done = torch.zeros(self.size, dtype=torch.bool, device=device)
        self.history: dict[str, Tensor] = {}
        self.stop_below = pgd.stop_below
        self.steps = pgd.steps
        widths = pgd.widths()
        self.elements = batch.attack_mask.numel() * widths[-1][0]
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

    def set_relative_radius(self, epsilon: float, hidden_norms: Tensor) -> None:
        """Radii relative to the norms [S, R] of the hidden states that are perturbed."""
        for group in self.groups:
            group.epsilon = (epsilon * hidden_norms[group.sites]).to(group.delta.device).contiguous()

    def start_randomly(self, norm: str, generator: torch.Generator | None) -> None:
        """Uniform in the ball: of each row for "l2", of each coordinate for "linf"; site by site, in order."""
        for group in self.groups:
            for k, delta in enumerate(group.delta):
                radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k][:, None]
                device = delta.device if generator is None else generator.device
                if norm == "linf":
                    noise = torch.rand(delta.shape, generator=generator, device=device) * 2 - 1
                else:
                    noise = torch.randn(delta.shape, generator=generator, device=device)
                    length = torch.rand(delta.shape[0], 1, generator=generator, device=device) ** (1 / delta.shape[1])
                    noise = noise / noise.norm(dim=-1, keepdim=True) * length
                delta.copy_(noise.to(delta.device) * radius)

    def live(self, tokens: Tensor) -> Tensor:
        """`tokens` [R, K] without those of examples that have stopped: such rows are left as they are."""
        if self.stop_below is None:
            return tokens
        return torch.where(self.done[self.row_example][:, None], -1, tokens)

    def record(self, terms: dict[str, Tensor], losses: Tensor, hits: Tensor, rows: PairRows) -> None:
        """Write this step's terms and accuracies into the history, on the device; mark the examples that may stop."""
        for name, mask in (("toward_accuracy", rows.rejected), ("away_accuracy", ~rows.rejected)):
            terms[name] = torch.where(mask, hits, False).sum() / mask.sum().clamp(min=1)
        for name, value in terms.items():
            if name not in self.history:
                self.history[name] = torch.zeros(self.steps, dtype=value.dtype, device=self.index.device)
            self.history[name].index_copy_(0, self.index, value.detach().reshape(1).to(self.index.device))
        if self.stop_below is not None:
            toward = rows.rejected & (rows.labels != -100)
            zeros = torch.zeros(self.size, device=losses.device)
            total = zeros.index_add(0, rows.example, torch.where(toward, losses, 0))
            tokens = zeros.index_add(0, rows.example, toward.float())
            self.done |= total / tokens.clamp(min=1) < self.stop_below

    def update(self, pgd: LatentPGD, grads: list[Tensor], tokens: Tensor) -> None:
        """One update of every site. grads: one [T, H] a site; tokens: [R, K], the tokens of each row."""
        tokens = self.live(tokens)
        if pgd.clip_grad is not None:
            grads, tokens = pgd.clip_jointly(grads, tokens), self.live(self.own_rows)
        self.step += 1
        self.index += 1
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

    def _project_sequences(self, group: Group) -> None:
        example = self.row_example.to(group.delta.device)
        for k, delta in enumerate(group.delta):
            squares = delta.new_zeros(self.size, dtype=torch.float32)
            norms = squares.index_add(0, example, delta.float().square().sum(-1)).sqrt()[example]
            radius = group.epsilon if group.epsilon.dim() == 0 else group.epsilon[k]
            group.norms[k].copy_(norms)
            group.clipped[k] += (norms > radius).sum()
            delta.div_((norms / radius).clamp(min=1)[:, None])

    def finish(self, pgd: LatentPGD, plan: Plan) -> LatentAttack:
        """The attack that this loop has found."""
        device = self.grid.device
        epsilon: float | Tensor = float(pgd.epsilon)
        if self.groups[0].epsilon.dim():
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
        )
