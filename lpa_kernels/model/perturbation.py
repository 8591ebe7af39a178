"""Add perturbations to the outputs of modules, by forward hooks, and keep what their gradients are taken by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import perturb
from .hooks import checkpoints, hooked
from .sites import Site, hidden_of, with_hidden

Rows = Callable[[Tensor], Tensor | None]


class _Tapped(torch.autograd.Function):
    """`perturb` with a fixed delta, whose backward hands the gradient of its result to `tap` too.

    The result itself cannot be differentiated by: models add to it in place (falcon's parallel attention does).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tap: Tensor, delta: Tensor, rows: Tensor, backend: str) -> Tensor:
        return perturb(hidden, delta, rows, backend=backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return grads[0], grads[0], None, None, None


def perturbing_hook(
    name: str, delta: Callable[[], Tensor], rows: Rows, keep: dict[str, Tensor] | None = None, backend: str = "auto"
) -> Any:
    """A forward hook that adds delta [R, H] to the module's hidden states [..., H], out of place.

    Args:
        delta: read at every call, so that it may be replaced between calls.
        rows: from the hidden states to the row of each of their tokens ([T] int64, -1: none), or None for a call
            that is to pass untouched.
        keep: where, by name, a tensor [T, H] goes whose gradient is that of the perturbed hidden states; that of the
            first call, since checkpointed blocks are called again by the backward pass. None where delta itself may
            want a gradient.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, name)
        index = rows(hidden)
        if index is None:
            return output
        flat = hidden.reshape(-1, hidden.shape[-1])
        values, index = delta().to(hidden.device), index.to(hidden.device)
        if keep is None:
            out = perturb(flat, values, index, backend=backend)
        else:
            tap = flat.new_zeros(()).expand(flat.shape).requires_grad_()  # no memory of its own
            keep.setdefault(name, tap)
            out = _Tapped.apply(flat, tap, values, index, backend)
        return with_hidden(output, out.view(hidden.shape))

    return hook


def ablating_hook(name: str, direction: Tensor, acting: Tensor, rows: Rows) -> Any:
    """A forward hook that takes the part along a unit direction [H] out of hidden states, in float32, out of place.

    Args:
        acting: [R] bool, the rows that it is taken out of. rows: as in `perturbing_hook`.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, name)
        index = rows(hidden)
        if index is None:
            return output
        flat, index = hidden.reshape(-1, hidden.shape[-1]), index.to(hidden.device)
        unit = direction.to(hidden.device, torch.float32)
        on = acting.to(hidden.device)[index.clamp(min=0)] & (index >= 0)
        part = torch.where(on, flat.float() @ unit, 0)[:, None] * unit
        return with_hidden(output, (flat.float() - part).to(flat.dtype).view(hidden.shape))

    return hook


def _same(delta: Tensor) -> Tensor:
    return delta


@contextmanager
def perturbed(
    sites: Sequence[Site],
    deltas: Sequence[Tensor],
    rows: Rows,
    keep: dict[str, Tensor] | None = None,
    backend: str = "auto",
) -> Iterator[None]:
    """While active, every site's output is perturbed by its delta [R, H].

    Where activations are checkpointed, the backward pass runs blocks again and must do so under this too.
    """
    pairs = zip(sites, deltas, strict=True)
    hooks = (
        (site.module, perturbing_hook(site.name, partial(_same, delta), rows, keep, backend)) for site, delta in pairs
    )
    with hooked(hooks, foreign=True):  # what is found out within it is of the perturbed model
        yield


@contextmanager
def ablated(sites: Sequence[Site], directions: Sequence[Tensor], acting: Tensor, rows: Rows) -> Iterator[None]:
    """While active, every site's output is without the part along its unit direction [H]. acting: [S, R] bool."""
    three = zip(sites, directions, acting, strict=True)
    hooks = ((site.module, ablating_hook(site.name, unit, on, rows)) for site, unit, on in three)
    with hooked(hooks, foreign=True):
        yield


@contextmanager
def kept_for_recompute(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """`context()` is on within, and again whenever a block that is checkpointed within runs for its gradients.

    For backward passes that run after the block ends. Covers the checkpointing of transformers' models and torch's
    `CheckpointWrapper`, which accelerate puts around blocks.
    """
    within = True

    def kept(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inputs: Any, **named: Any) -> Any:
                with ExitStack() as stack:
                    if not within:
                        stack.enter_context(context())
                    return function(*inputs, **named)

            return checkpoint(again, *args, **kwargs)

        return run

    with context(), checkpoints(model, kept):
        try:
            yield
        finally:
            within = False


def gradients(output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor | None = None) -> list[Tensor]:
    """d output / d inputs, as expanded zeros where an input takes no part.

    Raises:
        RuntimeError: none does.
    """
    found = torch.autograd.grad(output, inputs, grad_outputs=grad_output, allow_unused=True)
    if all(grad is None for grad in found):
        raise RuntimeError("no gradient reaches any site: something on the way to the logits detaches hidden states")
    return [i.new_zeros(()).expand(i.shape) if grad is None else grad for grad, i in zip(found, inputs, strict=True)]


def fixed_rows(token_rows: Tensor) -> Rows:
    """The same rows for every site of a pass whose tokens are token_rows' [T].

    Raises (when called):
        ValueError: a site has another number of tokens.
    """

    def rows(hidden: Tensor) -> Tensor:
        tokens = hidden.numel() // hidden.shape[-1]
        if tokens != token_rows.shape[0]:
            raise ValueError(f"a site has {tokens} tokens where the attack's pass has {token_rows.shape[0]}")
        return token_rows

    return rows


def rows_by_length(grid: Tensor, length: int) -> Tensor:
    """[B * length] the rows of the first `length` positions of grid [B, La], -1 where it does not reach."""
    short = grid[:, :length]
    return torch.nn.functional.pad(short, (0, length - short.shape[1]), value=-1).flatten()


def grid_rows(grid: Tensor) -> Rows:
    """Rows by position, for plain calls of a model on the attacked batch: grid [B, La] of `PairBatch.grid`.

    A call of one position alone (generation with a cache) passes untouched: the perturbation is already in the
    cached states.

    Raises (when called):
        ValueError: the batch has another size than the attack's.
    """
    size = len(grid)
    by_length: dict[int, Tensor] = {}

    def rows(hidden: Tensor) -> Tensor | None:
        batch = hidden.shape[0] if hidden.dim() > 2 else size
        length = hidden.numel() // hidden.shape[-1] // max(batch, 1)
        if length == 1:
            return None
        if batch != size:
            raise ValueError(f"the attack is on a batch of {size}; the model was called with a batch of {batch}")
        if length not in by_length:
            by_length[length] = rows_by_length(grid, length)
        return by_length[length]

    return rows
