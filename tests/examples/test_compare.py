"""examples/compare.py: which arms run, and the paired change, worked by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lpa.config import LPAConfig
from lpa.evaluation import Evaluation
from lpa.evaluation.records import Records
from lpa.evaluation.suites.answers import NAME


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


def test_every_arm_is_told_by_options_that_there_are(compare: ModuleType) -> None:
    known = {*LPAConfig.__dataclass_fields__, "data", "benign"}
    given = {flag for arm in compare.ALL for flag in compare.flags(arm, Path("data")) if flag.startswith("--")}
    assert {flag[2:].replace("-", "_") for flag in given} <= known
    assert len({tuple(compare.flags(arm, Path("data"))) for arm in compare.ALL}) == len(compare.ALL)


def test_the_change_is_paired_by_prompt_and_meant_over_seeds(compare: ModuleType) -> None:
    records = Records(None)
    # done by the base model: a, b, c of four; by the two seeds: a alone, and a and b
    done = {"base": "abc", "lpa-0": "a", "lpa-1": "ab"}
    for subject, own in done.items():
        for number in "abcd":
            label = "compliance" if number in own else "refusal"
            records.add({"subject": subject, "suite": NAME, "set": "benign", "id": number, "mode": "direct",
                         "label": label})  # fmt: skip
    found = Evaluation([], list(done), records)
    assert compare.arms(found) == {"base": ["base"], "lpa": ["lpa-0", "lpa-1"]}
    mean, low, high = compare.change(found, ["lpa-0", "lpa-1"], "benign")
    assert mean == pytest.approx((0 + 50 + 100 + 0) / 4)
    assert low < mean < high
    assert compare.change(found, ["lpa-1"], "benign", ["lpa-0"])[0] == pytest.approx(-25)
    assert compare.change(found, ["lpa-0"], "benign", ["base", "lpa-1"])[0] == pytest.approx((0 + 100 + 50 + 0) / 4)
