"""TRL's DPO, GRPO and RLOO trainers (trl 1.16), unmodified, with a prompt run once for all of its completions."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from types import CodeType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import Completions, Layout, layout_pass, shared_layout
from ..model import as_if_trained, hooked, known, model_key, probing, remembered, say_once
from .patch import Patch, find_in, foreign_module, imports

NAME = "add_fused_lm_head"  # what `patch_trl` replaces
HOME = "trainer.utils"  # its submodule
KNOWN = "1.16"
PARAMETERS = {"model", "temperature", "cast_lm_head_to_fp32", "outputs"}
KEYWORDS = {"fused_lm_head", "labels", "shift_labels", "num_items_in_batch"}  # of the forward that it gives a model
FIELDS = {
    "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
}  # fmt: skip
_SHARED = {"input_ids", "attention_mask", "use_cache"}  # a call with more than these runs as TRL runs it
_OFF = 0.02  # of the log-probabilities' mean: half precision gives less, another meaning of an argument more


def patch_trl(package_or_module: str | ModuleType | None = None) -> Patch:
    """Let TRL's trainers run the prompt of several completions once, in policy and reference passes.

    Trainers made from then on share prompts: `DPOTrainer` with every loss (IPO, and pairs in the manner of KTO and NCA,
    too), precomputed reference passes, LoRA, full fine-tuning and checkpointed activations, and `GRPOTrainer` and
    `RLOOTrainer`, whose many completions of a prompt share it. Losses and metrics are computed by TRL's own code, from
    its own head: only the decoder's pass is another one, that of `shared_prefix`, which is exact where a probe of the
    model says so. Texts without a common prompt, images, and router losses run as before. A trainer keeps what it was
    made with after `undo`.

    Args:
        package_or_module: the package or module that has `add_fused_lm_head`, itself or its name; "trl" by default.

    Returns:
        A handle whose `.undo()` puts TRL's function back; also a context manager.

    Raises (and changes nothing):
        ImportError: no such package.
        TypeError: neither a name nor a module.
        ValueError: a version whose functions differ from those of trl 1.16; the message says in what.
        RuntimeError: it is patched already.

    Example:
        with patch_trl():
            trainer = DPOTrainer(model, args=args, train_dataset=dataset)
    """
    module = foreign_module("trl" if package_or_module is None else package_or_module)
    found = find_in(module, (NAME,))[NAME]
    if not found and imports(module, HOME):
        found = find_in(module, (NAME,))[NAME]
    if not found:
        raise ValueError(f"{_named(module)} has no {NAME}; this patch is for trl {KNOWN}. Nothing was patched")
    if any(hasattr(theirs, "_lpa_patch") for theirs in found):
        raise RuntimeError(f"{module.__name__} is patched already; call .undo() of the first patch before another one")
    for theirs in found:
        _check(module, theirs)
    return Patch(module, [(theirs, _replacing(theirs)) for theirs in found], lambda: None)


def _named(module: ModuleType) -> str:
    try:
        return f"{module.__name__} {importlib.metadata.version(module.__name__.partition('.')[0])}"
    except importlib.metadata.PackageNotFoundError:
        return module.__name__


def _check(module: ModuleType, theirs: Callable[..., Any]) -> None:
    """Refuse a function, a forward or an output class that is not as in the version known here.

    Raises:
        ValueError: what differs.
    """
    inside = [code for code in theirs.__code__.co_consts if isinstance(code, CodeType)]
    keywords = {name for code in inside for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    output = theirs.__globals__.get("FusedCausalLMOutput")
    fields = {field.name for field in dataclasses.fields(output)} if dataclasses.is_dataclass(output) else set()
    parameters = set(inspect.signature(theirs).parameters)
    for what, have, want in (
        (f"{NAME}'s parameters", parameters, PARAMETERS),
        ("its forward's keywords", keywords & KEYWORDS, KEYWORDS),
        ("FusedCausalLMOutput's fields", fields, FIELDS),
    ):
        if have != want:
            raise ValueError(
                f"{_named(module)} is of a version that this patch does not know: {what} lack {sorted(want - have)} "
                f"and have {sorted(have - want)} beside those of trl {KNOWN}. Nothing was patched"
            )


def _replacing(theirs: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(theirs)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        theirs(model, *args, **kwargs)
        model.forward = MethodType(_sharing(model.forward), model)

    add_fused_lm_head._lpa_patch = True  # type: ignore[attr-defined]
    return add_fused_lm_head


def _sharing(theirs: MethodType) -> Callable[..., Any]:
    """A forward that runs a prompt once where it can, and is `theirs` elsewhere."""

    @functools.wraps(theirs.__func__)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layout = None
        if kwargs.get("fused_lm_head") and not args and (texts := _texts(self, kwargs)) is not None:
            layout = _layout(self, theirs, texts, kwargs)
        return theirs(*args, **kwargs) if layout is None else _shared(self, theirs, layout, kwargs["labels"])

    return forward


def _texts(model: Any, kwargs: dict[str, Any]) -> Completions | None:
    """The texts of a call, moved to the left where they are padded there.

    None where the call asks for more, or no two texts have a prompt in common.
    """
    given = {name for name, value in kwargs.items() if value is not None} - {"fused_lm_head", "labels"}
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
    if given - _SHARED or labels is None or ids is None or ids.dim() != 2 or labels.shape != ids.shape:
        return None
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    attention = kwargs.get("attention_mask")
    there = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
    if there.shape != ids.shape:
        return None
    columns = torch.arange(ids.shape[1], device=ids.device)
    first = there.long().argmax(1)[:, None]
    scored = labels != -100
    one_piece = there == ((columns >= first) & (columns < first + there.sum(1, keepdim=True)))
    if not bool(one_piece.all()) or bool((scored & ~(there & (columns > first))).any()):
        return None
    index = (columns + first) % ids.shape[1]
    texts = Completions(ids.gather(1, index), scored.gather(1, index))
    return texts if len(texts.groups.unique()) < len(ids) else None


def _layout(model: nn.Module, theirs: MethodType, texts: Completions, kwargs: dict[str, Any]) -> Layout | None:
    """How to run the texts: prompts shared where that is less work; None where they are run as TRL runs them."""
    with known(model):
        try:
            layout, reason = shared_layout(model, texts)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            layout, reason = None, str(error)
        if not reason and layout is not None:
            reason = _compared(model, theirs, layout, kwargs)
    if reason:
        say_once(model, f"{type(model).__name__} runs prompts once for each of their completions: {reason}")
    return None if reason else layout


def _compared(model: nn.Module, theirs: MethodType, layout: Layout, kwargs: dict[str, Any]) -> str:
    """Why shared passes are not TRL's own, "" where they are; asked anew for rows longer than those compared so far."""
    new: dict[int, str] = {}  # by the longest row, in the order found
    found = remembered(model, "trl", model_key(model), lambda: new)
    for longest, reason in found.items():
        if layout.shape[1] <= longest:
            return reason
    found[layout.shape[1]] = _difference(model, theirs, layout, kwargs["labels"], kwargs)
    return found[layout.shape[1]]


def _difference(model: nn.Module, theirs: MethodType, layout: Layout, labels: Tensor, kwargs: dict[str, Any]) -> str:
    """How log-probabilities of a shared pass differ from TRL's own on the batch at hand; "" if by rounding alone."""
    with as_if_trained(model), probing(model):
        ours, plain = _shared(model, theirs, layout, labels).log_probs, theirs(**kwargs).log_probs
    off, scale = float((ours - plain).abs().mean()), float(plain.abs().mean())
    return "" if off <= _OFF * scale else f"its log-probabilities differ from TRL's own by {off:.1e} of {scale:.1e}"


def _shared(model: Any, theirs: MethodType, layout: Layout, labels: Tensor) -> Any:
    """What TRL's forward returns for `labels` [N, L], computed on a layout."""

    def select(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state.flatten(0, 1)
        output.last_hidden_state = hidden.index_select(0, layout.places.to(hidden.device))[None]
        return output

    with layout_pass(model, layout) as inputs, hooked(after=[(model.base_model, select)]):
        found = theirs(**inputs, use_cache=False, fused_lm_head=True, shift_labels=layout.labels[None])
    scored = labels[:, 1:] != -100
    for name, value in list(found.items()):
        if isinstance(value, Tensor) and value.shape == (1, len(layout.labels)):
            grid = value.new_zeros(scored.shape)
            found[name] = grid.masked_scatter(scored.to(value.device), value[0])
    return found
