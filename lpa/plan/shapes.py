"""The batch that a plan is made for, and models of it: weights of a configuration that take no memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lpa_kernels.attack import AttackSettings, PairBatch
from lpa_kernels.attack.layout import Layout, pack, unshared

FOUR_BIT, FOUR_BIT_NESTED, EIGHT_BIT = "4-bit", "4-bit nested", "8-bit"


@dataclass(frozen=True)
class PlanShape:
    """How long the rows are, in tokens: prompts with their template, both completions, benign prompts and answers."""

    prompt: int = 64
    completion: int = 8
    benign_prompt: int = 64
    benign_answer: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name}={value} tokens must be at least 1")

    def pairs(self, size: int, attack_on: str) -> PairBatch:
        """`size` pairs of these lengths, as `PairCollator` makes them; the completions share no token."""
        length = self.prompt + self.completion
        ids = torch.zeros(2, size, length, dtype=torch.long)
        ids[1, :, self.prompt :] = 1
        answer = (torch.arange(length) >= self.prompt).expand(size, length)
        attacked = torch.zeros(size, length, dtype=torch.bool)
        if "prompt" in attack_on:
            attacked |= ~answer
        if "completions" in attack_on:
            attacked |= answer
        return PairBatch(ids[0], answer, ids[1], answer, attacked)

    def benign(self, size: int) -> tuple[Tensor, Tensor]:
        """(ids, mask) of as many benign rows."""
        length = self.benign_prompt + self.benign_answer
        mask = (torch.arange(length) >= self.benign_prompt).expand(size, length)
        return torch.zeros(size, length, dtype=torch.long), mask


class _SameMask(dict[object, Any]):
    """The masks of a layout on the meta device: whichever is asked for, one of its shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        implementation, dtype = key[:2]
        rows, length = self.shape
        if not dict.__contains__(self, implementation):
            kind = torch.bool if implementation == "sdpa" else dtype
            self[implementation] = torch.empty(rows, 1, length, length, dtype=kind, device="meta"), None
        return dict.__getitem__(self, implementation)


def to_meta(value: Any) -> Any:
    """A copy of an object whose tensors are on the meta device; plain attributes and groups are gone into."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [to_meta(part) for part in value]
    if isinstance(value, Layout):
        names = [field.name for field in fields(value) if field.init]
        layout = Layout(**{name: to_meta(getattr(value, name)) for name in names})
        object.__setattr__(layout, "masks", _SameMask(layout.shape))
        return layout
    if hasattr(value, "__dict__") and not isinstance(value, AttackSettings):
        for name, part in vars(value).items():
            setattr(value, name, to_meta(part))
    return value


def laid_out(batch: PairBatch, packed: bool) -> Layout:
    """The layout of a batch, on the CPU."""
    return pack(batch) if packed else unshared(batch)


def build(config: Any, *, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device, in eval mode."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        ).eval()


class _Dequantised(torch.autograd.Function):
    """A product with weights that are made anew from few bits, in forward and backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype, device=x.device).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ torch.empty(ctx.shape, dtype=grads[0].dtype, device=grads[0].device), None, None


class _QuantizedLinear(nn.Linear):
    def __init__(self, plain: nn.Linear, kind: str) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        weights = plain.in_features * plain.out_features
        # values, and their scales: float32 for 64 weights, or 8 bits for them and float32 for 256 of those; one a row
        size = {
            FOUR_BIT: weights // 2 + 4 * (weights // 64),
            FOUR_BIT_NESTED: weights // 2 + weights // 64 + 4 * (weights // (64 * 256)),
            EIGHT_BIT: weights + 4 * plain.out_features,
        }[kind]
        self.weight = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Dequantised.apply(x, self.weight, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


def quantize(model: Any, kind: str) -> None:
    """Put layers of few bits in the place of the linear ones, but for the head, as transformers does."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(path, _QuantizedLinear(module, kind))
