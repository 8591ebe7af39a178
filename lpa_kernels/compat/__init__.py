"""Drop-in replacements, one file a foreign code base."""

from .continuous_advtrain import EmbeddingSpaceAttack
from .latent_at import clear_hooks, fused_latent_pgd, patch_latent_at

__all__ = ["EmbeddingSpaceAttack", "clear_hooks", "fused_latent_pgd", "patch_latent_at"]
