"""examples/rivals.py and examples/dpo.py: the arms are settings that exist, and DPO learns."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lpa.config import LPAConfig
from tests.support.tiny import rows, tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def rivals() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "rivals.py"))


def test_arms_have_one_budget_of_passes_and_settings_that_exist(rivals: dict[str, Any], tmp_path: Path) -> None:
    for arm, inner in rivals["INNER"].items():
        flags = rivals["flags"](arm, tmp_path)
        given: dict[str, list[str]] = {}
        for flag in flags:
            if flag.startswith("--"):
                given[flag[2:]] = []
            else:
                given[list(given)[-1]].append(flag)
        given.pop("data")
        assert set(given) <= set(LPAConfig.__dataclass_fields__)
        kinds = {"lpa_steps": int, "defence_steps": int, "attack_steps": int, "attack_epsilon": float,
                 "attack_step_size": float, "attack_share": float, "attack_away_coef": float}  # fmt: skip
        values: dict[str, Any] = {
            name: kinds.get(name, str)(own[0]) if len(own) == 1 else own for name, own in given.items()
        }
        config = LPAConfig(str(tmp_path), use_cpu=True, report_to=[], **values)
        assert config.inner_steps == inner
        passes = config.lpa_steps * (config.inner_steps + config.defence_steps)
        assert abs(passes - rivals["PASSES"]) <= 8


def test_dpo_lowers_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(EXAMPLES / "dpo.py"))["train"]
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(len(tokenizer)), LoraConfig(r=4, target_modules="all-linear"))
    losses = train(model, tokenizer, rows(8), steps=6, lr=1e-2)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.05
    assert "step 6" in capsys.readouterr().out
