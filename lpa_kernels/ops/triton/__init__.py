"""The ops in Triton, for CUDA and ROCm GPUs; on a CPU under Triton's interpreter alone (TRITON_INTERPRET=1)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import registry, requirements

try:
    import triton  # noqa: F401
except ImportError as error:
    registry.register_missing("triton", f"triton cannot be imported ({error}); pip install triton")
else:
    from . import attention, gate, launch, norm, perturb, token_loss, update

    def _refusal(op: str) -> Callable[..., str | None]:
        required = getattr(requirements, op)

        def unsupported(first: Tensor, *rest: Any) -> str | None:
            return required(first, *rest) or launch.unavailable(first)

        return unsupported

    def _attention_refusal(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, *rest: Any) -> str | None:
        return attention.unsupported(q, cos) or _refusal("attention")(q, k, v, cos, *rest)

    def _attention_backward_refusal(*args: Any) -> str | None:
        return attention.unsupported(args[1], args[9]) or _refusal("attention_backward_")(*args)

    def _rotate_refusal(q: Tensor, k: Tensor, cos: Tensor, *rest: Any) -> str | None:
        return attention.unsupported(q, cos) or _refusal("rotate_")(q, k, cos, *rest)

    def _add_norm_refusal(x: Tensor, residual: Tensor | None, low: Tensor | None, *rest: Any) -> str | None:
        return _refusal("add_norm")(x, residual, low, *rest) or norm.unsupported(x, low)

    registry.register("add_norm", "triton", norm.add_norm, _add_norm_refusal)
    registry.register("rotate_", "triton", attention.rotate_, _rotate_refusal)
    registry.register("attention", "triton", attention.attention, _attention_refusal)
    registry.register("attention_backward_", "triton", attention.attention_backward_, _attention_backward_refusal)
    for _kernel in (
        perturb.perturb,
        update.pgd_update_,
        token_loss.token_loss_,
        norm.add_norm_backward,
        gate.swiglu,
        gate.swiglu_backward_,
    ):
        registry.register(_kernel.__name__, "triton", _kernel, _refusal(_kernel.__name__))
