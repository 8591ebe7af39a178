"""A fast, exact inner loop for latent adversarial training."""

from .attack import (
    AttackResult,
    AttackSettings,
    Completions,
    LatentAttack,
    LatentPGD,
    Objective,
    PairBatch,
    mean_difference,
    shared_prefix,
)
from .compat import EmbeddingSpaceAttack, clear_hooks, fused_latent_pgd, patch_latent_at, patch_trl
from .ops import PGDOptimizer, linear_token_loss, perturb, pgd_update_, project_, token_loss, token_loss_
from .ops import backends as _backends


def backends() -> str:
    """Print, and return, which op runs on which backend, and why one is absent."""
    table = _backends()
    print(table)
    return table


__all__ = [
    "AttackResult",
    "AttackSettings",
    "Completions",
    "EmbeddingSpaceAttack",
    "LatentAttack",
    "LatentPGD",
    "Objective",
    "PGDOptimizer",
    "PairBatch",
    "backends",
    "clear_hooks",
    "fused_latent_pgd",
    "linear_token_loss",
    "mean_difference",
    "patch_latent_at",
    "patch_trl",
    "perturb",
    "pgd_update_",
    "project_",
    "shared_prefix",
    "token_loss",
    "token_loss_",
]
