"""The ops in Triton, for CUDA and ROCm GPUs; on a CPU under Triton's interpreter alone (TRITON_INTERPRET=1)."""

from .. import registry

try:
    import triton  # noqa: F401
except ImportError as error:
    registry.register_missing("triton", f"triton cannot be imported ({error}); pip install triton")
else:
    from . import perturb, token_loss, update

    registry.register("perturb", "triton", perturb.perturb, perturb.unsupported)
    registry.register("pgd_update_", "triton", update.pgd_update_, update.unsupported)
    registry.register("token_loss_", "triton", token_loss.token_loss_, token_loss.unsupported)
