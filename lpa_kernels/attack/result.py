"""What an inner loop returns: the perturbations of one batch, what they achieved, and how to apply them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.hooks import not_compiled
from ..model.perturbation import ablated, ablating_hook, grid_rows, kept_for_recompute, perturbed, perturbing_hook
from ..model.sites import Site
from .batch import PairBatch
from .layout import Layout, pack, unshared

ENGINE_WORDS = {
    "stack": "the frozen decoder forward and backward by hand",
    "packed": "the model's own code on rows that hold a prompt once",
    "unshared": "the model's own code on rows of one text each",
    "alone": "the model's own code, one text a pass",
    "reference": "the model's own code, two passes a step",
}


@dataclass
class AttackResult:
    """The perturbations found for one batch. Several may live side by side; each is applied to its own batch.

    Attributes:
        sites: where the perturbations are added.
        deltas_by_row: one [R, H] float32 tensor a site, a row an attacked position; zeros where a direction is ablated.
        grid: [B, La] int64, the row of each position of each example, -1 where it is not attacked.
        epsilon: the radius, a number (infinite without a ball) or one a row ([S, R]).
        history: by name, a [steps] tensor on the device: "toward", "away", "total" and what else the objective logs,
            and "toward_accuracy", "away_accuracy": the share of completion tokens that are the most probable. Empty
            for an adversary without inner steps.
        row_norms: [S, R] float32, each row's norm after the last step and before its projection.
        clipped: [S] int32, how many rows the projections shortened, over all steps.
        engine: which engine ran ("stack", "packed", "unshared", "alone", "reference"), and `reason` why no faster one.
        layout: how the batch was laid out for one pass, None for "alone" and "reference".
        batch: the attacked one; `LatentPGD.rows` takes no other.
        model: the attacked one; its checkpointed blocks run under the perturbations again for their gradients.
        backend: of the op that adds the perturbations.
        captured: "yes" where the steps were replays of a captured graph, else why not.
        kernels: the backend of each op that the steps called, and why not a faster one; empty where they were replayed.
        enabled: False makes `applied` and hooks do nothing.
        ablated: of adversary "ablate", one unit direction [H] a site, which is projected out.
        acting: [S, R] bool, where it is.
    """

    sites: list[Site]
    deltas_by_row: list[Tensor] = field(repr=False)
    grid: Tensor = field(repr=False)
    epsilon: float | Tensor = field(repr=False)
    history: dict[str, Tensor] = field(repr=False)
    row_norms: Tensor = field(repr=False)
    clipped: Tensor = field(repr=False)
    engine: str = "reference"
    reason: str = ""
    layout: Layout | None = field(default=None, repr=False)
    batch: PairBatch | None = field(default=None, repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    backend: str = field(default="auto", repr=False)
    captured: str = "the engine is 'reference'"
    kernels: dict[str, str] = field(default_factory=dict, repr=False)
    enabled: bool = True
    ablated: list[Tensor] | None = field(default=None, repr=False)
    acting: Tensor | None = field(default=None, repr=False)
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """The sites' names."""
        return [site.name for site in self.sites]

    def delta(self, name: str) -> Tensor:
        """The perturbation of one site by position: [B, La, H] float32, zeros where nothing is attacked."""
        rows = self.deltas_by_row[self.names.index(name)]
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # row -1 is the zero row
        return padded[self.grid.to(rows.device)]

    @property
    def deltas(self) -> dict[str, Tensor]:
        """Every site's perturbation by position, [B, La, H] float32."""
        return {name: self.delta(name) for name in self.names}

    @property
    def losses(self) -> list[dict[str, float]]:
        """The losses of every inner step, before its update; read from the device once."""
        if "losses" not in self._read:
            names = list(self.history)
            table = torch.stack([self.history[name].float() for name in names], 1).tolist() if names else []
            self._read["losses"] = [dict(zip(names, row, strict=True)) for row in table]
        return self._read["losses"]

    @property
    def norms(self) -> dict[str, Tensor]:
        """The Euclidean norm of every attacked row at each site, [R] float32."""
        return {site.name: d.float().norm(dim=-1) for site, d in zip(self.sites, self.deltas_by_row, strict=True)}

    @property
    def boundary_fraction(self) -> float:
        """The share of the rows that moved, over all sites, that are at the boundary of their ball."""
        reached = self.row_norms >= self.epsilon * (1 - 1e-4)  # a row that was brought back is there up to rounding
        return float(reached.sum() / (self.row_norms > 0).sum().clamp(min=1))

    @property
    def padding_share(self) -> float | None:
        """The share of the one pass's places that held no token; None for the reference engine. Reads the device."""
        return None if self.layout is None else self.layout.padding_share

    def explain(self) -> str:
        """How the batch was run, in lines: the engine, the backend of each op, and why no faster one.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lpa_kernels import LatentPGD
        >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **shape))
        >>> ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]])
        >>> batch = PairBatch(ids, mask, ids.flip(0) + 1, mask, torch.ones(1, 4, dtype=torch.bool))
        >>> print(LatentPGD(model, "embedding", steps=2, backend="reference").attack(batch).explain())
        engine: stack, the frozen decoder forward and backward by hand
        captured: no, ...
        add_norm: reference
        ...
        """
        lines = [f"engine: {self.engine}, {ENGINE_WORDS[self.engine]}"]
        if self.reason:
            lines.append(f"not a faster one: {self.reason}")
        lines.append("captured: yes" if self.captured == "yes" else f"captured: no, {self.captured}")
        return "\n".join(lines + [f"{op}: {backend}" for op, backend in sorted(self.kernels.items())])

    def to(self, device: torch.device | str) -> AttackResult:
        """Move the perturbations, to keep many attacks off the GPU between their uses; returns this attack."""
        self.deltas_by_row = [d.to(device) for d in self.deltas_by_row]
        if self.layout is not None:
            self.layout.masks.clear()  # [B, 1, L, L] each; made again when they are asked for
        return self

    def part(self, start: int, stop: int, batch: PairBatch) -> AttackResult:
        """The attack on the examples start .. stop - 1 alone, which are `batch`: views of the same perturbations.

        History and `clipped` are the whole's; an example's perturbation does not depend on the others.
        """
        first, last = (int((self.grid[:end] >= 0).sum()) for end in (start, stop))
        layout = None
        if self.layout is not None:
            position = self.layout.first_position
            layout = pack(batch, first_position=position) if self.layout.packed else unshared(batch)
        return replace(
            self,
            deltas_by_row=[d[first:last] for d in self.deltas_by_row],
            grid=batch.grid,
            epsilon=self.epsilon[:, first:last] if isinstance(self.epsilon, Tensor) else self.epsilon,
            row_norms=self.row_norms[:, first:last],
            acting=None if self.acting is None else self.acting[:, first:last],
            layout=layout,
            batch=batch,
            _read={},
        )

    @contextmanager
    def applied(self, rows: Any = None) -> Iterator[None]:
        """While active, the model answers under this attack: plain calls on either text of the attacked batch.

        A backward pass may follow after it: blocks whose activations are checkpointed within run under it once more.
        A model that is compiled runs uncompiled within: compiled code does not see hooks.

        Args:
            rows: for engines: how the tokens of a pass map to rows; by default by their positions.
        """
        under = partial(self.perturbing, rows or grid_rows(self.grid))
        with under() if self.model is None else kept_for_recompute(self.model, under):
            yield

    @contextmanager
    def perturbing(self, rows: Any) -> Iterator[None]:
        """The perturbations alone, on tokens that map to `rows`; nothing where the attack is not `enabled`."""
        if not self.enabled:
            yield
            return
        if self.ablated is not None and self.acting is not None:
            on = ablated(self.sites, self.ablated, self.acting, rows)
        else:
            on = perturbed(self.sites, self.deltas_by_row, rows, backend=self.backend)
        with not_compiled(), on:
            yield

    def hook(self, site: str | None = None) -> Any:
        """A plain forward hook with one site's perturbation, for any module: `module.register_forward_hook(...)`."""
        index = 0 if site is None else self.names.index(site)
        by_position = grid_rows(self.grid)
        name, rows = self.names[index], lambda h: by_position(h) if self.enabled else None
        if self.ablated is not None and self.acting is not None:
            return ablating_hook(name, self.ablated[index], self.acting[index], rows)
        return perturbing_hook(name, lambda: self.deltas_by_row[index], rows, backend=self.backend)
