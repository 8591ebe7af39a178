"""Run the model's head over the few hidden states that predict a completion token, not over all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .masks import packed_masks
from .packing import PackedLayout


class SelectedRows:
    """The rows of one forward pass.

    Attributes:
        hidden: [N, H], the hidden states that predict the layout's labels, with their gradient; None before the pass.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None

    def logits(self, output: Any) -> Tensor:
        """[N, V], the logits of the layout's labels, from what the model returned."""
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = output[0]
        return logits.flatten(0, -2)


@contextmanager
def selected_rows(model: nn.Module, layout: PackedLayout, run_head: bool = True) -> Iterator[SelectedRows]:
    """Within it, the model's head gets the [1, N, H] hidden states that predict the layout's labels, not [B, L, H].

    Everything that the model does to its logits afterwards (scale, soft cap, a cast) stays its own code.

    Args:
        run_head: False hands on a single row, for callers that compute the loss from `.hidden` themselves.

    Raises:
        ValueError: the model has no output embeddings, or (from within the model) they get something other than
            [B, L, H].
    """
    rows = SelectedRows()
    places = layout.select_rows * layout.shape[1] + layout.select_positions

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        if hidden.dim() != 3 or tuple(hidden.shape[:2]) != layout.shape:
            raise ValueError(
                f"the head got hidden states of shape {tuple(hidden.shape)}; the layout's tokens are {layout.shape}"
            )
        # index_select, not [row, position]: its backward is one index_add
        rows.hidden = hidden.flatten(0, 1).index_select(0, places.to(hidden.device))
        return (rows.hidden[None] if run_head else rows.hidden[None, :1], *inputs[1:])

    handle = output_head(model).register_forward_pre_hook(select)
    try:
        yield rows
    finally:
        handle.remove()


def selected_logits(model: nn.Module, layout: PackedLayout, packed: bool = True, run_head: bool = True) -> Tensor:
    """[N, V]: one forward pass over the layout, and the logits that predict its labels.

    Args:
        packed: whether the layout is from `pack`; False calls the model plainly, with the tokens alone, which is
            right for `unshared` layouts and lets the library choose its fastest causal attention.
        run_head: False gives the hidden states [N, H] that the head would get.
    """
    extra: dict[str, Tensor] = {}
    if packed:
        extra = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
    with packed_masks(layout) if packed else nullcontext(), selected_rows(model, layout, run_head) as rows:
        logits = rows.logits(model(input_ids=layout.input_ids, use_cache=False, **extra))
    if run_head:
        return logits
    assert rows.hidden is not None
    return rows.hidden


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of hidden states.

    Raises:
        ValueError: the model names none.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if not isinstance(head, nn.Module):
        raise ValueError(f"{type(model).__name__} has no output embeddings; expected a causal language model")
    return head


@torch.no_grad()
def plain_head(model: nn.Module) -> bool:
    """Whether the logits are exactly `hidden @ weight.T (+ bias)` of the head, so that a loss may compute them itself.

    False where a scale or a soft cap follows, where an adapter or a quantised weight sits in the head, or where the
    weight is elsewhere at the moment. Runs the model on two tokens.
    """
    head = output_head(model)
    if type(head) is not nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
        return False
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        device = embeddings.weight.device
        output = model(input_ids=torch.tensor([[1, 2]], device=device), use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1:
        return False
    expected = nn.functional.linear(seen[0], head.weight, head.bias)
    return torch.equal(SelectedRows().logits(output).float(), expected.flatten(0, -2).float())
