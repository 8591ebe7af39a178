"""Decide, from what a model does rather than what it is called, whether its pairs can be packed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.facts import model_key, remembered, text_config
from ..model.modes import as_if_trained, probing
from ..model.sites import decoder_layers
from ..model.walk import parameters_of
from .batch import PairBatch
from .layout import CHOSEN, REJECTED, Layout, pack, unshared
from .masks import IMPLEMENTATIONS, packed_masks
from .passes import layout_logits

_WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
_PROBE_WINDOW = 4
_ROUNDING = 1e-6  # of the largest logit; a completion that sees the other moves it by 1e-2 and more
FLOAT32_TOLERANCE = 2e-4  # of the largest logit; rounding gives 5e-6 at 30 layers, wrong positions 1e-2 to 1


@dataclass(frozen=True)
class Verdict:
    """Whether a model's pairs can be packed, and if not, why. True or False in a condition.

    Attributes:
        first_position: see `Layout`.
    """

    ok: bool
    reason: str = ""
    first_position: int = 0

    def __bool__(self) -> bool:
        return self.ok


def can_pack(model: nn.Module, length: int = 0) -> Verdict:
    """Whether packed pairs give the model's own results, exactly up to rounding.

    First what can be read off the model, then a probe: passes over two ragged pairs of a dozen tokens, in eval mode and
    without gradients. Windows and chunks are shortened to 4 tokens for it, in the configuration, so that they bind;
    windows of thousands could not be filled cheaply. It asks:

    - *use*: do the masks come from the library's mask functions, with the shortened window among them?
    - *isolation*: with other tokens in one completion, do the other's logits stay the same, to 1e-6 of the largest?
      (Masked keys add exact zeros, in any dtype. Where they do not stay, the arithmetic itself may mix tokens, as
      grouped experts do: then by no more than when only *another row* of the batch changes.)
    - *parity*: are the logits those of plain passes over the separate texts? In float32 within 2e-4 of the largest.
      Half precision hides small errors (other padding alone moves the bf16 logits of 30 layers as far as packing does),
      so there the second completion's must be less than half as far off as with positions that run on, and less than
      a tenth as far or twice as far as more padding moves them.

    Found out once for a state of the model (`facts.model_key`).

    Args:
        length: the longest row that is to be run, for models whose positions change meaning beyond some length.
    """
    verdict = remembered(model, "packs", model_key(model), partial(_verdict, model))
    limit = _length_limit(text_config(model)) if verdict else None
    if limit is not None and length > limit:
        return Verdict(False, f"its positions change meaning beyond {limit} tokens and rows have up to {length}")
    return verdict


def _verdict(model: nn.Module) -> Verdict:
    reason = _refusal(model, 0)
    padding = getattr(text_config(model), "pad_token_id", None)
    if "differ from separate passes" in reason and isinstance(padding, int) and not _refusal(model, padding + 1):
        return Verdict(True, "", padding + 1)  # roberta counts from behind its padding token's position
    return Verdict(not reason, reason)


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in parameters_of(model)}


def _refusal(model: nn.Module, first_position: int) -> str:
    try:
        return _read(model) or _probe(model, first_position)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model does not like about such a call is a reason not to make it
        return f"the probe raised {type(error).__name__}: {error}"


def _read(model: nn.Module) -> str:
    """Why the model cannot be packed as far as it says so itself; "" if it does not."""
    get: Any = getattr(model, "get_base_model", None)
    base: Any = model if get is None else get()
    if get is None and not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
        base = model.base_model.model  # type: ignore[union-attr]  # peft's mixed model has no such method
    config = text_config(base)
    if config is None:
        return f"{type(base).__name__} has no configuration"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        return f"its attention implementation is {implementation!r}, not one of {', '.join(IMPLEMENTATIONS)}"
    if getattr(base, "_is_stateful", False):
        return "it keeps a recurrent state"
    kinds = set(getattr(config, "layer_types", None) or ())
    others = {kind for kind in kinds if kind == "linear_attention" or not kind.endswith("_attention")}
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its forward takes no position_ids"
    if getattr(config, "alibi", False):
        return "its positions are alibi biases, by index"
    for module in decoder_layers(base).modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.RNNBase):
            return f"its blocks contain a {type(module).__name__}, which reads neighbours by index"
    return ""


def _length_limit(config: Any) -> int | None:
    """The longest row over which positions mean what they mean in a shorter one; None where there is no limit."""
    limits = []
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limits.append(original or config.max_position_embeddings)
    if getattr(config, "attn_temperature_tuning", False):  # a query scale by index, one step each floor_scale tokens
        limits.append(int(getattr(config, "floor_scale", 1)) - 1)
    return min(limits, default=None)


def _probe(model: nn.Module, first_position: int = 0) -> str:
    """Why the model, run on two pairs, cannot be packed; "" if it can."""
    with as_if_trained(model), probing(model), _short_windows(text_config(model)) as windows:
        batch = _pairs(model)
        layout = replace(pack(batch), first_position=first_position)
        with packed_masks(layout) as calls:
            base = layout_logits(model, layout)
        if not calls.count:
            return "it does not make its masks with the library's mask functions"
        if windows - calls.local_sizes:
            return "it has windows or chunks that are not in the library's mask functions"
        return _isolation(model, layout, base) or _parity(model, batch, layout, base)


def _pairs(model: nn.Module) -> PairBatch:
    """Two ragged pairs: prompts of 7 and 5 tokens, completions of 9 and 5, of 3 and 6."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = embeddings.weight.shape[0]
    step = max((vocabulary - 2) // 36, 1)  # all over it
    texts = torch.zeros(4, 16, dtype=torch.long)
    labels = torch.zeros(4, 16, dtype=torch.bool)
    spans = [((0, 7), (7, 16)), ((0, 7), (16, 21)), ((21, 26), (26, 29)), ((21, 26), (29, 35))]
    for row, (prompt, completion) in enumerate(spans):
        text = torch.cat([torch.arange(*prompt), torch.arange(*completion)])
        texts[row, : len(text)] = text
        labels[row, prompt[1] - prompt[0] : len(text)] = True
    texts = (1 + texts * step) % vocabulary
    padding = getattr(text_config(model), "pad_token_id", None)
    texts[texts == (-1 if padding is None else padding)] = vocabulary - 1  # positions may skip it
    attack = torch.zeros(2, 16, dtype=torch.bool)
    batch = PairBatch(texts[::2], labels[::2], texts[1::2], labels[1::2], attack)
    return batch.to(embeddings.weight.device)


def _isolation(model: nn.Module, layout: Layout, base: Tensor) -> str:
    """Why the completions are not independent of each other; "" if they are."""

    def moved(change: Tensor, rows: Tensor) -> float:
        """How far the logits of `rows` move when the tokens in `change` do."""
        ids = torch.where(change, layout.input_ids[:, :1], layout.input_ids)
        return float((layout_logits(model, replace(layout, input_ids=ids)) - base)[rows.to(base.device)].abs().max())

    # one pass for both directions: other rejected tokens in the first pair, other chosen ones in the second
    second = torch.arange(len(layout.branch), device=layout.branch.device)[:, None] == 1
    leak = moved(layout.branch == torch.where(second, CHOSEN, REJECTED), layout.rejected == (layout.example == 1))
    if leak <= _ROUNDING * float(base.abs().max()):  # 0, but for experts, whose sums may go by where memory lies
        return ""
    noise = moved(second.expand_as(layout.branch), layout.example == 0)
    if leak <= 4 * noise:
        return ""
    return f"one completion's tokens move the other's logits by {leak:.1e}, those of another row by {noise:.1e}"


def _parity(model: nn.Module, batch: PairBatch, layout: Layout, base: Tensor) -> str:
    """Why packed logits are not those of separate passes; "" if they are."""
    plain = layout_logits(model, unshared(batch))
    error, scale = float((base - plain).abs().max()), float(plain.abs().max())
    if error <= FLOAT32_TOLERANCE * scale:
        return ""
    if _dtypes(model) <= {torch.float32, torch.float64} and plain.device.type == "cpu":
        return f"packed logits differ from separate passes' by {error:.1e} of {scale:.1e}"
    # the rows within the second completion, where positions and indices differ
    where = layout.branch[layout.select_rows, layout.select_positions] == CHOSEN
    index = torch.arange(layout.shape[1], device=layout.branch.device).expand(layout.shape)
    others = {
        "packed": base,
        "wrong": layout_logits(model, replace(layout, position_ids=index)),
        "padded": layout_logits(model, unshared(batch, length=layout.shape[1])),
    }
    far = {name: _distance(logits, plain, where) for name, logits in others.items()}
    if far["packed"] <= far["wrong"] / 2 and far["packed"] <= max(far["wrong"] / 10, 2 * far["padded"]):
        return ""
    return (
        f"packed logits differ from separate passes' by {far['packed']:.1e}; positions that run on change them by "
        f"{far['wrong']:.1e}, more padding by {far['padded']:.1e}"
    )


def _distance(logits: Tensor, other: Tensor, where: Tensor) -> float:
    """The root mean square of the difference in the rows of `where`."""
    return float((logits.float() - other.float())[where.to(logits.device)].square().mean().sqrt())


@contextmanager
def _short_windows(config: Any) -> Iterator[set[int]]:
    """The configuration's windows and chunks cut to what the probe can fill; yields the sizes that must show."""
    layers = getattr(config, "layer_types", None)
    before = {}
    for name, kind in _WINDOWS.items():
        size = getattr(config, name, None)
        if size and (not layers or kind in layers):
            before[name] = size
    try:
        for name, size in before.items():
            setattr(config, name, min(size, _PROBE_WINDOW))
        yield {min(size, _PROBE_WINDOW) for size in before.values()}
    finally:
        for name, size in before.items():
            setattr(config, name, size)
