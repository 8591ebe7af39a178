"""The attack: pairs, sites, the inner loop and what it returns."""

from ..model import Site, resolve_sites
from .attack import LatentAttack
from .batch import PairBatch
from .capture import forget
from .head import output_head, selected_logits
from .objective import Objective, PairRows, kl_rows
from .packing import unshared
from .pgd import ENGINES, NORMS, LatentPGD
from .reference import adapters_off, two_pass_rows

__all__ = [
    "ENGINES",
    "NORMS",
    "LatentAttack",
    "LatentPGD",
    "Objective",
    "PairBatch",
    "PairRows",
    "Site",
    "adapters_off",
    "forget",
    "kl_rows",
    "output_head",
    "resolve_sites",
    "selected_logits",
    "two_pass_rows",
    "unshared",
]
