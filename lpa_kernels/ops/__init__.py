"""The ops: perturb, pgd_update_, token_loss_, and the faces built on them."""

from .functional import linear_token_loss, perturb, pgd_update_, project_, token_loss, token_loss_
from .optimizer import PGDOptimizer
from .registry import backends

__all__ = [
    "PGDOptimizer",
    "backends",
    "linear_token_loss",
    "perturb",
    "pgd_update_",
    "project_",
    "token_loss",
    "token_loss_",
]
