"""Make transformers build the attention masks of a packed layout, through its own mask functions."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from .layout import PADDING, PREFIX, Layout

IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass
class MaskCalls:
    """What the mask functions were asked for while a layout was active: the probe's evidence.

    Attributes:
        count: the number of masks asked for.
        local_sizes: the windows and chunk sizes among them.
    """

    count: int = 0
    local_sizes: set[int] = field(default_factory=set)


_active: ContextVar[tuple[Layout, MaskCalls] | None] = ContextVar("packed_layout", default=None)
_lock = threading.Lock()
_users = 0
_installed: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # ours, the library's


@contextmanager
def packed_masks(layout: Layout) -> Iterator[MaskCalls]:
    """Within it, every attention mask that a transformers model asks for is that of `layout`.

    A query sees the keys that the library's own pattern (causal, sliding window, chunks) allows at their *position
    ids*, of those on its own branch and, from a completion, in the shared prefix. Padding sees itself alone.
    The model must be called with the layout's `input_ids` (or their embeddings), `attention_mask`, `position_ids`
    and `use_cache=False`, and its attention be "eager" or "sdpa". Each mask is made once a layout and kept in it.

    The layout is active in this context (thread, task) alone; contexts may be nested, and other threads' models get
    the library's masks. The library's functions are put back when the last context ends, by an exception too.

    Yields:
        The count of masks asked for so far, shared with a context around this one for the same layout.

    Raises:
        ValueError: (from within the model) the pattern is not a function of positions, or lets a token see a later
            one, or the shape is not the layout's.
    """
    outer = _active.get()
    calls = outer[1] if outer is not None and outer[0] is layout else MaskCalls()
    _install()
    token = _active.set((layout, calls))
    try:
        yield calls
    finally:
        _remove()
        _active.reset(token)


def visible(layout: Layout) -> Tensor:
    """[B, L, K + L] bool: whether query i may see key j as far as branches go (the pattern comes on top)."""
    query, key = layout.branch[:, :, None], layout.keys[0][:, None, :]
    return (query == key) | ((query > PREFIX) & (key == PREFIX))


def _install() -> None:
    global _users
    with _lock:
        if _users == 0:
            for name in IMPLEMENTATIONS:
                original = ALL_MASK_ATTENTION_FUNCTIONS[name]
                _installed[name] = (_wrapped(original, name), original)
                AttentionMaskInterface.register(name, _installed[name][0])
        _users += 1


def _remove() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for name in IMPLEMENTATIONS:
                ours, original = _installed.pop(name)
                if ALL_MASK_ATTENTION_FUNCTIONS[name] is ours:  # else somebody put theirs over it
                    AttentionMaskInterface.register(name, original)


def _wrapped(original: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        active = _active.get()
        if active is None:
            return original(*args, **kwargs)
        layout, calls = active
        calls.count += 1
        if kwargs.get("local_size") is not None:
            calls.local_sizes.add(int(kwargs["local_size"]))
        return _mask(layout, implementation, **kwargs)

    return mask


def _mask(
    layout: Layout,
    implementation: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: Any,
) -> Tensor:
    """[B, 1, L, K + L]: bool for sdpa, True where seen; for eager 0 there and the least number of `dtype` elsewhere."""
    if (batch_size, q_length, kv_length) != (*layout.shape, layout.keys[0].shape[1]):
        raise ValueError(
            f"an attention mask of batch {batch_size}, {q_length} queries and {kv_length} keys was asked for while a "
            f"layout of shape {layout.shape} is active; call the model with its tokens and use_cache=False"
        )
    if use_vmap:
        raise ValueError("the model adds a mask function of its own, which may read indices; it cannot be packed")
    device = torch.device(device)
    key = (
        implementation,
        dtype if implementation == "eager" else None,
        device,
        _fingerprint(mask_function, batch_size),
    )
    if key not in layout.masks:

        def make(layout: Layout) -> Tensor:
            with torch.inference_mode(False):  # a mask first asked for there must serve a pass with gradients later
                seen = _evaluate(layout, mask_function).to(device)
                if implementation == "eager":
                    zero = torch.zeros((), dtype=dtype, device=device)
                    seen = torch.where(seen, zero, torch.finfo(dtype).min)
                return seen

        layout.masks[key] = make(layout), make
    return layout.masks[key][0]


def refill_masks(layout: Layout) -> None:
    """Make the masks of a layout again, where they are, after its tensors were changed in place."""
    for mask, make in layout.masks.values():
        mask.copy_(make(layout))


def _evaluate(layout: Layout, mask_function: Callable[..., Tensor]) -> Tensor:
    """[B, 1, L, K + L] bool: the pattern at position ids, and visibility, and the diagonal for padding."""
    rows, length = layout.shape
    positions = layout.keys[1]
    device = layout.branch.device
    row = torch.arange(rows, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    query, key = layout.position_ids[:, None, :, None], positions[:, None, None, :]
    pattern = mask_function(row, head, query, key).expand(rows, 1, length, positions.shape[1])
    seen = pattern & visible(layout)[:, None]
    padding = (layout.branch == PADDING)[:, None, :, None]
    if bool((seen & (key > query) & ~padding).any()):
        raise ValueError("the model's attention lets a token see later ones; it cannot be packed")
    diagonal = torch.ones(length, positions.shape[1], dtype=torch.bool, device=device)
    diagonal = diagonal.tril(offset := positions.shape[1] - length).triu(offset)
    return torch.where(padding, diagonal, seen)


def _fingerprint(pattern: object, rows: int) -> object:
    """What makes two mask functions the same one: their code and, at any depth, the values they close over.

    The library makes its closures anew in every forward, so identity says nothing. A tensor counts by its shape
    only: the one kind there is here, the left padding of each row for chunks, follows from the layout.
    """
    if isinstance(pattern, FunctionType):
        cells = (cell.cell_contents for cell in pattern.__closure__ or ())
        return (pattern.__code__, *(_fingerprint(content, rows) for content in cells))
    if isinstance(pattern, tuple | list):
        return tuple(_fingerprint(part, rows) for part in pattern)
    if isinstance(pattern, Tensor):
        if pattern.shape != (rows,):
            raise ValueError(
                f"the model's mask pattern reads a tensor of shape {tuple(pattern.shape)}, which may go by index; "
                "it cannot be packed"
            )
        return tuple(pattern.shape)
    if pattern is None or isinstance(pattern, bool | int | float | str):
        return pattern
    raise ValueError(f"the model's mask pattern depends on {type(pattern).__name__}; it cannot be packed")
