"""examples/compare.py: which arms run, and the paired change, worked by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lpa.config import LPAConfig
from lpa.data import SHIPPED
from lpa.evaluation import Evaluation, Row, Settings
from lpa.evaluation.records import Records
from lpa.evaluation.suites.answers import NAME
from lpa.evaluation.verdict import claims
from lpa.presets import PRESETS


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    path = Path(__file__).parents[2] / "examples/compare.py"
    spec = importlib.util.spec_from_file_location("compare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_only_the_main_arms_have_more_than_one_seed(compare: ModuleType) -> None:
    assert list(compare.runs(("lpa", "lat"), ("lpa",), 2)) == [("lpa", 0), ("lat", 0), ("lpa", 1)]


def test_every_arm_uses_options_that_exist(compare: ModuleType) -> None:
    known = {*LPAConfig.__dataclass_fields__, "data", "benign", "preset"}
    given = {arm: compare.flags(arm, Path("data")) for arm in compare.ALL}
    assert {flag[2:] for own in given.values() for flag in own if flag.startswith("--")} <= known
    assert {own[own.index("--preset") + 1] for own in given.values()} <= set(PRESETS)
    assert {own[own.index("--data") + 1] for own in given.values() if "--data" in own} <= {
        *SHIPPED,
        "data/harmful.jsonl",
    }
    # undesirable statements are the demo's own, so that this arm is `lpa` by another name
    assert len({tuple(own) for own in given.values()}) == len(compare.ALL)


def test_arms_are_compared_by_claims_over_their_seeds(compare: ModuleType) -> None:
    records = Records(None)
    settings = Settings(sets=("s",), attacks=("direct",))
    refused = {"base": "", "lpa-0": "abc", "lpa-1": "a", "finetune-0": "a"}
    for subject, own in refused.items():
        for number in "abcd":
            label = "refusal" if number in own else "compliance"
            for name in ("s", "benign"):
                held = label if name == "s" else "compliance"
                records.add({"subject": subject, "suite": NAME, "set": name, "id": number, "mode": "direct",
                             "label": held})  # fmt: skip
    rows = [Row("lpa-0", "utility", "prose", "perplexity", 40.0), Row("lpa-1", "utility", "prose", "perplexity", 42.0)]
    found = Evaluation(rows, list(refused), records, {"settings": settings.as_dict()})
    assert compare.arms(found) == {"base": ["base"], "lpa": ["lpa-0", "lpa-1"], "finetune": ["finetune-0"]}
    claim = claims(records, ["lpa-0", "lpa-1"], settings)[0]
    assert claim.change == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    table = compare.over_seeds(found).splitlines()
    assert len(table) == 5
    assert f"| lpa | 2 | {compare.told(claim)} |" in table[3]
    assert "41.00 (40.00 to 42.00)" in table[3]
    between = claims(records, ["lpa-0", "lpa-1"], settings, ["finetune-0"])[0]
    assert between.change == pytest.approx((0 + 0.5 + 0.5 + 0) / 4)
    assert compare.told(between) in compare.attack_alone(found)
