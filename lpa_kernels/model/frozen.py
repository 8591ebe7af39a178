"""Run the blocks below the lowest attacked one once an attack: nothing under them changes between inner steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .facts import has_foreign_hooks, model_key, remembered
from .hooks import forwards, hooked
from .modes import as_if_trained
from .sites import Site, decoder_layers


def frozen_depth(sites: Sequence[Site]) -> int:
    """How many of the lowest blocks no site perturbs, nor anything before them; 0 where the embedding is attacked."""
    layers = [site.layer for site in sites]
    return min((layer for layer in layers if layer is not None), default=0) if None not in layers else 0


class Replay:
    """Stands for a block's forward: whatever comes in, `output`, which the last frozen block gave in the first pass."""

    def __init__(self) -> None:
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, (tuple, list)):
        return type(output)(_detached(part) for part in output)
    return output


@torch.no_grad()
def can_freeze(model: nn.Module, depth: int) -> bool:
    """Whether replaying the lowest `depth` blocks leaves the logits of a few tokens bitwise the same.

    Found out once for a state of the model (`facts.model_key`). A model that raises an error when it is asked may not,
    nor one with hooks of others on these blocks, which would run once more on what is replayed.
    """
    return remembered(model, "blocks replay", (model_key(model), depth), partial(_replays, model, depth))


def _replays(model: nn.Module, depth: int) -> bool:
    try:
        if any(map(has_foreign_hooks, list(decoder_layers(model))[:depth])):
            return False
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        ids = torch.arange(1, 5, device=device)[None]
        with as_if_trained(model), frozen_blocks(model, depth):
            first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        return torch.equal(first, second)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what such passes break is run in full, every step
        return False


@contextmanager
def frozen_blocks(model: nn.Module, depth: int) -> Iterator[Replay]:
    """From the second pass on, the lowest `depth` blocks hand on what the last of them gave in the first.

    Yields what they hand on, which may be exchanged after the first pass.

    Exact where a block passes nothing to later ones but its output; `can_freeze` finds that out.
    """
    blocks = list(decoder_layers(model))[:depth]
    replay = Replay()
    with ExitStack() as replaced:

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if replay.output is None:
                replay.output = _detached(output)
                replaced.enter_context(forwards((block, replay) for block in blocks))

        with hooked([(blocks[-1], record)]):
            yield replay
