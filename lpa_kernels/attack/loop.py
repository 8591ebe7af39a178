"""The fast inner loop: one pass a step, the rows that matter, every site in one update, nothing read by the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..model.facts import say_once
from ..model.frozen import frozen_blocks
from ..model.head import output_head, plain_head
from ..model.perturbation import fixed_rows, gradients, perturbed
from ..model.sharding import is_sharded, left_out
from ..model.sites import Site
from ..model.trim import trimmable, trimmed
from ..ops import gather_grad, linear_token_loss, token_loss_
from .base_model import adapters_off
from .layout import Layout
from .objective import loss_scale
from .passes import layout_hidden, layout_logits
from .settings import AttackSettings
from .state import AttackState

CHUNK_FROM = 1 << 27  # logits (N x V) from which the head is run in chunks


class Forward(Protocol):
    """A forward pass of a layout under perturbations, ready to be differentiated.

    Attributes:
        row_tokens: [R, K] int64, the tokens of its gradients that each row of the perturbation is added to, -1 = none.
    """

    row_tokens: Tensor

    def __call__(self, deltas: Sequence[Tensor], hidden: bool) -> AbstractContextManager[Differentiable]:
        """The pass with one delta [R, H] a site. hidden: up to the head's inputs, not to the logits."""


class Differentiable(NamedTuple):
    """What a pass gives.

    Attributes:
        gradients: from (an output made of the pass's, its gradient) to one gradient [T, H] a site.
        logits: [N, V], which the caller may overwrite; None of a pass up to the head's inputs.
        hidden: [N, H], the head's inputs; None of a pass up to the logits.
    """

    gradients: Callable[[Tensor, Tensor], list[Tensor]]
    logits: Tensor | None = None
    hidden: Tensor | None = None


class HookedForward:
    """`Forward` through the model's own code: hooks perturb the sites and autograd differentiates.

    Attributes:
        last: the last block's feed-forward, to be run on `needed` tokens [n] alone; None where all are needed.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], layout: Layout, backend: str) -> None:
        self.model, self.sites, self.layout, self.backend = model, sites, layout, backend
        self.row_tokens = layout.row_tokens
        self.last: nn.Module | None = None
        self.needed: Tensor | None = None

    def trim(self) -> None:
        """Leave out what the last block computes for tokens that predict nothing."""
        self.last = trimmable(self.model, self.sites)
        if self.last is not None and len(self.layout.labels):
            self.needed = self.layout.scored_tokens

    @contextmanager
    def __call__(self, deltas: Sequence[Tensor], hidden: bool) -> Iterator[Differentiable]:
        kept: dict[str, Tensor] = {}
        few = nullcontext() if self.last is None or self.needed is None else trimmed(self.last, self.needed)
        with few, perturbed(self.sites, deltas, fixed_rows(self.layout.token_rows), kept, self.backend):

            def taken(output: Tensor, grad: Tensor) -> list[Tensor]:
                return gradients(output, [kept[site.name] for site in self.sites], grad)

            if hidden:
                yield Differentiable(taken, hidden=layout_hidden(self.model, self.layout))
            else:
                yield Differentiable(taken, logits=layout_logits(self.model, self.layout))


class StepLosses(NamedTuple):
    """The losses of a step and what its gradients are taken by.

    Attributes:
        output, grad: what to differentiate, and its gradient.
        losses: [N] float32 of the labels. hits: [N] bool, whether a label is the most probable token.
        kl: [] the divergence from the clean model, where it is a term.
        scale: [] the factor by which gradients are too large, None for 1.
    """

    output: Tensor
    grad: Tensor
    losses: Tensor
    hits: Tensor
    kl: Tensor | None = None
    scale: Tensor | None = None


class InnerStep:
    """One inner step on fixed tensors: forward, losses, backward, update. Nothing in it waits for the device."""

    def __init__(
        self,
        model: nn.Module,
        settings: AttackSettings,
        state: AttackState,
        layout: Layout,
        forward: Forward,
        chunked: bool | None = None,
    ) -> None:
        self.model, self.settings, self.state, self.layout, self.forward = model, settings, state, layout, forward
        self.objective = settings.objective
        self.away = self.objective.scored_away(layout.rejected)
        self.chunked = _chunked(model, layout, settings) if chunked is None else chunked
        self.clean: Tensor | None = None
        self.reference: Tensor | None = None
        self.weights: Tensor | None = None

    def prepare(self) -> None:
        """What is computed once an attack, without the perturbation: reference and clean probabilities, weights."""
        objective, layout = self.objective, self.layout
        if objective.needs_reference:
            with torch.no_grad(), adapters_off(self.model):
                logits = layout_logits(self.model, layout)
                losses, _ = token_loss_(logits, layout.labels, self.away, backend=self.settings.backend)
            self.reference = objective.pair_gap(losses, layout.rejected, layout.example, layout.size)
        if "kl" in objective.terms:
            with torch.no_grad():
                self.clean = layout_logits(self.model, layout).float().log_softmax(-1)
        if objective.preference is None:
            self.weights = self._weights(torch.zeros(layout.labels.shape, device=layout.labels.device))

    def _weights(self, losses: Tensor) -> Tensor:
        """d objective / d loss of every row: constant, except for a preference loss."""
        leaf = losses.detach().requires_grad_()
        with torch.enable_grad():
            total, _ = self.objective.combine(leaf, *self._about_losses)
        return torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)

    @property
    def _about_losses(self) -> tuple[Any, ...]:
        """What `Objective.combine` takes beside the losses."""
        layout = self.layout
        return layout.rejected, layout.example, layout.size, self.state.counts, self.reference

    def __call__(self) -> None:
        """Run the step; the losses go into the state's history."""
        state = self.state
        with self.forward(state.deltas, self.chunked) as passed:
            if passed.hidden is not None:
                found = self._chunked_losses(passed.hidden)
            else:
                assert passed.logits is not None
                found = self._losses(passed.logits)
            grads = passed.gradients(found.output, found.grad)
        terms = self.objective.terms_of(found.losses, *self._about_losses)
        if found.kl is not None:
            terms["kl"] = found.kl
        terms["total"] = torch.stack([term.double() for term in terms.values()]).sum()
        tokens = self.forward.row_tokens
        if found.scale is not None:
            grads = [gather_grad(g, tokens.to(g.device)) / found.scale.to(g.device) for g in grads]
            tokens = state.own_rows
        if self.objective.l2_penalty:
            terms["l2_norm"] = self.objective.penalty(state.deltas, state.positions)
            grads, tokens = self._penalised(grads, tokens), state.own_rows
        state.record(terms, found.losses, found.hits, self.layout)
        state.update(grads, tokens)

    def _chunked_losses(self, hidden: Tensor) -> StepLosses:
        """From the head's inputs [N, H], without ever holding all logits."""
        head, layout = output_head(self.model), self.layout
        assert isinstance(head, nn.Linear)
        threshold, backend = self.objective.threshold, self.settings.backend
        losses, hits = linear_token_loss(
            hidden, head.weight, layout.labels, self.away, threshold, bias=head.bias, backend=backend
        )
        slope = self._weights(losses) if self.weights is None else self.weights
        scale = loss_scale(hidden.dtype, slope)
        return StepLosses(losses, slope if scale is None else slope * scale, losses.detach(), hits, None, scale)

    def _losses(self, logits: Tensor) -> StepLosses:
        """From logits [N, V]; the gradient takes their place, unless what made them needs them for its own backward."""
        labels, objective, backend = self.layout.labels, self.objective, self.settings.backend
        kl_share = objective.coefs.get("kl", 0) / max(len(labels), 1)
        # `.data`: after a write to `.detach()`, autograd copies the gradient of a view of the logits
        grad = logits.data.clone() if _saved(logits) else logits.data
        kl = extra = None
        if self.clean is not None:
            log_probs = grad.float().log_softmax(-1)
            kl = (self.clean.exp() * (self.clean - log_probs)).sum(-1).mean()
            extra = (log_probs.exp() - self.clean.exp()) * kl_share
        weights = self.weights
        if weights is None:
            weights = self._weights(token_loss_(grad, labels, self.away, None, objective.threshold, backend=backend)[0])
        scale = loss_scale(grad.dtype, weights, weights.new_full((1,), kl_share))
        if scale is not None:
            weights = weights * scale
            extra = None if extra is None else extra * scale
        losses, hits = token_loss_(grad, labels, self.away, weights, objective.threshold, backend=backend)
        if extra is not None:
            grad += extra.to(grad.dtype)
        return StepLosses(logits, grad, losses, hits, kl, scale)

    def _penalised(self, grads: list[Tensor], tokens: Tensor) -> list[Tensor]:
        """Row gradients [R, H] with that of the penalty: delta / norm2(delta), 0 at 0."""
        rows = []
        for grad, delta in zip(grads, self.state.deltas, strict=True):
            values = delta.float()
            norm = torch.linalg.vector_norm(values)
            unit = torch.where(norm > 0, values / norm, torch.zeros_like(values))
            scale = self.objective.l2_penalty / (self.state.positions.to(grad.device) * delta.shape[-1]).sqrt()
            rows.append(gather_grad(grad, tokens.to(grad.device)) + scale * unit)
        return rows


def _chunked(model: nn.Module, layout: Layout, settings: AttackSettings) -> bool:
    """Whether the head is run in chunks, each with its loss."""
    size = layout.labels.shape[0] * getattr(output_head(model), "out_features", 0)
    # the chunked head's products know no autocast
    whole = "kl" in settings.objective.terms or settings.autocast is not None
    if size < CHUNK_FROM or whole:
        return False
    if is_sharded(model):  # and it depends on this rank's batch, so that no pass may be made to find out
        say_once(model, left_out(model, f"the head makes all of its {size / 1e6:.0f}M logits at once, not in chunks"))
        return False
    return plain_head(model)


def _saved(logits: Tensor) -> bool:
    """Whether the operation that made the logits keeps them for its backward (a tanh does, a product does not).

    One that is written in Python, or compiled, may.
    """
    base = logits._base if logits._is_view() else logits
    if base is None or isinstance(base.grad_fn, torch.autograd.function.BackwardCFunction):
        return True
    return hasattr(base.grad_fn, "_saved_result")


def run(
    model: nn.Module, settings: AttackSettings, state: AttackState, layout: Layout, forward: Forward, depth: int = 0
) -> None:
    """The inner loop on a layout. `state` is changed in place.

    Args:
        forward: the pass of each step.
        depth: how many of the lowest blocks of the model are run once, since no site stands before or in them.
    """
    step = InnerStep(model, settings, state, layout, forward)
    step.prepare()
    with ExitStack() as stack:
        if depth:
            stack.enter_context(frozen_blocks(model, depth))
        for _ in range(settings.steps):
            step()
