"""Two pairs that stand for a batch where a model is tried on it: ragged, unlike each other, as long as asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import PairBatch
from .layout import pack, text_lengths


def sample(batch: PairBatch, length: int = 0, *, of_text: bool = False, limit: int | None = None) -> PairBatch:
    """The pair with the longest text, and the end of the one with the shortest.

    The end is at most a quarter as long. So rows differ in length and in their first tokens, whatever the batch holds,
    and what padding or other rows change shows even in a batch of one pair, or of equal lengths.

    Args:
        length: the longest pair's packed row gets this many tokens at least: its text is put before it once more.
        of_text: its longer text does, up to its last label, and so reaches the last position that such a row can have.
        limit: positions that the model has. Where the text would go beyond them, the pair with the longest packed row
            is taken, and made longer within them.
    """
    lengths = torch.stack([text_lengths(batch.rejected_mask), text_lengths(batch.chosen_mask)], 1)
    order = sorted((max(pair), sum(pair), i) for i, pair in enumerate(lengths.tolist()) if max(pair))
    if not order:
        return batch.pairs([0, 0])
    rows = {i: pack(batch.pairs([i])).shape[1] for _, _, i in order}
    most, _, index = order[-1]
    longer = max(length - (most if of_text else rows[index]), 0)
    if limit is not None and most + 1 + longer > limit:  # a text alone is run with its last label
        index = max(rows, key=lambda i: rows[i])
        most = int(lengths[index].max())
        longer = max(min(length - rows[index], limit - most - 1), 0)
    long, short = batch.pairs([index]), batch.pairs([order[0][2]])
    kept = max((most + longer) // 4, 2)
    shortest = min(length for length in lengths[order[0][2]].tolist() if length)
    of_it = lengths[index]
    before = (long.rejected_ids if of_it[0] >= of_it[1] else long.chosen_ids)[0, :most]
    before = before.repeat(longer // len(before) + 1)[:longer]
    return _beside(_moved(long, before, 0), _moved(short, before[:0], max(shortest + 1 - kept, 0)))


def _moved(pair: PairBatch, before: Tensor, less: int) -> PairBatch:
    """A pair whose texts begin with the tokens `before`, or `less` tokens later."""
    held: dict[str, Any] = {}
    for name in ("rejected", "chosen"):
        ids, mask = getattr(pair, f"{name}_ids")[:, less:], getattr(pair, f"{name}_mask")[:, less:].clone()
        mask[:, 0] = False  # nothing predicts the first token
        held[f"{name}_ids"] = torch.cat([before[None], ids], 1)
        held[f"{name}_mask"] = torch.nn.functional.pad(mask, (len(before), 0))
    attack = torch.nn.functional.pad(pair.attack_mask[:, less:], (len(before), 0))
    return PairBatch(**held, attack_mask=attack)


def _beside(one: PairBatch, other: PairBatch) -> PairBatch:
    """A batch of both, each filled up on the right."""
    held: dict[str, Any] = {}
    for name in ("rejected_ids", "rejected_mask", "chosen_ids", "chosen_mask", "attack_mask"):
        rows = [getattr(pair, name)[0] for pair in (one, other)]
        width = max(len(row) for row in rows)
        held[name] = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    return PairBatch(**held)
