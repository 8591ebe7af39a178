"""The suites by name."""

from .attacks import Attacks
from .base import ATTACKS, Row, Run, Settings, Suite
from .collapse import Collapse
from .harm import Harm
from .ladder import Ladder
from .overrefusal import OverRefusal
from .traits import Traits
from .utility import Utility

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (Traits(), Harm(), Attacks(), OverRefusal(), Utility(), Collapse(), Ladder())
}

_LADDER = (
    "ladder", "ladder_limit", "suffix_tokens", "suffix_steps", "suffix_rate", "erosion_steps", "best_of", "gcg_steps",
)  # fmt: skip
# settings that some suites alone read
READERS: dict[str, tuple[str, ...]] = {
    "sites": ("traits", "attacks"),
    **dict.fromkeys(("epsilons", "steps", "trait_prompt", "trait_epsilon", "trait_steps", "trait_limit"), ("traits",)),
    **dict.fromkeys(("attacks", "attack_epsilon", "attack_steps", "judge"), ("attacks",)),
    **dict.fromkeys(("utility_sets", "tasks", "utility_limit"), ("utility",)),
    **dict.fromkeys(_LADDER, ("ladder",)),
}

__all__ = ["ATTACKS", "READERS", "SUITES", "Row", "Run", "Settings", "Suite"]
