"""The variants piece: what might make the packed engine faster, each against it as it is, with what was expected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.loop_cases import Shape, model_of, ours
from lpa_kernels.attack import pgd
from lpa_kernels.attack.layout import pack

from .inner import STEPS, blocks, timed
from .shapes import shape
from .worker import Cases, Setting, Skip


def norms_of(model: nn.Module) -> list[Any]:
    """The RMS norms of a Llama or a Qwen3."""
    return [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and hasattr(m, "variance_epsilon")]


@contextmanager
def norms(own: Shape, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, every RMS norm is forward(x, weight, eps)."""
    found = norms_of(model_of(own))
    if not found:
        raise Skip("the model has no RMS norms")
    for norm in found:
        norm.forward = partial(lambda norm, x: forward(x, norm.weight, norm.variance_epsilon), norm)
    try:
        yield
    finally:
        for norm in found:
            del norm.forward


def torch_norms(own: Shape, dry: bool) -> AbstractContextManager[None]:
    return norms(own, lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))


def liger_norms(own: Shape, dry: bool) -> AbstractContextManager[None]:
    need_liger()
    from liger_kernel.transformers.functional import liger_rms_norm

    return norms(own, lambda x, weight, eps: liger_rms_norm(x, weight, eps, in_place=False))


def need_liger() -> None:
    if not importlib.util.find_spec("liger_kernel"):
        raise Skip("liger_kernel is not installed")
    if not torch.cuda.is_available():
        raise Skip("Liger's kernels need a GPU")


@contextmanager
def liger_all(own: Shape, dry: bool) -> Iterator[None]:
    """Liger's rotary embedding and SwiGLU's product too."""
    need_liger()
    from liger_kernel.transformers.functional import liger_rope, liger_swiglu

    model = model_of(own)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    blocks = [m for m in model.modules() if type(m).__name__.endswith("MLP")]
    for block in blocks:
        block.forward = partial(
            lambda block, x: block.down_proj(liger_swiglu(block.gate_proj(x), block.up_proj(x))), block
        )
    rope = f"{type(module).__module__}.apply_rotary_pos_emb"
    try:
        with liger_norms(own, dry), mock.patch(rope, lambda q, k, cos, sin, **_: liger_rope(q, k, cos, sin)):
            yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def float_masks(own: Shape, dry: bool) -> Iterator[None]:
    """The mask as the numbers to add, made once a layout: torch makes them of a bool mask in every layer."""
    plain = F.scaled_dot_product_attention
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            if id(attn_mask) not in made:
                zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
                made[id(attn_mask)] = attn_mask, zeros.masked_fill_(~attn_mask, float("-inf"))
            attn_mask = made[id(attn_mask)][1]
        return plain(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def multiples_of_16(own: Shape, dry: bool) -> AbstractContextManager[Any]:
    """Rows as long as a graph's are: sdpa's kernel pads a mask of any other length, in every layer."""
    return mock.patch.object(pgd, "pack", partial(pack, bucket=16))


def kernel(backend: SDPBackend) -> Callable[[Shape, bool], AbstractContextManager[Any]]:
    return lambda own, dry: sdpa_kernel(backend)


@contextmanager
def eager_attention(own: Shape, dry: bool) -> Iterator[None]:
    model: Any = model_of(own)
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        expected: share of the plain engine's time that it should take, as (at 16 pairs, at 2), and `why`, written
            before anything was measured.
        around: what the model is put under. options: of `LatentPGD`, beside the packed engine.
        capture: whether it is also tried captured.
    """

    expected: tuple[float, float]
    why: str
    around: Callable[[Shape, bool], AbstractContextManager[Any]] = lambda own, dry: nullcontext()
    options: tuple[tuple[str, Any], ...] = ()
    capture: bool = True


VARIANTS = {
    "as it is": Variant((1.0, 1.0), "the yardstick"),
    "compiled blocks": Variant(
        (0.80, 0.65), "norms, rotation, gate and residual sums of a block in a few kernels: most of the bytes that are "
        "not weights; LoRA's sums no longer ride on its products", blocks,
    ),
    "compiled blocks, merged adapters": Variant(
        (0.70, 0.55), "the same without LoRA's products and sums", blocks, (("merge_adapters", True),)
    ),
    "torch's fused norms": Variant(
        (0.83, 0.83), "a bf16 norm moves some 60 times its input's bytes, forward and backward; fused, 5 times",
        torch_norms,
    ),
    "torch's fused norms, merged adapters": Variant(
        (0.76, 0.67), "both, without a compiler", torch_norms, (("merge_adapters", True),)
    ),
    "Liger's norms": Variant((0.83, 0.83), "as torch's", liger_norms),
    "Liger's norms, rotary embedding, SwiGLU": Variant(
        (0.77, 0.75), "beside the norms, half of the gate's bytes and five sixths of the rotation's", liger_all
    ),
    "merged adapters": Variant(
        (0.94, 0.80), "LoRA is 2% of the operations, but its sums read and write every output and gradient once more; "
        "merging itself moves some 100 GB an attack", options=(("merge_adapters", True),),
    ),
    "float mask": Variant((0.99, 0.95), "saves making numbers of a bool mask in every layer", float_masks),
    "rows of a multiple of 16": Variant(
        (1.0, 0.97), "142 tokens become 144, 1.4% more work, but sdpa need not pad the mask; a graph's are so anyway",
        multiples_of_16, capture=False,
    ),
    "memory-efficient attention": Variant(
        (1.0, 1.0), "what sdpa should choose by itself, as there is a mask", kernel(SDPBackend.EFFICIENT_ATTENTION)
    ),
    "cuDNN attention": Variant((0.99, 1.0), "attention is 1% of the operations", kernel(SDPBackend.CUDNN_ATTENTION)),
    "eager attention": Variant(
        (1.1, 1.2), "writes [B, heads, L, L] several times, 21 MB each at 16 pairs", eager_attention
    ),
}  # fmt: skip


def variant(name: str, own: Shape, dry: bool, captured: bool) -> dict[str, Any]:
    """One variant's time, and what was expected of it."""
    chosen = VARIANTS[name]
    if captured and not torch.cuda.is_available():
        raise Skip("CUDA graphs need a GPU")
    if "cuDNN" in name and not torch.cuda.is_available():
        raise Skip("cuDNN needs a GPU")
    if "memory-efficient" in name and not torch.cuda.is_available():
        raise Skip("the CPU has no such kernel")
    options = {"engine": "packed", "capture_graph": captured} | dict(chosen.options)
    with chosen.around(own, dry):
        found = timed(lambda: ours(own, STEPS, **options), own, STEPS, 1 if dry else 3)
    return found | {"expected share": chosen.expected[own.pairs == 2]}


def variants(setting: Setting) -> Cases:
    """The piece; argument: FAMILY-PAIRS."""
    family, pairs = setting.argument.split("-")
    own, dry = shape(family, int(pairs), setting.dry), setting.dry
    for captured in (True, False):
        for name, chosen in VARIANTS.items():
            if (captured and not chosen.capture) or (dry and "compiled" in name):  # a dry run compiles in another piece
                continue
            full = f"{name}, captured" if captured else name
            yield full, lambda name=name, captured=captured: variant(name, own, dry, captured)
