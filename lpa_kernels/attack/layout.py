"""Where every token of a batch stands in a pass: the prompt once and both completions after it, or text by text.

A layout is made on the host, from one read of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import PairBatch

PREFIX, REJECTED, CHOSEN, PADDING = 0, 1, 2, -1


class Kept(NamedTuple):
    """Columns before a layout's own. branch, position_ids: [B, K] int64, as in `Layout`. cache: what a model made."""

    branch: Tensor
    position_ids: Tensor
    cache: Any


@dataclass(frozen=True, eq=False)
class Layout:
    """Where every token of a `PairBatch` stands in the pass that the model runs, and where its results are.

    B rows of L tokens (B may exceed the number of pairs: two texts that share nothing stand in two rows), R delta
    rows (one for each True of the attack mask), N labels, rejected ones first, each half in row-major order of its
    mask. A token that predicts nothing (the last label of a text and all that follows) is left out.

    Attributes:
        input_ids: [B, L] int64, 0 at padding.
        position_ids: [B, L] int64, the position in the token's own text, so both completions start at the prompt's
            end; 0 at padding.
        branch: [B, L] int64, 0 the shared prefix or a text that stands alone, 1 the rejected completion, 2 the chosen
            one (of `pack_completions`: 1, 2, ... one completion each), -1 padding.
        attention_mask: [B, L] int64, 1 at every token, 0 at padding; for the model.
        token_rows: [B * L] int64, the delta row of each token, -1 = none.
        row_tokens: [R, 2] int64, the tokens (numbers in 0..B*L-1) that each delta row is added to, -1 = none.
        select_rows, select_positions: [N] int64, the row, and the index in it, of the hidden state that predicts each
            label.
        labels: [N] int64.  rejected: [N] bool.  example: [N] int64, the pair.
        size: the number of pairs.
        packed: whether the model needs this layout's masks and positions (`pack`), or plain causal attention over the
            tokens is right (`unshared`).
        first_position: the position id of a text's first token, which a model may count from elsewhere than 0.
        before: the columns that are run once, whose keys and values its tokens see; None where there are none.
        masks: attention masks made for this layout so far, and how each is made (`packed_masks` fills it).
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    attention_mask: Tensor
    token_rows: Tensor
    row_tokens: Tensor
    select_rows: Tensor
    select_positions: Tensor
    labels: Tensor
    rejected: Tensor
    example: Tensor
    size: int
    packed: bool
    first_position: int = 0
    before: Kept | None = None
    masks: dict[object, tuple[Tensor, Callable[[Layout], Tensor]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """Branch and position of all that its tokens may see, [B, K + L] each."""
        if self.before is None:
            return self.branch, self.position_ids
        own, kept = (self.branch, self.position_ids), self.before[:2]
        branch, position = (torch.cat(both, 1) for both in zip(kept, own, strict=True))
        return branch, position

    def columns(self, part: slice) -> Layout:
        """Some columns of it, without masks: all that is attacked or scored must be in them."""
        first, last, _ = part.indices(self.shape[1])
        tokens, length = self.row_tokens, self.shape[1]
        moved = tokens // length * (last - first) + tokens % length - first
        cut = {name: getattr(self, name)[:, part] for name in ("input_ids", "position_ids", "branch", "attention_mask")}
        return replace(
            self, **cut, token_rows=self.token_rows.view(self.shape)[:, part].flatten(),
            row_tokens=torch.where(tokens >= 0, moved, -1), select_positions=self.select_positions - first,
        )  # fmt: skip

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, without its masks."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The same with every tensor changed, without masks."""
        changed: dict[str, Any] = {name: change(value) for name, value in self.tensors.items()}
        return replace(self, **changed)

    @property
    def places(self) -> Tensor:
        """[N] int64: row * L + index of the hidden state that predicts each label."""
        return self.select_rows * self.shape[1] + self.select_positions

    @property
    def scored_tokens(self) -> Tensor:
        """[n] distinct places, those that predict a label among them; n is at most N and goes by shapes alone.

        So nothing waits for the device, and a captured step may run on another batch's tokens.
        """
        places = self.places
        idle = torch.ones(self.input_ids.numel(), dtype=torch.uint8, device=places.device).index_fill_(0, places, 0)
        return idle.argsort(stable=True)[: len(places)]

    @property
    def padding_share(self) -> float:
        """The share of the B x L places that holds no token. Reads from the device."""
        return float((self.branch == PADDING).float().mean())


def pack(batch: PairBatch, first_position: int = 0) -> Layout:
    """One row a pair: the longest common prefix of its two texts once, then the rest of the rejected, of the chosen.

    Causal attention keeps a prefix from seeing what follows, and delta is the same in both texts, so one pass over
    this row gives what two passes over the texts give, provided that the completions do not see each other
    (`packed_masks`). A pair stands as two rows where nothing is shared, or where that leaves fewer places
    in total (rows x length of the longest).

    Args:
        first_position: see `Layout`.
    """
    device, batch = batch.rejected_ids.device, batch.on_host()
    rejected, chosen = text_lengths(batch.rejected_mask), text_lengths(batch.chosen_mask)
    width = min(batch.rejected_ids.shape[1], batch.chosen_ids.shape[1])
    same = batch.rejected_ids[:, :width] == batch.chosen_ids[:, :width]
    same &= _arange(same) < torch.minimum(rejected, chosen)[:, None]
    prefix = same.long().cumprod(1).sum(1)
    apart = (prefix == 0) & (rejected > 0) & (chosen > 0)
    apart |= _too_long(rejected, chosen, prefix, apart)
    layout = _lay_out(batch, rejected, chosen, prefix, apart, packed=True)
    return replace(layout, first_position=first_position).changed(lambda t: t.to(device))


def unshared(batch: PairBatch, length: int = 1) -> Layout:
    """Every text that has labels in a row of its own: for models that cannot be packed.

    Positions run from 0, `branch` is 0 or -1, and plain causal attention over right-padded rows is right for it.

    Args:
        length: L is this at least.
    """
    device, batch = batch.rejected_ids.device, batch.on_host()
    rejected, chosen = text_lengths(batch.rejected_mask), text_lengths(batch.chosen_mask)
    apart = (rejected > 0) & (chosen > 0)
    layout = _lay_out(batch, rejected, chosen, torch.zeros_like(rejected), apart, packed=False, least=length)
    return layout.changed(lambda t: t.to(device))


def _arange(like: Tensor) -> Tensor:
    """0, 1, ... over the last dimension of `like`."""
    return torch.arange(like.shape[-1], device=like.device)


def text_lengths(mask: Tensor) -> Tensor:
    """[B] int64: how many tokens predict something, which is the position of the last label (0 where there is none)."""
    return (_arange(mask) * mask).amax(1) if mask.shape[1] else mask.new_zeros(len(mask), dtype=torch.long)


def _too_long(rejected: Tensor, chosen: Tensor, prefix: Tensor, apart: Tensor) -> Tensor:
    """[B] bool: the pairs to split so that rows x length is least. All rows are as long as the longest one."""
    shared = torch.where(apart, torch.maximum(rejected, chosen), rejected + chosen - prefix)
    single = torch.maximum(rejected, chosen)
    limits = torch.cat([shared, single.amax()[None]]).clamp(min=1)  # [B + 1], the lengths worth trying
    limits = limits[limits >= single.amax()]
    split = shared[None] > limits[:, None]
    rows = len(shared) + (split | apart).sum(1)
    cost = rows * limits
    # the least cost, and of equal ones the longest row, which shares most
    best = (cost * (int(limits.max()) + 1) - limits).argmin()
    return split[best]


def _lay_out(
    batch: PairBatch, rejected: Tensor, chosen: Tensor, prefix: Tensor, apart: Tensor, packed: bool, least: int = 1
) -> Layout:
    """The layout for given text lengths, shared prefixes and pairs that stand apart, all [B]; L is `least` or more."""
    pairs = len(batch)
    prefix = torch.where(apart, 0, prefix)
    lengths = torch.where(apart, torch.maximum(rejected, chosen), rejected + chosen - prefix)
    length = max(int(lengths.max()), least)  # a batch without a label is one of padding
    rows = pairs + int(apart.sum())
    row = torch.arange(pairs, device=prefix.device)
    chosen_row = torch.where(apart, pairs + apart.long().cumsum(0) - 1, row)
    # where the chosen text goes on after the prefix, less where it would stand alone
    shift = torch.where(apart, 0, rejected - prefix)

    widest = max(int(rejected.max()), int(chosen.max()))
    position = torch.arange(widest, device=prefix.device).expand(pairs, widest)
    in_prefix = position < prefix[:, None]
    place_rejected = row[:, None] * length + position
    place_chosen = chosen_row[:, None] * length + position + torch.where(in_prefix, 0, shift[:, None])
    in_rejected, in_chosen = position < rejected[:, None], position < chosen[:, None]
    alone = in_prefix | (apart | (rejected == 0) | (chosen == 0))[:, None]
    grid = _fit(batch.grid, widest, -1)

    def spread(from_rejected: Tensor, from_chosen: Tensor, fill: int) -> Tensor:
        """[rows * length]: values by pair and position -> values by place. Prefix tokens get the same value twice."""
        out = from_rejected.new_full((rows * length,), fill)
        out[place_chosen[in_chosen]] = from_chosen[in_chosen]
        out[place_rejected[in_rejected]] = from_rejected[in_rejected]
        return out

    branch = spread(torch.where(alone, PREFIX, REJECTED), torch.where(alone, PREFIX, CHOSEN), PADDING)
    ids = spread(_fit(batch.rejected_ids, widest, 0), _fit(batch.chosen_ids, widest, 0), 0)
    row_tokens = torch.stack(
        [
            _fit(place.where(there, -1), batch.attack_mask.shape[1], -1)[batch.attack_mask]
            for place, there in ((place_rejected, in_rejected), (place_chosen, in_chosen & ~in_prefix))
        ],
        dim=1,
    )

    select, example = [], []
    for mask, place in ((batch.rejected_mask, place_rejected), (batch.chosen_mask, place_chosen)):
        pair, before = mask[:, 1:].nonzero(as_tuple=True)
        select.append(place[pair, before])
        example.append(pair)
    places = torch.cat(select)
    return Layout(
        input_ids=ids.view(rows, length),
        position_ids=spread(position, position, 0).view(rows, length),
        branch=branch.view(rows, length),
        attention_mask=(branch != PADDING).long().view(rows, length),
        token_rows=spread(grid, grid, -1),
        row_tokens=row_tokens,
        select_rows=places // length,
        select_positions=places % length,
        labels=torch.cat([batch.labels("rejected"), batch.labels("chosen")]),
        rejected=_arange(places) < len(select[0]),
        example=torch.cat(example),
        size=pairs,
        packed=packed,
    )


def _fit(values: Tensor, width: int, fill: int) -> Tensor:
    """[B, width]: cut, or filled up on the right."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
