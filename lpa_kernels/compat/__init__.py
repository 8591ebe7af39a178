"""Drop-in replacements for the inner loops of public code bases."""

from .continuous_advtrain import EmbeddingSpaceAttack
from .latent_at import clear_hooks, fused_latent_pgd, patch_latent_at
from .trl import patch_trl

__all__ = ["EmbeddingSpaceAttack", "clear_hooks", "fused_latent_pgd", "patch_latent_at", "patch_trl"]
