"""Run the last block's feed-forward over the few tokens that predict a label: what it gives for others is not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .facts import has_foreign_hooks, model_key, remembered
from .hooks import hooked
from .sites import Site, decoder_layers, hidden_of, in_block, with_hidden


@contextmanager
def trimmed(module: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Within it, `module` gets of its input [B, L, H] the rows `tokens` [n] (distinct numbers in 0..B*L-1) alone.

    Its output has its usual shape, with 0 at the other tokens.
    """
    shape: list[torch.Size] = []

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape[:] = [args[0].shape]
        return (args[0].flatten(0, -2).index_select(0, tokens.to(args[0].device))[None], *args[1:])

    def spread(_: nn.Module, args: Any, output: Any) -> Any:
        few = hidden_of(output)
        rows, width = shape[0][:-1], few.shape[-1]
        every = few.new_zeros(rows.numel(), width).index_copy(0, tokens.to(few.device), few.reshape(-1, width))
        return with_hidden(output, every.view(*rows, width) if few.dim() > 2 else every)

    with hooked(after=[(module, spread)], before=[(module, select)]):
        yield


def trimmable(model: nn.Module, sites: Sequence[Site]) -> nn.Module | None:
    """The last block's feed-forward, where no site is in it and it treats every token by itself; None elsewhere.

    The latter is found out on a few tokens, once for a state of the model (`facts.model_key`). None also where others
    have hooks in it, which may go by a token's place: a few tokens do not show that.
    """
    try:
        layers = decoder_layers(model)
        module = in_block(layers[-1], len(layers) - 1, "mlp")
    except ValueError:
        return None
    inside = {id(child) for child in module.modules()}
    if any(id(site.module) in inside for site in sites) or any(map(has_foreign_hooks, module.modules())):
        return None
    exact = remembered(
        model, "the last feed-forward treats tokens alone", model_key(model), partial(_tried, model, module)
    )
    return module if exact else None


def _tried(model: nn.Module, module: nn.Module) -> bool:
    try:
        return _by_token(model, module)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError):  # the module is not called with hidden states
        return False


@torch.no_grad()
def _by_token(model: nn.Module, module: nn.Module) -> bool:
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.arange(1, 9, device=device).view(2, 4)
    tokens = torch.tensor([1, 3, 6], device=device)
    whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[tokens]
    with trimmed(module, tokens):
        few = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[tokens]
    # a product with fewer rows may round otherwise
    if bool((whole - few).abs().max() > 16 * torch.finfo(whole.dtype).eps * whole.abs().max()):
        return False
    alone, beside = (_outputs(model, module, ids, tokens, other) for other in (1.0, -8.0))
    # with as many rows nothing rounds otherwise, in half precision either
    return bool((alone - beside).abs().max() <= 16 * torch.finfo(torch.float32).eps * alone.abs().max())


def _outputs(model: nn.Module, module: nn.Module, ids: Tensor, tokens: Tensor, other: float) -> Tensor:
    """[n, H] what `module` gives for `tokens` when its inputs at all other tokens are scaled by `other`."""
    seen: list[Tensor] = []

    def scale(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        flat = args[0].flatten(0, -2)
        scaled = (flat * other).index_copy(0, tokens.to(flat.device), flat[tokens.to(flat.device)])
        return (scaled.view(args[0].shape), *args[1:])

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(hidden_of(output).flatten(0, -2)[tokens.to(hidden_of(output).device)].float())

    with hooked(after=[(module, keep)], before=[(module, scale)]):
        model(input_ids=ids, use_cache=False)
    return seen[0]
