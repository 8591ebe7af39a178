"""The report: all of the runs is on the page, nothing comes from outside, harmful text is folded or absent."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lpa.commands.report import run as report_command
from lpa.evaluation.records import Records
from lpa.evaluation.session import evaluate
from lpa.report import ReportError, build
from lpa.report.runs import EvaluationRun, paired_tests, read_run
from tests.support.measurements import entry
from tests.support.speakers import STAND_INS, adapter

from ...support.speakers import random_model, speaker, tokenizer

SUITES = ["traits", "harm", "attacks", "overrefusal", "collapse"]


class Page(HTMLParser):
    """Tags, attributes, and the text inside and outside of folded parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = {True: "", False: ""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text["details" in self.open] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of a tiny model and two adapters."""
    where = tmp_path_factory.mktemp("report")
    path = where / "standins.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in STAND_INS), encoding="utf-8")
    adapters = {name: adapter(where / name, seed) for seed, name in enumerate(("lpa", "control <b>"), 1)}
    evaluate(
        random_model(), adapters, tokenizer=tokenizer(), suites=SUITES,
        output=where / "evaluation", sets=(str(path),), limit=8, max_new_tokens=8, attacks=("direct", "prefix"),
        epsilons=(0.1, 0.3), steps=(1, 2), trait_steps=2, trait_epsilon=0.3, trait_limit=6,
        sites=("embedding", "mlp:1"), keep_texts=True, command="lpa evaluate --as-it-was",
    )  # fmt: skip
    return where / "evaluation"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's record, as `lpa train` leaves it."""
    steps = [
        {"lpa_step": i, "attack_toward_first": 3.0 - i, "attack_toward_last": 1.0, "defence_toward": 2.0 / i,
         "norm/embedding": 0.1 * i, "boundary_fraction": 0.5}
        for i in range(1, 5)
    ]  # fmt: skip
    watched = [entry(0), entry(2, done=0.76, right=0.7), entry(4, done=0.3, right=0.9)]
    canaries = {
        "asked": {"benign": {"source": "canaries.jsonl", "rows": 24, "sha256": "c" * 64}},
        "measured": watched,
        "frontier": [],
        "best_lpa_step": 2,
        "kept_lpa_step": 2,
        "stopped": "benign requests done -50 points",
    }
    held = {"disagree_undesirable": 0.5, "disagree_undesirable_margin": 0.1, "disagree_undesirable_n": 12.0,
            "auroc": 0.6, "auroc_low": 0.4, "auroc_high": 0.8, "auroc_n": 24.0}  # fmt: skip
    record = {"model": "tiny", "command": "lpa train --model tiny", "settings": {"seed": 3}, "steps": steps,
              "versions": {"torch": "2"}, "canaries": canaries,
              "data": {"source": "pairs.csv", "rows": 64, "sha256": "d" * 64},
              "before": held, "after": held | {"disagree_undesirable": 0.75}}  # fmt: skip
    where = tmp_path_factory.mktemp("trained")
    (where / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
    return where


@pytest.fixture(scope="module")
def page(folder: Path, training: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of both."""
    output = tmp_path_factory.mktemp("page") / "r.html"
    return Page(build([folder, training], output, command="lpa report x").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_self_contained(page: Page, folder: Path) -> None:
    assert page.open == []
    images = [source for source in page.sources if not source.startswith("#")]
    assert len(images) == 16, "ten of the evaluation, three of the training, three of the canaries"
    for source in images:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    told = page.text[False]
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for needed in (
        "lpa evaluate --as-it-was",
        "lpa train --model tiny",
        "lpa report x",
        "control <b>",
        "balanced accuracy",
        "McNemar",
        "permutation",
        "COLLAPSED",
        info["data"]["benign"]["sha256"],
        info["versions"]["torch"],
        info["subjects"]["lpa"]["fingerprint"],
        "seed 0",
        "seed 3",
        "50% [25, 75] (+0.10)",
        "75% [47, 91]",
        "d" * 64,
        "c" * 64,
        "The safest LPA step within the limits is 2",
        "the run was stopped: benign requests done -50 points",
    ):
        assert needed in told, needed


def test_harmful_text_is_folded_away(page: Page) -> None:
    assert "forbidden thing" in page.text[True]
    assert "forbidden thing" not in page.text[False]


def test_paired_tests_are_made_of_the_records(folder: Path) -> None:
    (found,) = read_run(folder)
    assert isinstance(found, EvaluationRun)
    tests = {(t.what, t.one, t.other): t for t in paired_tests(found)}
    assert {(one, other) for _, one, other in tests} == {
        ("base", "lpa"),
        ("base", "control <b>"),
        ("lpa", "control <b>"),
    }
    benign = tests["says yes to benign", "base", "lpa"]
    yes = [r["yes"] >= r["no"] for r in found.records.select(subject="lpa", suite="harm", set="benign")]
    assert (benign.n, benign.after) == (8, sum(yes) / 8)
    assert 0 < benign.p <= 1
    assert tests["log-odds of agreeing, desirable", "base", "lpa"].test == "permutation"


def test_a_sample_that_has_no_number_is_left_out_of_a_paired_test() -> None:
    records = Records()
    for subject, scores in (("base", (1.0, 0.0, None, 1.0)), ("lpa", (1.0, 1.0, 1.0, 0.0))):
        for number, score in enumerate(scores):
            records.add({"subject": subject, "suite": "utility", "set": "pets", "id": f"pets-{number}",
                         "mode": "sample:none", "scores": {"acc": score}})  # fmt: skip
    run = EvaluationRun("run", [], ["base", "lpa"], records, {"settings": {"sets": [], "tasks": ["pets"]}})
    (test,) = paired_tests(run)
    assert (test.what, test.n, test.before, test.after, test.test) == ("pets, acc", 3, 2 / 3, 2 / 3, "McNemar")


def test_a_collapsed_model_stands_out(tmp_path: Path) -> None:
    evaluate(
        speaker("No"), tokenizer=tokenizer(), suites=["collapse"], output=tmp_path / "e", limit=20, max_new_tokens=8
    )
    text = build([tmp_path / "e"], tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.search(r'<li class="is-bad">.*✕ COLLAPSED</span><br>only 5% of answers are distinct', text)
    assert '<td class="n bad" data-label="base">YES <span class="ref">(a)</span>' in text
    assert "<sup>" not in text, "a note's mark must not look like an exponent"
    assert "balanced accuracy is 50%" in text
    assert "counts as done" not in text, "no attack was measured"


def test_a_page_has_no_empty_card_and_explains_nothing_that_was_not_measured(
    folder: Path, training: Path, tmp_path: Path
) -> None:
    text = build([training], tmp_path / "t.html").read_text(encoding="utf-8")
    assert "How to read it" not in text
    assert '<ul class="cards">' not in text
    text = build([folder], tmp_path / "e.html").read_text(encoding="utf-8")
    assert "counts as done" in text
    for card in re.findall(r"<li class=\"is-[a-z]*\">(.*?)</li>", text):
        assert not card.endswith("<br>")


def test_on_a_phone_every_number_is_named_by_its_column(folder: Path, tmp_path: Path) -> None:
    text = build([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    numbers = re.findall(r"<td class=\"n[^>]*>", text)
    assert numbers
    assert all("data-label" in cell for cell in numbers if "<td" in cell)
    assert text.count('class="stack"') == text.count("<table"), "every table can stack its cells"
    assert "@media (max-width: 700px)" in text
    widths = {int(width) for width in re.findall(r'<img [^>]*width="(\d+)"', text)}
    assert widths == {520}, "one width, which a phone shows at two thirds"


def test_a_subject_that_a_stopped_run_never_reached_hides_nothing_of_the_others(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "e")
    results = json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))
    told = {"subject": "late", "suite": "verdict", "set": "", "metric": "incomplete: nothing measured", "value": None}
    results = {"subjects": [*results["subjects"], "late"], "rows": [*results["rows"], told]}
    (tmp_path / "e" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = build([tmp_path / "e"], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b>late</b>" in text
    assert "Answers to benign requests" in text
    assert text.count(">late<") == 1, "its verdict, and no empty column"


def test_a_report_of_no_finished_run_raises(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run to report on"):
        build([])
    with pytest.raises(ReportError, match="neither an evaluation"):
        build([tmp_path])
    stopped = tmp_path / "stopped"
    Records(stopped)
    (stopped / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ReportError, match="was stopped"):
        build([stopped])
    (tmp_path / "metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(ReportError, match=r"metrics.json cannot be read"):
        build([tmp_path])


def test_the_command_can_leave_harmful_text_out_and_only_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    output = tmp_path / "deep" / "r.html"
    assert report_command([str(folder), "--output", str(output), "--shareable"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert "forbidden thing" not in output.read_text(encoding="utf-8")
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before, "the run's folder is only read"
