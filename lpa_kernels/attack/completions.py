"""Token log-probabilities of any number of completions of one prompt, from one pass that runs the prompt once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.facts import known, model_key, remembered, say_once, text_config
from ..model.head import logits_of, output_head, plain_head, selected_rows
from ..model.sharding import is_sharded
from ..model.sites import language_model
from ..model.walk import modules_of, parameters_of
from ..ops import token_loss
from .batch import PairBatch
from .layout import PADDING, PREFIX, Layout, text_lengths
from .passes import layout_pass
from .probe import can_pack
from .verdicts import way_of

CHUNK_FROM = 1 << 27  # logits (rows x vocabulary) from which the head is run in chunks
_CHUNK = 1 << 25  # logits of a chunk
# Products take about 24 width^2 operations a token and layer; causal attention 2 width x length, at a lower rate.
_ATTENTION = 5  # widths of a row over which its attention takes as long as its products; measured on a CPU


@dataclass(frozen=True)
class Completions:
    """N texts, right padded, each a prompt and its completion.

    Attributes:
        ids: [N, L] int64 tokens.
        mask: [N, L] bool, True at the completion's tokens. The prompt is what stands before the first of them.
        group: [N] int64, equal numbers for completions of one prompt, in any order. None: found in the tokens.

    Raises:
        ValueError: a shape or dtype does not fit, or texts of one group have no common prompt; the message names them.
    """

    ids: Tensor
    mask: Tensor
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or not len(self.ids):
            raise ValueError(f"ids has shape {tuple(self.ids.shape)}; expected [N, L] with at least one text")
        if self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)} and dtype {self.mask.dtype}; "
                f"expected {tuple(self.ids.shape)} and torch.bool"
            )
        if self.group is None:
            object.__setattr__(self, "group", same_prompts(self.ids, self.mask))
        elif self.group.shape != self.ids.shape[:1]:
            raise ValueError(
                f"group has shape {tuple(self.group.shape)}; expected {tuple(self.ids.shape[:1])}, a number a text"
            )
        else:
            numbers = torch.unique(self.group.to(self.ids.device), return_inverse=True)[1]
            object.__setattr__(self, "group", numbers)
            self._check_prompts()

    def _check_prompts(self) -> None:
        """Refuse a group whose texts part before the first completion token of any of them."""
        starts, lead = _starts(self.mask), self.leads
        both = torch.minimum(starts, starts[lead])
        apart = (self.ids != self.ids[lead]) & (_columns(self.ids) < both[:, None])
        if bool(apart.any()):
            text, position = (int(i) for i in apart.nonzero()[0])
            other = int(lead[text])
            raise ValueError(
                f"texts {other} and {text} are of one group and have no common prompt: they differ at position "
                f"{position}, and their completions begin at {int(starts[other])} and {int(starts[text])}; give texts "
                "of different prompts different groups"
            )

    @classmethod
    def of(cls, batch: Completions | PairBatch | Mapping[str, Any]) -> Completions:
        """The texts of a batch: of pairs, the rejected ones and then the chosen ones.

        Args:
            batch: `Completions`, a `PairBatch`, or a mapping with the fields of one of them.
        """
        if isinstance(batch, Completions):
            return batch
        if isinstance(batch, Mapping) and "ids" in batch and "mask" in batch:
            return cls(batch["ids"], batch["mask"].bool(), batch.get("group"))
        pairs = batch if isinstance(batch, PairBatch) else PairBatch.from_dict(batch)
        width = max(pairs.rejected_ids.shape[1], pairs.chosen_ids.shape[1])
        wide = lambda t: nn.functional.pad(t, (0, width - t.shape[1]))  # noqa: E731
        return cls(
            torch.cat([wide(pairs.rejected_ids), wide(pairs.chosen_ids)]),
            torch.cat([wide(pairs.rejected_mask), wide(pairs.chosen_mask)]),
            torch.arange(len(pairs), device=pairs.rejected_ids.device).repeat(2),
        )

    @property
    def groups(self) -> Tensor:
        """[N] int64: 0, 1, ..., one number a prompt."""
        assert self.group is not None
        return self.group

    @property
    def leads(self) -> Tensor:
        """[N] int64: the first text of each text's group."""
        numbers = torch.arange(len(self.groups), device=self.groups.device)
        first = numbers.new_full((len(numbers),), len(numbers))
        return first.scatter_reduce_(0, self.groups, numbers, "amin")[self.groups]

    def to(self, device: torch.device | str) -> Completions:
        """These texts on another device."""
        if self.ids.device == torch.device(device):
            return self
        return Completions(self.ids.to(device), self.mask.to(device), self.groups.to(device))

    def text(self, index: int) -> Completions:
        """One text alone, up to its last label."""
        end = int(text_lengths(self.mask[index : index + 1])) + 1
        return Completions(self.ids[index : index + 1, :end], self.mask[index : index + 1, :end])

    def pairs(self) -> PairBatch:
        """A pair a prompt, of its two longest texts, by which a model is judged. Text alone: as both, one unscored."""
        lengths, groups = text_lengths(self.mask), self.groups
        order = (groups * (int(lengths.max()) + 1) - lengths).argsort(stable=True)
        counts = torch.bincount(groups)
        first = counts.cumsum(0) - counts
        one, other = order[first], order[first + (counts > 1).long()]
        scored = self.mask[other] & (counts > 1)[:, None]
        return PairBatch(self.ids[one], self.mask[one], self.ids[other], scored, torch.zeros_like(scored))


def same_prompts(ids: Tensor, mask: Tensor) -> Tensor:
    """[N] int64: equal numbers for texts whose tokens before the first True of mask are the same."""
    prompt = _columns(ids) < _starts(mask)[:, None]
    return torch.unique(torch.where(prompt, ids, -1), dim=0, return_inverse=True)[1]


def _columns(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)


def _starts(mask: Tensor) -> Tensor:
    """[N] int64: the position of the first True of each row, and the row's length where there is none."""
    return torch.where(mask, _columns(mask), mask.shape[1]).amin(1)


def pack_completions(
    texts: Completions, share: bool = True, width: int | None = None, limit: int | None = None
) -> Layout:
    """One row for some or all completions of a prompt: the prompt once, then what each has of its own.

    A group's common prefix is the longest that all of its texts have. How many completions stand in a row is chosen for
    the least work, and of equal work the shorter rows: the places (rows x length of the longest), and what attention
    takes of each, which grows with the row and is twice as much where a mask keeps its kernel from skipping what is
    not causal. Labels come in row-major order of the mask; `Layout.example` is the text, its `branch` 0 in the prefix
    and 1, 2, ... in completions.

    Args:
        share: False gives every text a row of its own.
        width: of the model's hidden states, by which attention counts; None leaves it out.
        limit: tokens of the longest row that completions may share; None for any number.
    """
    lengths, groups, lead = text_lengths(texts.mask), texts.groups, texts.leads
    same = (texts.ids == texts.ids[lead]) & (_columns(texts.ids) < torch.minimum(lengths, lengths[lead])[:, None])
    common = same.long().cumprod(1).sum(1)
    common = torch.full_like(common, texts.ids.shape[1]).scatter_reduce_(0, groups, common, "amin")[groups]
    rank = _rank_in(groups)
    own = lengths - common
    best: tuple[float, Tensor, int] | None = None
    for several in range(1, int(rank.max()) + 2 if share else 2):
        _, row = torch.unique(groups * len(groups) + rank // several, return_inverse=True)
        length = torch.zeros_like(lengths).index_copy_(0, row, common).index_add_(0, row, own)
        longest = max(1, int(length.max()))
        if best is not None and limit is not None and longest > limit:
            continue
        attention = 0.0 if width is None else longest / (_ATTENTION * width) * (1 if several == 1 else 2)
        work = (int(row.max()) + 1) * longest * (1 + attention)
        if best is None or work < best[0]:
            best = work, row, longest
    assert best is not None
    _, row, longest = best
    return _lay_out(texts, lengths, common, row, int(row.max()) + 1, longest)


def _rank_in(groups: Tensor) -> Tensor:
    """[N] int64: how many earlier entries have the same number."""
    order = groups.argsort(stable=True)
    counts = torch.bincount(groups)
    ranks = torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts)[groups[order]]
    return torch.empty_like(ranks).index_copy_(0, order, ranks)


def _lay_out(texts: Completions, lengths: Tensor, common: Tensor, row: Tensor, rows: int, length: int) -> Layout:
    """The layout for given text lengths, common prefixes and rows, all [N]."""
    alone = torch.bincount(row)[row] == 1
    common = torch.where(alone, 0, common)
    order = row.argsort(stable=True)
    own = (lengths - common)[order]
    before = own.cumsum(0) - own  # what stands before a text of all earlier ones' own tokens, over rows
    begins = torch.ones_like(own, dtype=torch.bool)
    begins[1:] = row[order][1:] != row[order][:-1]
    in_row = before - torch.where(begins, before, 0).cummax(0).values
    shift = torch.empty_like(own).index_copy_(0, order, in_row)

    width = max(int(lengths.max()), 1)
    ids = texts.ids[:, :width]
    position = _columns(ids).expand(ids.shape)
    there, prefix = position < lengths[:, None], position < common[:, None]
    place = row[:, None] * length + position + torch.where(prefix, 0, shift[:, None])
    number = torch.where(prefix | alone[:, None], PREFIX, _rank_in(row)[:, None] + 1)

    def spread(values: Tensor, fill: int) -> Tensor:
        """[rows, length]: values by text and position -> by place. A prefix's tokens get the same value each time."""
        out = values.new_full((rows * length,), fill)
        out[place[there]] = values.expand(ids.shape)[there]
        return out.view(rows, length)

    branch = spread(number, PADDING)
    text, before_label = texts.mask[:, 1:].nonzero(as_tuple=True)
    places = place[text, before_label]
    return Layout(
        input_ids=spread(ids, 0),
        position_ids=spread(position, 0),
        branch=branch,
        attention_mask=(branch != PADDING).long(),
        token_rows=branch.new_full((branch.numel(),), -1),
        row_tokens=branch.new_zeros(0, 2),
        select_rows=places // length,
        select_positions=places % length,
        labels=texts.ids[:, 1:][texts.mask[:, 1:]],
        rejected=torch.zeros_like(text, dtype=torch.bool),
        example=text,
        size=len(texts.ids),
        packed=not bool(alone.all()),
    )


def shared_layout(model: nn.Module, texts: Completions) -> tuple[Layout | None, str]:
    """(the layout that gives this model's own results in one pass, why prompts that could be shared are not).

    No layout where each text has to run alone.

    Raises:
        RuntimeError: the model is not causal, or puts virtual tokens before a text.
    """
    config = text_config(model)
    width, limit = (getattr(config, name, None) for name in ("hidden_size", "max_position_embeddings"))
    # `way_of` compares a row with a text as long, so rows end where positions do
    layout = pack_completions(texts, width=width, limit=limit if isinstance(limit, int) else None)
    if sharded(model):  # each pass is one of all ranks, and which are made here goes by this rank's texts
        return pack_completions(texts, share=False), "its weights are sharded over ranks"
    way = way_of(model, texts.pairs(), packing=layout.packed, length=layout.shape[1])
    if way.engine == "alone":
        return None, way.reason
    if not layout.packed:
        return layout, ""
    verdict = can_pack(model, layout.shape[1])
    if way.engine == "packed" and verdict:
        return replace(layout, first_position=way.first_position), ""
    return pack_completions(texts, share=False), way.reason or verdict.reason


def sharded(model: nn.Module) -> bool:
    """Whether FSDP of either kind, or DeepSpeed's third stage, shards the model's weights."""
    classes = {type(module).__name__ for module in modules_of(model)}
    by_deepspeed = any(hasattr(p, "ds_id") for p in parameters_of(model))
    return is_sharded(model) or "FullyShardedDataParallel" in classes or by_deepspeed


def shared_prefix(model: nn.Module, batch: Completions | PairBatch | Mapping[str, Any]) -> Tensor:
    """The log-probability of every completion token, the prompt of several completions run once.

    One packed pass gives what a pass over each text gives: causal attention keeps a prompt from seeing what follows,
    and the completions do not see each other (`packed_masks`). It is exact where a probe of this model says so.
    Elsewhere the texts run unshared, with one warning. Gradients reach whatever wants them, weights and adapters, also
    through checkpointed activations. The model runs in the mode that it is in; with dropout, completions of a prompt
    share what is dropped in it.

    Args:
        model: any causal language model of transformers, with or without PEFT adapters or a wrapper for data
            parallelism.
        batch: `Completions` (any number a prompt), a `PairBatch`, or a mapping with the fields of one of them.

    Returns:
        [N, L - 1] float32: at [n, p - 1] log p(token p of text n | the tokens before), 0 where no label is. Of a
        `PairBatch` N is 2B, the rejected texts first: `rejected, chosen = shared_prefix(model, batch).sum(1).chunk(2)`.

    Raises:
        ValueError: a shape does not fit, or texts that are said to have one prompt do not.
        RuntimeError: the model is not causal, or puts virtual tokens before a text.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**size))
    >>> ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [1, 2, 3, 8, 0]])  # one prompt, three completions
    >>> mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]).bool()
    >>> log_probs = shared_prefix(model, Completions(ids, mask))
    >>> log_probs.shape, (log_probs != 0).sum(1).tolist()
    (torch.Size([3, 4]), [2, 2, 1])
    """
    inner = language_model(model)
    texts = Completions.of(batch).to(inner.get_input_embeddings().weight.device)  # type: ignore[operator]
    with known(inner):
        layout, reason = shared_layout(inner, texts)
        if reason:
            say_once(inner, f"{type(inner).__name__} runs prompts once for each of their completions: {reason}")
        if layout is None:
            each = [_log_probs(model, inner, pack_completions(texts.text(n))) for n in range(len(texts.ids))]
            found = torch.cat(each)
        else:
            found = _log_probs(model, inner, layout)
    scored = texts.mask[:, 1:]
    return found.new_zeros(scored.shape).masked_scatter(scored.to(found.device), found)


def _log_probs(model: nn.Module, inner: nn.Module, layout: Layout) -> Tensor:
    """[n] float32: log p of a layout's labels, from one pass."""
    head: Any = output_head(inner)
    size = len(layout.labels) * getattr(head, "out_features", 0)
    chunked = size >= CHUNK_FROM and model is inner and not sharded(inner)
    chunked = chunked and remembered(inner, "plain head", model_key(inner), partial(plain_head, inner))
    with (
        layout_pass(inner, layout) as inputs,
        selected_rows(inner, layout.shape, layout.places, run_head=not chunked) as selected,
    ):
        output = model(**inputs, use_cache=False)
    if not chunked:
        return _scored(None, logits_of(output), layout.labels)
    assert selected.hidden is not None
    each = max(1, _CHUNK // head.weight.shape[0])
    parts = zip(selected.hidden.split(each), layout.labels.split(each), strict=True)
    return torch.cat([checkpoint(_scored, head, hidden, labels, use_reentrant=False) for hidden, labels in parts])


def _scored(head: nn.Module | None, rows: Tensor, labels: Tensor) -> Tensor:
    """[n] float32: log p of labels [n] by logits [n, V], or by what a head makes of hidden states [n, H]."""
    logits = rows if head is None else head(rows)
    labels = labels.to(logits.device)
    return -token_loss(logits, labels, torch.zeros_like(labels, dtype=torch.bool))[0]
