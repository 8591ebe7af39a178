"""PairBatch: what it refuses, by field, value and what would be right."""

from __future__ import annotations

import pytest
import torch

from lpa_kernels.attack import PairBatch

from ...support.batches import pairs


def test_bad_batches() -> None:
    batch = pairs()
    held = vars(batch)
    for changed, message in [
        ({"rejected_ids": batch.rejected_ids[:0]}, "the batch is empty"),
        ({"chosen_ids": batch.chosen_ids[:1]}, r"chosen_ids has shape \(1, 12\); expected \[2, length\]"),
        ({"chosen_mask": batch.chosen_mask.long()}, r"chosen_mask has shape .* dtype torch.int64"),
        ({"attack_mask": batch.attack_mask[0]}, r"attack_mask has shape \(12,\)"),
        ({"rejected_labels": torch.zeros(3)}, r"rejected_labels has shape \(3,\); expected \[6\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            PairBatch(**held | changed)
