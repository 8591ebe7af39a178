"""Any settings: they are refused by name, or train, and by the packed engine to the weights of the plain one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.any_settings import check, choices

EXAMPLES = 10


@pytest.mark.filterwarnings("ignore")
def test_any_settings_train_alike_or_are_refused_by_name(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(choices())
    def run(setting: dict[str, Any]) -> None:
        check(tmp_path, setting, seen)

    run()
    assert min(seen["refused"], seen["trained"]) >= 3, seen
