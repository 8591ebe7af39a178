"""Run the blocks below the lowest attacked one once an attack: nothing under them changes between inner steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

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


_exact: WeakKeyDictionary[nn.Module, dict[tuple[int, int], bool]] = WeakKeyDictionary()


@torch.no_grad()
def can_freeze(model: nn.Module, depth: int) -> bool:
    """Whether replaying the lowest `depth` blocks leaves the logits of a few tokens bitwise the same.

    Cached by the depth and the number of hooks in those blocks. A model that raises an error when it is asked may not.
    """
    known = _exact.setdefault(model, {})
    blocks = list(decoder_layers(model))[:depth]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for block in blocks for m in block.modules())
    if (depth, hooks) not in known:
        known[depth, hooks] = _replays(model, depth)
    return known[depth, hooks]


def _replays(model: nn.Module, depth: int) -> bool:
    try:
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        ids = torch.arange(1, 5, device=device)[None]
        with frozen_blocks(model, depth):
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
    own = [block.__dict__.get("forward") for block in blocks]

    def restore() -> None:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if replay.output is None:
            replay.output = _detached(output)
            for block in blocks:
                block.__dict__["forward"] = replay

    handle = blocks[-1].register_forward_hook(record)
    try:
        yield replay
    finally:
        handle.remove()
        restore()
