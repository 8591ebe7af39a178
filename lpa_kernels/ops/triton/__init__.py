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
    from . import gate, launch, norm, perturb, token_loss, update

    def _refusal(op: str) -> Callable[..., str | None]:
        required = getattr(requirements, op)

        def unsupported(first: Tensor, *rest: Any) -> str | None:
            return required(first, *rest) or launch.unavailable(first)

        return unsupported

    for _kernel in (
        perturb.perturb,
        update.pgd_update_,
        token_loss.token_loss_,
        norm.add_norm,
        norm.add_norm_backward,
        gate.swiglu,
        gate.swiglu_backward_,
    ):
        registry.register(_kernel.__name__, "triton", _kernel, _refusal(_kernel.__name__))
