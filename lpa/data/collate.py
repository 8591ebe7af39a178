"""Encode whole data sets and collate their rows into padded batches with masks by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tables import DataError
from .templates import PAIR_TOKENS, ChatEncoder, warn_inert

if TYPE_CHECKING:
    from datasets import Dataset

ATTACK_ON = ("prompt+completions", "prompt", "completions")
BENIGN_TOKENS = ("prompt_tokens", "response_tokens")


def encode_pairs(
    dataset: Dataset, tokenizer: Any, *, system_prompt: str | None = None, max_length: int | None = None, **chat: Any
) -> Dataset:
    """The data set of `load_pairs` with columns prompt_tokens, rejected_tokens, chosen_tokens (lists of int) added.

    Args:
        system_prompt, max_length, chat: as in `ChatEncoder`.

    Raises:
        DataError: a row is longer than max_length; the message names it and both lengths.
    Warns: once, naming the rows whose text holds special tokens.
    """
    return _encode(
        dataset, ChatEncoder(tokenizer, system_prompt, max_length, **chat), ("rejected", "chosen"), PAIR_TOKENS
    )


def encode_benign(
    dataset: Dataset,
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    max_length: int | None = None,
    eos: bool = False,
    **chat: Any,
) -> Dataset:
    """The data set of `load_benign` with columns prompt_tokens, response_tokens added; errors as `encode_pairs`.

    Args:
        eos: end the responses with the tokenizer's EOS.

    Raises:
        DataError: with `eos`, the tokenizer has none.
    """
    if eos and tokenizer.eos_token_id is None:
        raise DataError("benign answers cannot end with EOS: the tokenizer has none; use benign_eos=False")
    room = None if max_length is None else max_length - eos
    encoded = _encode(dataset, ChatEncoder(tokenizer, system_prompt, room, **chat), ("response",), BENIGN_TOKENS)
    if not eos:
        return encoded
    ended = [[*tokens, tokenizer.eos_token_id] for tokens in encoded["response_tokens"]]
    return encoded.remove_columns("response_tokens").add_column("response_tokens", ended)


def _encode(dataset: Dataset, encoder: ChatEncoder, completions: Sequence[str], names: Sequence[str]) -> Dataset:
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    inert = []
    for number, row in enumerate(dataset, 1):
        where = row.get("row") or f"row {number}"
        tokens, odd = encoder.row(row["prompt"], [row[name] for name in completions], where)
        for name, ids in zip(names, tokens, strict=True):
            columns[name].append(ids)
        if odd:
            inert.append(where)
    warn_inert(inert)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


class _Collator:
    """Rows to tokens, encoding those that are not yet."""

    def __init__(
        self, tokenizer: Any, *, system_prompt: str | None = None, max_length: int | None = None, **chat: Any
    ) -> None:
        self.encoder = ChatEncoder(tokenizer, system_prompt, max_length, **chat)
        # Masks go by position, so any token does for padding, and a tokenizer need not have one for it.
        self.pad = tokenizer.pad_token_id or 0

    def _tokens(self, row: Mapping[str, Any], completions: Sequence[str], names: Sequence[str]) -> list[list[int]]:
        if all(name in row for name in names):
            return [list(row[name]) for name in names]
        if absent := [name for name in ("prompt", *completions) if not row.get(name)]:
            raise DataError(f"a row has no {', '.join(absent)}; its columns are {', '.join(row)}")
        where = row.get("row") or "the row"
        tokens, inert = self.encoder.row(row["prompt"], [row[name] for name in completions], where)
        warn_inert([where] if inert else [])
        return tokens

    def _pad(self, texts: Sequence[list[int]], length: int) -> Tensor:
        return torch.tensor([text + [self.pad] * (length - len(text)) for text in texts])


class PairCollator(_Collator):
    """Rows of pairs, as text or encoded by `encode_pairs`, to a batch for the attack and the defence.

    The batch, all [B, L] and right padded: rejected_ids, chosen_ids int64 (prompt and completion); rejected_mask,
    chosen_mask bool, True at the completion's tokens; prompt_mask bool, True at the prompt's, template included;
    attack_mask bool, what `attack_on` says, one mask for both texts.

    Args:
        attack_on: "prompt+completions" (prompt and every position where either text has a completion token), "prompt"
            or "completions".
        tokenizer, system_prompt, max_length, chat: as in `ChatEncoder`; the last three matter for rows of text alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system_prompt: str | None = None,
        max_length: int | None = None,
        attack_on: str = "prompt+completions",
        **chat: Any,
    ) -> None:
        super().__init__(tokenizer, system_prompt=system_prompt, max_length=max_length, **chat)
        if attack_on not in ATTACK_ON:
            raise DataError(f"attack_on={attack_on!r} is unknown; use one of {', '.join(map(repr, ATTACK_ON))}")
        self.attack_on = attack_on

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        encoded = [self._tokens(row, ("rejected", "chosen"), PAIR_TOKENS) for row in rows]
        prompts, rejected, chosen = ([row[i] for row in encoded] for i in range(3))
        length = max(len(p) + max(len(r), len(c)) for p, r, c in encoded)
        prompt_mask = _span([0] * len(prompts), prompts, length)
        starts = [len(prompt) for prompt in prompts]
        rejected_mask, chosen_mask = _span(starts, rejected, length), _span(starts, chosen, length)
        attack_mask = torch.zeros_like(prompt_mask)
        if "prompt" in self.attack_on:
            attack_mask |= prompt_mask
        if "completions" in self.attack_on:
            attack_mask |= rejected_mask | chosen_mask
        return {
            "rejected_ids": self._pad([p + r for p, r in zip(prompts, rejected, strict=True)], length),
            "rejected_mask": rejected_mask,
            "chosen_ids": self._pad([p + c for p, c in zip(prompts, chosen, strict=True)], length),
            "chosen_mask": chosen_mask,
            "prompt_mask": prompt_mask,
            "attack_mask": attack_mask,
        }


class BenignCollator(_Collator):
    """Rows of prompt and response, as text or encoded by `encode_benign`, to benign_ids [B, L] int64, right padded, and
    benign_mask [B, L] bool, True at the response's tokens."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        encoded = [self._tokens(row, ("response",), BENIGN_TOKENS) for row in rows]
        length = max(len(prompt) + len(response) for prompt, response in encoded)
        return {
            "benign_ids": self._pad([prompt + response for prompt, response in encoded], length),
            "benign_mask": _span([len(p) for p, _ in encoded], [response for _, response in encoded], length),
        }


def _span(starts: Sequence[int], texts: Sequence[list[int]], length: int) -> Tensor:
    """[B, length] bool, True from each start for as long as its text."""
    position, start = torch.arange(length), torch.tensor(starts)[:, None]
    return (position >= start) & (position < start + torch.tensor([len(text) for text in texts])[:, None])
