"""What is used and shows nothing in the sweep has a reason there, and each reason such a case."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import measure
from benchmarks.sweep_arguments import NOTHING, SHOWS_NOTHING, Result, unexplained


def test_a_setting_without_effect_needs_a_reason_and_a_reason_such_a_setting(monkeypatch: Any) -> None:
    kept = [Result(**each) for each in json.loads((measure.RESULTS / "sweep-arguments.json").read_text())]
    assert unexplained(kept) == []
    silent = Result("optim_args", "'foo=1'", "used", "trained", NOTHING)
    assert unexplained([*kept, silent]) == ["optim_args 'foo=1'"]
    monkeypatch.setitem(SHOWS_NOTHING, "gone", "it was a setting once")
    assert unexplained(kept) == ["gone"]
