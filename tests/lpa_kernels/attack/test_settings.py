"""AttackSettings: what it refuses, what it accepts by another name, and how far an attack can get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lpa_kernels.attack import AttackSettings, LatentPGD

from ...support.batches import llama

BAD: list[tuple[str, dict[str, Any]]] = [
    ("engine='fast' is unknown; use one of auto, reference, packed, stack", {"engine": "fast"}),
    ("norm='l1' is unknown", {"norm": "l1"}),
    ("rule='lion' is unknown", {"rule": "lion"}),
    ("backend='cuda' is unknown", {"backend": "cuda"}),
    ("epsilon=0 must be positive", {"epsilon": 0}),
    ("epsilon=nan", {"epsilon": float("nan")}),
    ("step_size=-1", {"step_size": -1}),
    ("steps=0", {"steps": 0}),
    ("steps=2.5 must be a whole number", {"steps": 2.5}),
    ("weight_decay=-0.1 must not be negative", {"weight_decay": -0.1}),
    ("clip_grad=0 must be positive", {"clip_grad": 0}),
    ("random_start needs a ball", {"random_start": True, "epsilon": float("inf")}),
    ("state_dtype=torch.int8", {"state_dtype": torch.int8}),
    ("capture_graph='no' is unknown", {"capture_graph": "no"}),
    ("stop_below=1 goes by the 'toward' loss", {"stop_below": 1, "coefs": {"away": 1.0}}),
    ("merge_adapters=True leaves no model", {"merge_adapters": True, "coefs": {"dpo": 1.0}}),
    (r"unknown terms \['sft'\]", {"coefs": {"sft": 1.0}}),
    ("weighs nothing", {"coefs": {"toward": 0.0}}),
    ("mixes 'dpo' with other losses", {"coefs": {"dpo": 1.0, "toward": 1.0}}),
    ("mixes 'dpo' with other losses", {"coefs": {"dpo": 1.0, "ipo": 1.0}}),
    ("beta=0 must be positive", {"beta": 0}),
    ("label_smoothing=0.5", {"label_smoothing": 0.5}),
    ("l2_penalty=-1 must not be negative", {"l2_penalty": -1}),
]


@pytest.mark.parametrize(("message", "options"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        AttackSettings(**options)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(TypeError, match="eps=2 is no setting of an attack; see AttackSettings"):
        LatentPGD(llama(), "mlp:1", eps=2)


def test_other_names_of_values() -> None:
    assert AttackSettings(rule="normalized").rule == "normalised"
    assert [AttackSettings(capture_graph=value).capture_graph for value in (True, False)] == ["on", "off"]


def test_changes_come_on_top_of_settings() -> None:
    settings = AttackSettings(steps=4, epsilon=2.0)
    pgd = LatentPGD(llama(), "mlp:1", settings, epsilon=3.0)
    assert (pgd.settings.steps, pgd.settings.epsilon, settings.epsilon) == (4, 3.0, 2.0)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sign"])
def test_reach_is_a_bound_that_is_met(rule: str) -> None:
    """By gradients that grow as Adam's bound wants them, in torch's own Adam."""
    steps = 16
    reach = AttackSettings(rule=rule, steps=steps, step_size=1.0).reach(1)
    best = 0.0
    for growth in (1.0, 1.02, 1.05, 1.1, 1.12, 1.15, 1.2):
        leaf = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        adam = torch.optim.Adam([leaf], lr=1.0)
        for t in range(steps):
            leaf.grad = torch.full_like(leaf, growth**t)
            adam.step()
        best = max(best, float(leaf.detach().abs()))
    if rule == "sign":
        assert reach == steps
    else:
        assert 16 < best <= reach < 1.15 * steps
