"""The attack: settings, a batch of pairs, the inner loop and what it returns."""

from ..model import Site, forget, resolve_sites
from .base_model import Left, adapters_off, left_by, left_in_base, takes_from_base
from .batch import PairBatch
from .completions import Completions, shared_layout, shared_prefix
from .directions import mean_difference, read_directions
from .graphs import forget_graphs
from .layout import Layout, pack, unshared
from .objective import Objective, kl_rows
from .passes import PairRows, layout_logits, layout_pass, two_pass_rows
from .pgd import LatentPGD
from .result import AttackResult
from .settings import ADVERSARIES, ENGINES, GRAPHS, NORMS, AttackSettings

LatentAttack = AttackResult  # its name until 0.2

__all__ = [
    "ADVERSARIES",
    "ENGINES",
    "GRAPHS",
    "NORMS",
    "AttackResult",
    "AttackSettings",
    "Completions",
    "LatentAttack",
    "LatentPGD",
    "Layout",
    "Left",
    "Objective",
    "PairBatch",
    "PairRows",
    "Site",
    "adapters_off",
    "forget",
    "forget_graphs",
    "kl_rows",
    "layout_logits",
    "layout_pass",
    "left_by",
    "left_in_base",
    "mean_difference",
    "pack",
    "read_directions",
    "resolve_sites",
    "shared_layout",
    "shared_prefix",
    "takes_from_base",
    "two_pass_rows",
    "unshared",
]
