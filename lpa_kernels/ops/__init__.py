"""The ops: perturb, pgd_update_, token_loss_, and the faces built on them."""

from .registry import backends

__all__ = ["backends"]
