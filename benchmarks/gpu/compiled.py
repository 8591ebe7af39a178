"""torch.compile where the attack leaves room for it: whole blocks, and in blocks with hooks the parts between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lpa_kernels.model.sites import decoder_layers, resolve_sites


@contextmanager
def compiled_blocks(model: nn.Module, sites: Sequence[str], backend: str = "inductor") -> Iterator[None]:
    """Within it, the forwards of decoder blocks are compiled.

    Hooks on a module run outside of its compiled forward. A block with a site inside, and the last one, whose
    feed-forward is trimmed by hooks, are therefore compiled in parts: each of their children by itself.
    """
    layers = list(decoder_layers(model))
    hooked = {site.layer for site in resolve_sites(model, sites)} | {len(layers) - 1}
    parts = [part for index, layer in enumerate(layers) for part in (layer.children() if index in hooked else [layer])]
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 4 * len(parts)  # one code for all blocks, should a guard tell them apart
    try:
        for part in parts:
            part.__dict__["forward"] = torch.compile(part.forward, backend=backend, dynamic=False)
        yield
    finally:
        for part in parts:
            part.__dict__.pop("forward", None)
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
