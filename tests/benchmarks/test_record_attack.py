"""benchmarks/record_attack.py: an attack's losses and norms are those of its own steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.record_attack import measured
from lpa.data import PairCollator
from lpa_kernels.attack import PairBatch
from tests.support.tiny import rows, tiny_config, tiny_model, tiny_tokenizer


def test_losses_are_read_before_and_after_all_steps(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_config(tmp_path, attack_epsilon=0.3)
    batch = PairBatch.from_dict(PairCollator(tokenizer, system_prompt=None)(rows(3)))
    model = tiny_model(len(tokenizer))
    few, many = (measured(model, config, batch, steps, 0.05) for steps in (1, 6))
    assert few["before"] == pytest.approx(many["before"])
    assert many["after"]["total"] < few["after"]["total"] < few["before"]["total"]
    assert 0.29 < max(many["norms"].values()) < 0.3001
    assert max(few["norms"].values()) < 0.29
    assert few["cpu_seconds"] > 0
