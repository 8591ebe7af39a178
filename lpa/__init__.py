"""Latent Personality Alignment: data, trainer, evaluation and command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LPAConfig
    from .evaluation import evaluate
    from .evaluation.measure import measure
    from .training.trainer import LPATrainer

__all__ = ["LPAConfig", "LPATrainer", "evaluate", "measure"]

_HOMES = {
    "LPAConfig": "config",
    "LPATrainer": "training.trainer",
    "evaluate": "evaluation",
    "measure": "evaluation.measure",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and `lpa --help` must not
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
