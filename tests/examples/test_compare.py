"""examples/compare.py: which arms run, and the paired change, worked by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lpa.config import LPAConfig
from lpa.data import SHIPPED
from lpa.evaluation import Evaluation, Row, Settings, sets
from lpa.evaluation.records import Records
from lpa.evaluation.sets import Prompt, PromptSet
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
    assert list(compare.runs(("lpa", "lat"), ("lpa",), 2)) == [("lpa", 42), ("lat", 42), ("lpa", 43)]


def test_every_arm_uses_options_that_exist(compare: ModuleType) -> None:
    known = {*LPAConfig.__dataclass_fields__, "data", "benign", "preset"}
    given = {arm: compare.flags(arm, Path("data")) for arm in compare.ALL}
    assert {flag[2:] for own in given.values() for flag in own if flag.startswith("--")} <= known
    assert {own[own.index("--preset") + 1] for own in given.values()} <= set(PRESETS)
    assert {own[own.index("--data") + 1] for own in given.values() if "--data" in own} <= {
        *SHIPPED,
        "data/harmful.jsonl",
    }
    own = str(PRESETS["demo"].get("data", "undesirable"))
    assert [compare.statements_of(arm) for arm in ("lpa", "vector", "ipip-both", "published-2607")] == [
        own, own, "ipip-both", "undesirable"]  # fmt: skip
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
    assert compare.arms(found.subjects) == {"base": ["base"], "lpa": ["lpa-0", "lpa-1"], "finetune": ["finetune-0"]}
    claim = claims(records, ["lpa-0", "lpa-1"], settings)[0]
    assert claim.change == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    table = compare.over_seeds(found).splitlines()
    assert len(table) == 5
    assert f"| lpa | 2 | {compare.told(claim)} |" in table[3]
    assert "41.00 (40.00 to 42.00)" in table[3]
    between = claims(records, ["lpa-0", "lpa-1"], settings, ["finetune-0"])[0]
    assert between.change == pytest.approx((0 + 0.5 + 0.5 + 0) / 4)
    assert compare.told(between) in compare.attack_alone(found)


def test_the_estimate_counts_what_is_left(compare: ModuleType, tmp_path: Path) -> None:
    budget = replace(compare.BUDGETS["cpu"], seconds=(1000, 600, 200), main=("lpa",))
    parts = ["base", "lpa-42", "lpa-43", "vector-42"]
    told = compare.estimate(parts, budget, tmp_path, Namespace(no_ladder=False))
    assert told.startswith("3 to train, 4 to evaluate, 2 to climb the ladder: about 1.6 hours of CPU time")  # 5,800 s
    for part in ("base", "lpa-43"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "done").touch()
    told = compare.estimate(parts, budget, tmp_path, Namespace(no_ladder=True))
    assert told.startswith("2 to train, 2 to evaluate, 0 to climb the ladder: about 0.9 hours of CPU time")


def test_no_request_is_both_trained_on_and_evaluated(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"advbench": ["cat", "dog", "bird"], "evaluated": ["dog", "fish"]}
    monkeypatch.setattr(sets, "load_set", lambda name: PromptSet(
        name, True, tuple(Prompt(f"{name}-{number}", text) for number, text in enumerate(texts[name]))))  # fmt: skip
    compare.write_data(tmp_path / "data", ("evaluated",))
    for name in ("harmful", "requests"):
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["prompt"] for line in lines} == {"cat", "bird"}


def test_parts_become_one_evaluation(compare: ModuleType, tmp_path: Path) -> None:
    budget = replace(compare.BUDGETS["cpu"], settings=Settings(sets=()), suites=("overrefusal",))
    own = [
        {"subject": name, "suite": NAME, "set": "benign", "id": "p1", "mode": "direct", "tag": "plain", "label": label,
         "answer": "x"}
        for name, label in (("base", "compliance"), ("lpa-0", "refusal"))
    ]  # fmt: skip
    for part, held in (("base", own[:1]), ("lpa-0", own)):  # each part has the base model's records too
        folder = tmp_path / "parts" / part
        records = Records(folder)
        for record in held:
            records.add(record, harmful=part != "base" and record is own[1])
        (folder / "texts.local.jsonl").touch()
        subjects = {record["subject"]: {"path": "", "fingerprint": "f"} for record in held}
        (folder / "run.json").write_text(json.dumps({"subjects": subjects, "suites": [], "commands": ["other"]}))
    found = compare.joined(["base", "lpa-0"], budget, tmp_path, "this")
    assert found.subjects == ["base", "lpa-0"]
    assert len(found.records) == len((tmp_path / "evaluation/records.jsonl").read_text().splitlines()) == 2
    assert found.value("base", "overrefusal", "not done", "benign") == 0
    assert found.value("lpa-0", "overrefusal", "not done", "benign") == 1
    assert found.info["commands"] == ["this"]
    assert found.info["suites"] == [*budget.suites], "no ladder was climbed"
    assert len((tmp_path / "evaluation/texts.local.jsonl").read_text().splitlines()) == 1
