"""A setting that is used and shows nothing in the sweep has a reason there."""

from __future__ import annotations

import json

from benchmarks import measure
from benchmarks.sweep_arguments import NOTHING, Result, unexplained


def test_a_setting_without_effect_needs_a_reason() -> None:
    kept = [Result(**each) for each in json.loads((measure.RESULTS / "sweep-arguments.json").read_text())]
    assert unexplained(kept) == []
    silent = Result("optim_args", "'foo=1'", "used", "trained", NOTHING)
    assert unexplained([*kept, silent]) == ["optim_args 'foo=1'"]
