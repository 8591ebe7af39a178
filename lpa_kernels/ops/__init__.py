"""The ops: perturb, pgd_update_, token_loss_, and the faces built on them."""

from .functional import linear_token_loss, perturb, pgd_update_, project_, token_loss, token_loss_
from .optimizer import PGDOptimizer
from .reference import RULES
from .registry import backends, requested

__all__ = [
    "RULES",
    "PGDOptimizer",
    "backends",
    "linear_token_loss",
    "perturb",
    "pgd_update_",
    "project_",
    "requested",
    "token_loss",
    "token_loss_",
]
