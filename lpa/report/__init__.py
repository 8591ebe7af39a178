"""One self-contained HTML page of evaluations and training runs."""

from .page import build
from .runs import ReportError

__all__ = ["ReportError", "build"]
