"""Objective: preference losses by the formulas of their papers."""

from __future__ import annotations

import pytest
import torch

from lpa_kernels.attack import Objective


def test_the_objective_by_itself() -> None:
    """DPO and IPO of given token losses, from their papers' formulas."""
    token = torch.tensor([1.0, 2.0, 4.0, 0.5, 0.25])
    favoured = torch.tensor([True, True, True, False, False])
    example = torch.tensor([0, 0, 1, 0, 1])
    gap = torch.tensor([-3.0 + 0.5, -4.0 + 0.25])
    reference = torch.tensor([0.5, -1.0])
    dpo, _ = Objective({"dpo": 2.0}, beta=0.2, label_smoothing=0.1).combine(
        token, favoured, example, 2, (3, 2), reference
    )
    z = 0.2 * (gap - reference)
    assert float(dpo) == pytest.approx(float(2 * (-0.9 * z.sigmoid().log() - 0.1 * (-z).sigmoid().log()).mean()))
    ipo, terms = Objective({"ipo": 1.0}, beta=0.2).combine(token, favoured, example, 2, (3, 2))
    mean_gap = torch.tensor([-1.5 + 0.5, -4.0 + 0.25])
    assert float(ipo) == pytest.approx(float(((mean_gap - 2.5) ** 2).mean()))
    assert set(terms) == {"ipo"}
