"""The attack on the embedded real model: engines agree, and it does far more than a random push of the same size.

Skipped where the model is not in the cache: tests fetch nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lpa import LPAConfig, assets
from lpa.data import PairCollator, load_pairs
from lpa.evaluation.measure import attack_of
from lpa.models import DEFAULT_MODEL, load
from lpa_kernels.attack import AttackResult, LatentPGD, PairBatch
from lpa_kernels.ops import token_loss

pytestmark = pytest.mark.skipif(not assets.is_cached(DEFAULT_MODEL), reason=f"{DEFAULT_MODEL} is not in the cache")


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, PairBatch]:
    model, tokenizer = load(attn_implementation="eager")
    pairs = load_pairs()
    return model, PairBatch.from_dict(PairCollator(tokenizer, system_prompt="Be honest.")([pairs[0], pairs[40]]))


def objective(pgd: LatentPGD, batch: PairBatch, attack: AttackResult | None) -> float:
    """What the adversary minimises, at a perturbation."""
    with torch.no_grad():
        rows = pgd.rows(batch, attack)
        losses, _ = token_loss(rows.logits, rows.labels, ~rows.rejected)
        return float(pgd.settings.objective.combine(losses, rows.rejected, rows.example, rows.size, batch.counts)[0])


@pytest.mark.parametrize("rule", ["adamw", "normalised"])
def test_the_engines_agree(embedded: tuple[Any, PairBatch], rule: str) -> None:
    model, batch = embedded
    config = LPAConfig(
        use_cpu=True, attack_rule=rule, attack_step_size={"adamw": 1e-3, "normalised": 0.05}[rule], attack_steps=2
    )
    one, other = (attack_of(model, config, engine=engine).attack(batch) for engine in ("reference", "packed"))
    assert other.engine == "packed"
    for first, second in zip(one.losses, other.losses, strict=True):
        for term in ("toward", "away"):  # relative from 1 on, as on the tiny models: 30 layers' sums round in float32
            assert abs(second[term] - first[term]) <= 2e-6 * max(1.0, abs(first[term]))
    for name, delta in one.deltas.items():
        off = (delta - other.deltas[name]).abs() > 1e-3 * delta.abs().max()
        # AdamW divides a gradient by its own size, so entries whose gradient is all rounding are all rounding too
        assert float(off.float().mean()) <= (1e-3 if rule == "adamw" else 0), name


def test_an_attack_lowers_its_objective_far_more_than_a_random_push(embedded: tuple[Any, PairBatch]) -> None:
    model, batch = embedded
    pgd = attack_of(model, LPAConfig(use_cpu=True), steps=4)
    clean, attack = objective(pgd, batch, None), pgd.attack(batch)
    gained = clean - objective(pgd, batch, attack)
    generator = torch.Generator().manual_seed(0)
    changes = []
    found = [delta.clone() for delta in attack.deltas_by_row]
    for _ in range(2):
        noise = [torch.randn(delta.shape, generator=generator) for delta in found]
        attack.deltas_by_row = [
            n * (delta.norm(dim=-1, keepdim=True) / n.norm(dim=-1, keepdim=True))
            for n, delta in zip(noise, found, strict=True)
        ]
        changes.append(abs(clean - objective(pgd, batch, attack)))
    assert gained > 5 * max(changes), (gained, changes)
