"""A batch of pairs: one prompt each, a rejected and a chosen completion, and where the prompt may be attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """B pairs, right padded. The adversary goes toward `rejected` and away from `chosen`.

    Attributes:
        rejected_ids, chosen_ids: [B, L] int64 tokens of prompt and completion. The two may differ in L.
        rejected_mask, chosen_mask: [B, L] bool, True at the tokens of the completion (the labels). The logits
            that predict the label at position p are those of position p - 1, so position 0 cannot be one.
        attack_mask: [B, La] bool, True at the positions that get a perturbation, the same in both texts.
        rejected_labels, chosen_labels: optional [n] int64, the labels at the True positions in row-major order,
            where they are not the tokens themselves.

    What stands after the last label of a text never matters: attention is causal. There is no attention mask, so
    every token before it counts as real.

    Raises:
        ValueError: a shape, dtype or mask does not fit; the message names the field, its value and what would be right.

    >>> ids, last = torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]])
    >>> batch = PairBatch(ids, last, torch.tensor([[1, 2, 4]]), last, ~last)
    >>> len(batch), batch.counts
    (1, (1, 1))
    """

    rejected_ids: Tensor
    rejected_mask: Tensor
    chosen_ids: Tensor
    chosen_mask: Tensor
    attack_mask: Tensor
    rejected_labels: Tensor | None = None
    chosen_labels: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.rejected_ids.shape[0] if self.rejected_ids.dim() == 2 else -1
        if size == 0:
            raise ValueError("the batch is empty: rejected_ids has no rows; give at least one pair")
        for name in ("rejected", "chosen"):
            ids, mask = getattr(self, f"{name}_ids"), getattr(self, f"{name}_mask")
            if ids.dim() != 2 or ids.shape[0] != size:
                raise ValueError(f"{name}_ids has shape {tuple(ids.shape)}; expected [{size}, length]")
            if mask.shape != ids.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"{name}_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
                    f"expected {tuple(ids.shape)} and torch.bool"
                )
            labels = getattr(self, f"{name}_labels")
            if labels is not None and (labels.dim() != 1 or labels.shape[0] != int(mask[:, 1:].sum())):
                raise ValueError(
                    f"{name}_labels has shape {tuple(labels.shape)}; expected [{int(mask[:, 1:].sum())}], "
                    f"one label for each True of {name}_mask"
                )
        if self.attack_mask.dim() != 2 or self.attack_mask.shape[0] != size or self.attack_mask.dtype != torch.bool:
            raise ValueError(
                f"attack_mask has shape {tuple(self.attack_mask.shape)} and dtype {self.attack_mask.dtype}; "
                f"expected [{size}, length] and torch.bool"
            )

    @classmethod
    def from_dict(cls, batch: Mapping[str, Any]) -> PairBatch:
        """The batch from a mapping that holds this class's fields (others are ignored); masks are made bool.

        Raises:
            KeyError: a field is missing.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            if (value := batch.get(field.name)) is not None:
                values[field.name] = value.bool() if field.name.endswith("_mask") else value
            elif not field.name.endswith("_labels"):
                needed = [each.name for each in fields(cls) if not each.name.endswith("_labels")]
                raise KeyError(f"the batch has no {field.name!r}; its keys are {sorted(batch)} and it needs {needed}")
        return cls(**values)

    def to(self, device: torch.device | str) -> PairBatch:
        """This batch on another device."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: None if v is None else v.to(device) for name, v in held.items()}
        return PairBatch(**moved)

    def on_host(self) -> PairBatch:
        """This batch in the host's memory, by one read of the device; itself where it is there."""
        if self.rejected_ids.device.type == "cpu":
            return self
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        there: dict[str, Tensor] = {name: value for name, value in held.items() if value is not None}
        line = torch.cat([value.flatten().long() for value in there.values()]).cpu()
        parts = line.split([value.numel() for value in there.values()])
        read: dict[str, Any] = {
            name: part.view(value.shape).to(value.dtype)
            for (name, value), part in zip(there.items(), parts, strict=True)
        }
        return PairBatch(**read)

    def only(self, rejected: bool, chosen: bool) -> PairBatch:
        """This batch with the tokens of a completion that is not wanted left unscored."""
        unwanted = [name for name, wanted in (("rejected", rejected), ("chosen", chosen)) if not wanted]
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in unwanted:
            held[f"{name}_mask"] = torch.zeros_like(held[f"{name}_mask"])
            held[f"{name}_labels"] = None
        return PairBatch(**held) if unwanted else self

    def part(self, start: int, stop: int) -> PairBatch:
        """The pairs start .. stop - 1, without the columns that follow all of their labels and attacked positions.

        Reads from the device.
        """
        held: dict[str, Any] = {}
        width = max(_used(mask[start:stop]) for mask in (self.rejected_mask, self.chosen_mask, self.attack_mask))
        for name in ("rejected", "chosen"):
            mask, labels = getattr(self, f"{name}_mask"), getattr(self, f"{name}_labels")
            held[f"{name}_ids"] = getattr(self, f"{name}_ids")[start:stop, :width]
            held[f"{name}_mask"] = mask[start:stop, :width]
            if labels is not None:
                before, own = int(mask[:start, 1:].sum()), int(mask[start:stop, 1:].sum())
                held[f"{name}_labels"] = labels[before : before + own]
        return PairBatch(**held, attack_mask=self.attack_mask[start:stop, :width])

    def pairs(self, index: Sequence[int]) -> PairBatch:
        """The pairs of these numbers, in this order."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("rejected", "chosen"):
            if (labels := held[f"{name}_labels"]) is not None:
                parts = labels.split(held[f"{name}_mask"][:, 1:].sum(1).tolist())
                held[f"{name}_labels"] = torch.cat([parts[i] for i in index])
        rows = [name for name in held if not name.endswith("_labels")]
        return PairBatch(**held | {name: held[name][list(index)] for name in rows})

    def __len__(self) -> int:
        return self.rejected_ids.shape[0]

    def difference(self, other: PairBatch) -> str | None:
        """The first field in which the other batch differs, None where it is the same. Reads from the device."""
        if other is self:
            return None
        for name in (f.name for f in fields(self)):
            mine, its = getattr(self, name), getattr(other, name)
            if (mine is None) != (its is None) or (mine is not None and not torch.equal(mine, its)):
                return f"its {name} differs"
        return None

    @property
    def counts(self) -> tuple[int, int]:
        """How many completion tokens are predicted: (rejected, chosen). Reads from the device."""
        rejected, chosen = torch.stack([self.rejected_mask[:, 1:].sum(), self.chosen_mask[:, 1:].sum()]).tolist()
        return rejected, chosen

    def labels(self, name: str) -> Tensor:
        """The labels of "rejected" or "chosen", [n] int64, row-major."""
        own: Tensor | None = getattr(self, f"{name}_labels")
        if own is not None:
            return own
        ids: Tensor = getattr(self, f"{name}_ids")
        mask: Tensor = getattr(self, f"{name}_mask")
        return ids[:, 1:][mask[:, 1:]]

    @property
    def grid(self) -> Tensor:
        """[B, La] int64: the delta row of each attacked position in row-major order, -1 elsewhere."""
        order = self.attack_mask.flatten().cumsum(0).view_as(self.attack_mask) - 1
        return torch.where(self.attack_mask, order, torch.full_like(order, -1))


def _used(mask: Tensor) -> int:
    """One more than the last column of mask [B, L] that holds a True, and at least 1."""
    columns = mask.any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1
