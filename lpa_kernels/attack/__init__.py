"""The attack: pairs, sites, the inner loop and what it returns."""

from .attack import LatentAttack
from .batch import PairBatch
from .objective import Objective, PairRows
from .pgd import LatentPGD
from .sites import Site, resolve_sites

__all__ = ["LatentAttack", "LatentPGD", "Objective", "PairBatch", "PairRows", "Site", "resolve_sites"]
