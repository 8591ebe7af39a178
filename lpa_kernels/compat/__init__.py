"""Drop-in replacements, one file a foreign code base."""

from .latent_at import clear_hooks, fused_latent_pgd

__all__ = ["clear_hooks", "fused_latent_pgd"]
