"""One pass of a model over a batch: text by text, or over a layout, and the rows that predict completion tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.head import logits_of, selected_rows
from ..model.perturbation import kept_for_recompute
from .batch import PairBatch
from .layout import PADDING, Kept, Layout, text_lengths
from .masks import packed_masks


@dataclass(frozen=True)
class PairRows:
    """The rows of logits that predict completion tokens, rejected ones first, both in row-major order.

    Attributes:
        logits: [N, V].
        labels: [N] int64.
        rejected: [N] bool.
        example: [N] int64, which pair of the batch.
        size: pairs in the batch.
    """

    logits: Tensor
    labels: Tensor
    rejected: Tensor
    example: Tensor
    size: int


def text_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [n, V] before each True of mask [B, L], from one plain pass over ids [B, L]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    row, before = mask[:, 1:].nonzero(as_tuple=True)  # autograd keeps these, and may not keep a caller's inference mask
    return logits[row, before]


def text_rows(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """`text_logits` with the head on these rows alone."""
    row, before = mask[:, 1:].nonzero(as_tuple=True)
    with selected_rows(model, (ids.shape[0], ids.shape[1]), row * ids.shape[1] + before):
        return logits_of(model(input_ids=ids, use_cache=False))


class Texts(NamedTuple):
    """What one plain pass runs over: a completion's texts of all pairs as they are, or a single text up to its end.

    Attributes:
        rows: which pairs. ids: [n, L] int64. mask: [n, L] bool, True at the labels.
    """

    rows: slice
    ids: Tensor
    mask: Tensor


def texts(batch: PairBatch, halves: tuple[bool, bool] = (True, True), alone: bool = False) -> Iterator[Texts]:
    """The plain passes over a batch, those of rejected completions first.

    Args:
        halves: whether those of the rejected and of the chosen completion are wanted.
        alone: every text in a pass of its own, up to its last label.
    """
    for name, wanted in zip(("rejected", "chosen"), halves, strict=True):
        ids, mask = getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_mask")
        if wanted and not alone:
            yield Texts(slice(None), ids, mask)
        for i, last in enumerate(text_lengths(mask).tolist() if wanted and alone else ()):
            yield Texts(slice(i, i + 1), ids[i : i + 1, : last + 1], mask[i : i + 1, : last + 1])


def two_pass_rows(
    model: nn.Module,
    batch: PairBatch,
    halves: tuple[bool, bool] = (True, True),
    alone: bool = False,
    under: Callable[[Tensor], AbstractContextManager[Any]] | None = None,
) -> PairRows:
    """The rows of a batch from one plain pass for each completion, or for each text.

    Args:
        halves, alone: see `texts`.
        under: from a pass's part of the batch's grid to what the pass runs under, and its blocks again where their
            activations are checkpointed.
    """
    grid, logits = batch.grid, []
    for one in texts(batch, halves, alone):
        with nullcontext() if under is None else kept_for_recompute(model, partial(under, grid[one.rows])):
            logits.append(text_logits(model, one.ids, one.mask))
    labels, rejected, example = [], [], []
    for name, wanted in zip(("rejected", "chosen"), halves, strict=True):
        if wanted:
            labels.append(batch.labels(name))
            rejected.append(torch.full_like(labels[-1], name == "rejected", dtype=torch.bool))
            example.append(getattr(batch, f"{name}_mask")[:, 1:].nonzero()[:, 0])
    return PairRows(torch.cat(logits), torch.cat(labels), torch.cat(rejected), torch.cat(example), len(batch))


def layout_logits(model: nn.Module, layout: Layout) -> Tensor:
    """[N, V]: the logits that predict a layout's labels, from one pass; the head runs on these rows alone."""
    with selected_rows(model, layout.shape, layout.places):
        return logits_of(_run(model, layout))


def layout_hidden(model: nn.Module, layout: Layout) -> Tensor:
    """[N, H]: the hidden states that the head would make `layout_logits` of."""
    with selected_rows(model, layout.shape, layout.places, run_head=False) as rows:
        _run(model, layout)
    assert rows.hidden is not None
    return rows.hidden


def layout_rows(model: nn.Module, layout: Layout) -> PairRows:
    """The rows of a layout's batch from one pass."""
    return PairRows(layout_logits(model, layout), layout.labels, layout.rejected, layout.example, layout.size)


def layout_inputs(layout: Layout) -> dict[str, Any]:
    """What a model is called with for a layout. On tokens alone the library takes its fastest causal attention."""
    if not layout.packed:
        return {"input_ids": layout.input_ids}
    positions = layout.position_ids + layout.first_position if layout.first_position else layout.position_ids
    inputs = {"input_ids": layout.input_ids, "attention_mask": layout.attention_mask, "position_ids": positions}
    if layout.before is not None:
        cache = copy(layout.before.cache)  # a pass adds its own to one
        cache.layers = [copy(layer) for layer in cache.layers]
        inputs |= {"attention_mask": (layout.keys[0] != PADDING).long(), "past_key_values": cache}
    return inputs


def _run(model: nn.Module, layout: Layout) -> Any:
    """What the model returns for a layout's tokens."""
    with packed_masks(layout) if layout.packed else nullcontext():
        return model(**layout_inputs(layout), use_cache=False)


@torch.no_grad()
def without_prefix(model: nn.Module, layout: Layout) -> Layout:
    """A packed layout without the columns before the first that is attacked or scored, which are run here, once.

    Exact where a model's cache holds keys and values of all tokens, and nothing else. Reads the device once.
    """
    index = torch.arange(layout.shape[1], device=layout.branch.device).expand(layout.shape)
    used = (layout.token_rows >= 0).index_fill(0, layout.places, True).view(layout.shape)
    kept = int(torch.where(used, index, layout.shape[1]).amin())
    if kept in (0, layout.shape[1]):
        return layout
    first = layout.columns(slice(0, kept))
    with selected_rows(model, first.shape, layout.places.new_zeros(1)), packed_masks(first):
        cache = model(**layout_inputs(first), use_cache=True).past_key_values
    return replace(layout.columns(slice(kept, None)), before=Kept(first.branch, first.position_ids, cache))


@contextmanager
def layout_pass(model: nn.Module, layout: Layout) -> Iterator[dict[str, Any]]:
    """For passes that others run: within it `model` may be called with what is yielded, and `use_cache=False`.

    A backward pass may follow after it, through checkpointed activations too.
    """
    if not layout.packed:
        yield layout_inputs(layout)
        return
    with kept_for_recompute(model, partial(packed_masks, layout)):
        yield layout_inputs(layout)
