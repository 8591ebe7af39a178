"""What a run will need, found by running it on tensors that have shapes and no memory."""

from .dry_run import Estimate, estimate
from .shapes import PlanShape

__all__ = ["Estimate", "PlanShape", "estimate"]
