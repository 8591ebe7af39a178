"""How a batch can be run exactly, found by running some of its pairs, and remembered with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.facts import logger, model_key, remembered, text_config
from ..model.hooks import hooked
from ..model.modes import as_if_trained, probing
from ..model.sharding import is_sharded
from ..model.walk import parameters_of
from .batch import PairBatch
from .layout import Layout, pack, text_lengths, unshared
from .passes import layout_logits, texts, two_pass_rows, without_prefix
from .probe import FLOAT32_TOLERANCE, Verdict, can_pack
from .sample import sample

WAYS = ("packed", "unshared", "alone")  # the fastest first
HALF_TOLERANCE = 0.03  # of a row of logits; bf16 rounds to 1e-2
ROUNDINGS = 4  # times what one rounding of the embeddings changes: a near tie may turn in any pass
_CHOICES = ("index_topk", "keep_window_size", "indexer_budget")  # how many of all keys an attention chooses
_LEAK = 0.1  # of the largest logit: a model that sees what it is asked for moves more, inputs quantised together less
_NEAR = 64  # tokens before others whose logits these must leave as they are
_LEAST = 16  # tokens by which rows may grow at least before they are judged anew


@dataclass(frozen=True)
class Way:
    """How a batch is to be run.

    Attributes:
        engine: "packed", "unshared" (one padded pass) or "alone" (one text a pass). reason: why not a faster one.
        first_position: see `Layout`.
    """

    engine: str
    reason: str = ""
    first_position: int = 0


@dataclass
class Judged:
    """What was found out of a model in one state.

    Attributes:
        ways: (longest row, way), in the order found; a way holds for rows up to that length.
        refusal: why rows longer than those cannot be attacked at all; "" where nothing is known against it.
    """

    ways: list[tuple[int, Way]] = field(default_factory=list)
    refusal: str = ""


def way_of(model: nn.Module, batch: PairBatch, packing: bool = True, length: int | None = None) -> Way:
    """The fastest way to run `batch` that gives what every text gives alone in a pass.

    A batch whose rows are longer than those judged so far is judged by running two texts of it (`_sample`), without
    gradients: a window, a limit of positions or a choice of keys may begin to bind there. They are made longer by up to
    a quarter, so that the next batch need not be judged again; where that changes the verdict, they are taken as they
    are.

    - *causal*: other tokens at the end of a text leave the logits before them as they are. Where they move them by up
      to a tenth of the largest, texts run alone; where by more, the model sees what it is asked for, and is refused.
    - *unshared*: one padded pass over all texts gives the logits of texts alone.
    - *packed*: so do packed rows, and `can_pack` finds nothing against it.

    "The same" is within 2e-4 of the largest logit in float32 and within 3% in half precision, by the worst row's
    root mean square, or within four times what one rounding of the embeddings changes: a router near a tie turns in
    any pass.

    Args:
        packing: False asks for plain passes: "unshared" says that padded ones are exact, "alone" that they are not.
        length: of the longest row that is to be run; None where that is the longest packed pair.

    Raises:
        RuntimeError: the model is not causal, or puts virtual tokens before a text.
    """
    if reason := _one_by_one(model, batch):
        return Way("alone", reason)
    if not is_sharded(model) and not sum(batch.counts):
        return Way("packed" if packing and can_pack(model) else "unshared", "there is nothing to score")
    judged = remembered(model, "ways", (model_key(model), packing), Judged)
    length = agreed(model, pack(batch).shape[1] if length is None else length)
    for longest, way in judged.ways:
        if length <= longest:
            return _for_tokens(model, batch, way)
    if not judged.refusal:
        refusal, mixes = _not_attackable(model, batch)
        judged.refusal = refusal or ("another rank's batch was refused" if agreed(model, bool(refusal)) else "")
    if judged.refusal:
        raise RuntimeError(judged.refusal)
    if agreed(model, bool(mixes)):
        way = Way("alone", mixes or "another rank's batch runs so")
        judged.ways.append((rounded_up(length, text_config(model)), way))
        return way
    fastest = "packed" if packing and can_pack(model, length) else "unshared"
    found: list[tuple[int, Way]] = []
    for up_to in dict.fromkeys((rounded_up(length, text_config(model)), length)):
        verdict = can_pack(model, up_to) if packing else Verdict(False, "plain passes were asked for")
        way = _judge(model, sample(batch, up_to, limit=_positions(text_config(model))), verdict)
        slowest = WAYS[agreed(model, WAYS.index(way.engine))]
        way = way if way.engine == slowest else Way(slowest, "another rank's batch cannot be run faster")
        found.append((up_to, way))
        if slowest == fastest:
            break
    up_to, way = min(found, key=lambda one: WAYS.index(one[1].engine))
    if judged.ways:
        way = max(judged.ways[-1][1], way, key=lambda one: WAYS.index(one.engine))
    judged.ways.append((up_to, way))
    return _for_tokens(model, batch, way)


def _positions(config: Any) -> int | None:
    """How many positions a model has; None where its configuration names no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def rounded_up(length: int, config: Any) -> int:
    """The length to judge for: up to a quarter longer, within the model's positions."""
    step = max(_LEAST, 1 << max(length.bit_length() - 3, 0))
    longest, limit = -(-length // step) * step, _positions(config)
    return longest if limit is None else max(length, min(longest, limit))


def _one_by_one(model: nn.Module, batch: PairBatch) -> str:
    """Why what some texts show does not hold for others, so that each has to run alone; "" where it does."""
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, dict) and any(getattr(a, "alora_invocation_tokens", None) for a in adapters.values()):
        return "an aLoRA adapter is on from the last invocation tokens of a text, wherever they stand"
    sizes = [getattr(text_config(model), name, None) for name in _CHOICES]
    chosen = min((size for size in sizes if isinstance(size, int)), default=None)
    if chosen is None:
        return ""
    longest = torch.maximum(text_lengths(batch.rejected_mask), text_lengths(batch.chosen_mask)).max()
    if agreed(model, int(longest) + 1) <= chosen:
        return ""
    return f"its attention chooses {chosen} keys, and which of equal ones goes by the length of a text"


def _for_tokens(model: nn.Module, batch: PairBatch, way: Way) -> Way:
    """The way for this batch's tokens: a model whose positions skip padding tokens skips them within a text too."""
    if way.engine != "packed" or not way.first_position:
        return way
    padding = way.first_position - 1
    for one in texts(batch, alone=True):
        if bool((one.ids == padding).any()):
            return Way("unshared", f"a text holds the padding token {padding}, which the model's positions skip")
    return way


def _judge(model: nn.Module, batch: PairBatch, verdict: Verdict) -> Way:
    """The fastest exact way for these pairs. verdict: what is known of packing."""
    reason = verdict.reason
    with as_if_trained(model), probing(model):
        compare = _Comparison(model, batch)
        if verdict:
            off = compare.difference(pack(batch, first_position=verdict.first_position))
            if not agreed(model, bool(off)) and not verdict.first_position:
                return Way("packed")
            reason = off and f"packed logits differ from those of plain passes ({off})"
        if off := compare.difference(unshared(batch)):
            return Way("alone", f"texts beside others in a padded pass give other logits ({off})")
    return Way("unshared", reason) if reason or not verdict else Way("packed", "", verdict.first_position)


class _Comparison:
    """Logits against those of texts alone; what one rounding changes is measured where it is needed."""

    def __init__(self, model: nn.Module, batch: PairBatch) -> None:
        self.model, self.batch = model, batch
        self.wanted = two_pass_rows(model, batch, alone=True).logits.float()
        self.half = is_half(model)

    def difference(self, layout: Layout) -> str:
        """How far the logits of a layout are off, in words; "" where they are the same. An error is a difference."""
        try:
            size = self._size(layout_logits(self.model, layout).float() - self.wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does not like about such a call is a reason not to make it
            return f"{type(error).__name__}: {error}"
        scale = self._size(self.wanted)
        if not math.isfinite(scale):
            return ""  # the attack says so itself
        allowed = scale * (HALF_TOLERANCE if self.half else FLOAT32_TOLERANCE)
        if size <= allowed and not is_sharded(self.model):  # where sharded, all ranks make the same passes
            return ""
        with rounded_embeddings(self.model):
            noise = self._size(two_pass_rows(self.model, self.batch, alone=True).logits.float() - self.wanted)
        return "" if size <= max(allowed, ROUNDINGS * noise) else f"off by {size:.1e} of {scale:.1e}"

    def _size(self, values: Tensor) -> float:
        return largest(values, self.half)


def largest(values: Tensor, half: bool) -> float:
    """The largest entry; in half precision the worst row's root mean square. 0 without rows."""
    if not values.numel():
        return 0.0
    return float(values.float().square().mean(-1).max().sqrt() if half else values.abs().max())


@torch.no_grad()
def prefix_kept(model: nn.Module, layout: Layout) -> Layout:
    """`without_prefix` of a packed layout where that leaves its logits as they are, else the layout itself.

    Found out for a state of the model, and again for longer rows: a cache may let go of what is before a window.
    """
    compared: list[tuple[int, bool]] = remembered(model, "prefix kept", model_key(model), list)
    known = next((exact for longest, exact in compared if layout.shape[1] <= longest), None)
    if known is False or not layout.packed or is_sharded(model):
        return layout
    half = is_half(model)
    try:
        few = without_prefix(model, layout)
        if known is None and few is not layout:
            wanted = layout_logits(model, layout).float()
            allowed = largest(wanted, half) * (HALF_TOLERANCE if half else FLOAT32_TOLERANCE)
            known = largest(layout_logits(model, few).float() - wanted, half) <= allowed
            compared.append((layout.shape[1], known))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model does not like about such a call is a reason not to make it
        logger.info("%s runs prompts every step: %s", type(model).__name__, error)
        compared.append((layout.shape[1], False))
        return layout
    return few if known else layout


@contextmanager
def rounded_embeddings(model: nn.Module) -> Iterator[None]:
    """Within it, every entry of the embedding's output is one rounding up or down."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        sign = torch.arange(output.numel(), device=output.device).view_as(output) * 7919 // 64 % 2 * 2 - 1
        return (output * (1 + sign * torch.finfo(output.dtype).eps)).to(output.dtype)

    with hooked([(embedding, move)]):
        yield


def _largest_sum(logits: Tensor) -> float:
    """The largest sum of a row's absolute values; 0 without rows."""
    return float(torch.linalg.vector_norm(logits, 1, -1).max()) if len(logits) else 0.0


def _not_attackable(model: nn.Module, batch: PairBatch) -> tuple[str, str]:
    """(why no attack on this model means anything, why texts can only run alone), "" for no reason."""
    name = type(model).__name__
    ids = max((text.ids for text in texts(batch, alone=True)), key=lambda ids: ids.shape[1])
    kept = ids.shape[1] - max(1, ids.shape[1] // 4)
    other = ids.clone()
    other[:, kept:] = _others(ids[:, kept:], ids)
    run: Callable[[Tensor], Tensor] = lambda ids: model(input_ids=ids, use_cache=False).logits[0].float()  # noqa: E731
    try:
        with as_if_trained(model), probing(model):
            before = run(ids)
            if (answered := before.shape[0]) != ids.shape[1]:
                return (
                    f"{name} answers {ids.shape[1]} tokens with the logits of {answered}: it puts virtual "
                    "tokens before them, as prompt tuning does, which no engine supports; attack the model without "
                    "them, or use LoRA"
                ), ""
            scale, few = _largest_sum(before), slice(max(kept - _NEAR, 0), kept)
            before = before[few].clone()  # all logits take memory
            moved = _largest_sum(run(other)[few].sub_(before))
            allowed = scale * (HALF_TOLERANCE if is_half(model) else FLOAT32_TOLERANCE)
            if moved > allowed or is_sharded(model):  # where sharded, all ranks make the same passes
                with rounded_embeddings(model):
                    allowed = max(allowed, ROUNDINGS * _largest_sum(run(ids)[few].sub_(before)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{name} cannot be run plainly, on a text's tokens alone: {type(error).__name__}: {error}", ""
    if not moved > allowed:
        return "", ""  # also where they are not finite, which the attack says itself
    seen = f"other tokens at the end of a text move the logits before them by {moved / scale:.1%}"
    if moved < _LEAK * scale:
        return "", seen
    return f"{name} lets tokens see later ones: {seen}; an attack needs a causal language model", ""


def _others(ids: Tensor, text: Tensor) -> Tensor:
    """Tokens of the text, each another one than that of `ids` at its place (as far as the text has two)."""
    distinct = text.unique()
    return torch.where(ids == distinct[0], distinct[-1], distinct[0])


def agreed(model: nn.Module, value: int) -> int:
    """The largest of all ranks' values where the model is sharded, so that all make the same passes."""
    if not is_sharded(model):
        return value
    held = torch.tensor(int(value), device=next(model.parameters()).device)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    return int(held)


def is_half(model: nn.Module) -> bool:
    """Whether some of the model's weights are in half precision."""
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters_of(model))
