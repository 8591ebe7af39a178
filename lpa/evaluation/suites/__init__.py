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

__all__ = ["ATTACKS", "SUITES", "Row", "Run", "Settings", "Suite"]
