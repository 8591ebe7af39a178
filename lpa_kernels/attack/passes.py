"""One pass of a model over a batch: text by text, or over a layout, and the rows that predict completion tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.head import logits_of, selected_rows
from ..model.modes import kept_flags
from .batch import PairBatch
from .layout import Layout
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


def two_pass_rows(model: nn.Module, batch: PairBatch, halves: tuple[bool, bool] = (True, True)) -> PairRows:
    """The rows of a batch from one plain pass for each completion.

    Args:
        halves: whether those of the rejected and of the chosen completion are wanted.
    """
    logits, labels, rejected, example = [], [], [], []
    for name, wanted in zip(("rejected", "chosen"), halves, strict=True):
        if not wanted:
            continue
        mask = getattr(batch, f"{name}_mask")
        logits.append(text_logits(model, getattr(batch, f"{name}_ids"), mask))
        labels.append(batch.labels(name))
        rejected.append(torch.full_like(labels[-1], name == "rejected", dtype=torch.bool))
        example.append(mask[:, 1:].nonzero()[:, 0])
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


def _run(model: nn.Module, layout: Layout) -> Any:
    """What the model returns for a layout's tokens. On plain ones the library chooses its fastest causal attention."""
    extra: dict[str, Tensor] = {}
    if layout.packed:
        extra = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
    with packed_masks(layout) if layout.packed else nullcontext():
        return model(input_ids=layout.input_ids, use_cache=False, **extra)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its adapters.

    Raises:
        ValueError: it has none, so that there is no reference model.
    """
    if not hasattr(model, "disable_adapter"):
        raise ValueError("the reference model is this one without adapters, and it has none; use reference_free=True")
    with kept_flags(model), model.disable_adapter():  # peft turns every adapter's requires_grad on at its end
        yield
