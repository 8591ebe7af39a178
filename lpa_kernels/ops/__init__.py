"""The ops: of the attack (perturb, pgd_update_, token_loss_) and of a frozen block, and the faces built on them."""

from . import block_reference, native, reference, triton  # noqa: F401  each registers what it has, or why it is absent
from .block import (
    Stream,
    add_norm,
    add_norm_backward,
    attention,
    attention_backward_,
    rotate_,
    swiglu,
    swiglu_backward_,
)
from .block_reference import seen_by
from .functional import (
    THRESHOLD,
    linear_token_loss,
    no_autocast,
    norm_named,
    perturb,
    pgd_update_,
    project_,
    rule_named,
    token_loss,
    token_loss_,
)
from .optimizer import PGDOptimizer
from .reference import NORMS, RULES, gather_grad
from .registry import backends, note, noted, requested

__all__ = [
    "NORMS",
    "RULES",
    "THRESHOLD",
    "PGDOptimizer",
    "Stream",
    "add_norm",
    "add_norm_backward",
    "attention",
    "attention_backward_",
    "backends",
    "gather_grad",
    "linear_token_loss",
    "no_autocast",
    "norm_named",
    "note",
    "noted",
    "perturb",
    "pgd_update_",
    "project_",
    "requested",
    "rotate_",
    "rule_named",
    "seen_by",
    "swiglu",
    "swiglu_backward_",
    "token_loss",
    "token_loss_",
]
