"""Steps are captured in the tests of capturing alone: a replay runs no Python, which other tests watch run."""

import pytest

from lpa_kernels.attack import graphs


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "RECORDERS", {})
