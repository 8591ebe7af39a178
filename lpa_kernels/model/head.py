"""Run the model's head over the few hidden states that predict a completion token, not over all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import hooked


class SelectedRows:
    """The rows of one forward pass.

    Attributes:
        hidden: [N, H], the hidden states at the selected places, with their gradient; None before the pass.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None


@contextmanager
def selected_rows(
    model: nn.Module, shape: tuple[int, int], places: Tensor, run_head: bool = True
) -> Iterator[SelectedRows]:
    """Within it, the model's head gets the [1, N, H] hidden states at some places, not all [B, L, H].

    Everything that the model does to its logits afterwards (scale, soft cap, a cast) stays its own code.

    Args:
        shape: (B, L) of the pass. places: [N] int64, row * L + index of each place.
        run_head: False hands on a single row, for callers that go on from `.hidden` themselves.

    Raises:
        ValueError: the model has no output embeddings, or (from within the model) they get something other than
            [B, L, H].
    """
    rows = SelectedRows()

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        if hidden.dim() != 3 or tuple(hidden.shape[:2]) != shape:
            raise ValueError(
                f"the head got hidden states of shape {tuple(hidden.shape)}; the pass's tokens are {shape}"
            )
        # index_select, not [row, position]: its backward is one index_add
        rows.hidden = hidden.flatten(0, 1).index_select(0, places.to(hidden.device))
        return (rows.hidden[None] if run_head else rows.hidden[None, :1], *inputs[1:])

    with hooked(before=[(output_head(model), select)]):
        yield rows


def logits_of(output: Any) -> Tensor:
    """[N, V], all logits of what a model returned, an output object or a tuple."""
    logits = getattr(output, "logits", None)
    return (output[0] if logits is None else logits).flatten(0, -2)


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
    with hooked(before=[(head, lambda _, inputs: seen.append(inputs[0]))]):
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.tensor([[1, 2]], device=embeddings.weight.device)
        output = model(input_ids=ids, use_cache=False)
    if len(seen) != 1:
        return False
    expected = nn.functional.linear(seen[0], head.weight, head.bias)
    return torch.equal(logits_of(output).float(), expected.flatten(0, -2).float())
