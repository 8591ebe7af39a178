"""Adds to pytest-benchmark's tables what they cannot show: bandwidth, and its share of a large copy's."""

import pytest

ROWS = pytest.StashKey[list[tuple[str, str, float, float]]]()  # group, way, median seconds, bytes that it must move


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def report(request):
    """Call with (group, way, median seconds, bytes) of what was measured."""
    return lambda *row: request.config.stash[ROWS].append(row)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    from benchmarks.measure import copy_bandwidth, scale_bandwidth

    copy, scale = copy_bandwidth(), scale_bandwidth()
    terminalreporter.section("bandwidth of the ops")
    terminalreporter.write_line(f"a large copy moves {copy / 1e9:.1f} GB/s, a scaling in place {scale / 1e9:.1f} GB/s")
    for group in dict.fromkeys(row[0] for row in rows):
        terminalreporter.write_line(f"\n{group}")
        terminalreporter.write_line(f"{'':45} {'ms':>10} {'times ours':>10} {'GB/s':>8} {'of the copy':>11}")
        mine = [row for row in rows if row[0] == group]
        for _, way, median, moved in mine:
            rate = f"{moved / median / 1e9:8.1f} {moved / median / copy:11.2f}" if moved else ""
            terminalreporter.write_line(f"{way:45} {median * 1e3:10.3f} {median / mine[0][2]:10.2f} {rate}")
