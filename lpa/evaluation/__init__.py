"""Measure harm, benign controls, robustness and utility of a model and its adapters, side by side."""

from .records import Records
from .session import Evaluation, evaluate
from .sets import HARM_SETS, PromptSet, benign_prompts, load_set
from .subjects import BASE, EvaluationError
from .suites import SUITES, Row, Settings

__all__ = [
    "BASE",
    "HARM_SETS",
    "SUITES",
    "Evaluation",
    "EvaluationError",
    "PromptSet",
    "Records",
    "Row",
    "Settings",
    "benign_prompts",
    "evaluate",
    "load_set",
]
