"""JSON files are whole and hold finite numbers alone; an error says where one is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lpa.files import write_json


def test_a_number_that_is_not_finite_is_refused_by_its_place(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_json(file, {"a": 1})
    with pytest.raises(
        ValueError, match=r"results\.json cannot hold rows\.1\.low = nan: JSON has finite numbers alone"
    ):
        write_json(file, {"rows": [{"low": 1.0}, {"low": math.nan}]})
    assert json.loads(file.read_text()) == {"a": 1}, "what was there stays"


def test_nan_becomes_null_on_request(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"rows": ({"low": math.inf, "n": 2},), "text": "é"}, nulls=True)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"rows": [{"low": None, "n": 2}], "text": "é"}
    assert "é" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
