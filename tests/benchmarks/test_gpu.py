"""The GPU entry without a GPU: resuming, pieces that break, and that a dry run is never taken for a measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import origin, parts, report, runner
from benchmarks.gpu.goals import FAMILIES
from benchmarks.gpu.pieces import NAMES, PIECES
from benchmarks.gpu.runner import Options, Piece, run_piece
from benchmarks.profile_step import KERNELS, group_of

ROOT = Path(__file__).resolve().parents[2]


def piece(name: str, seconds: float = 60) -> Piece:
    return Piece(name, f"tests.support.pieces:{name}", seconds / 60, "a fake")


def calls(out: Path) -> list[str]:
    return (out / "calls.txt").read_text().split()


def part_of(out: Path, name: str) -> dict[str, Any]:
    found = parts.read(parts.path_of(out, name))
    assert found is not None
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the workers import from there


@pytest.mark.usefixtures("here")
def test_a_piece_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    options = Options(tmp_path, command="python -m benchmarks.gpu")
    assert run_piece(piece("plain"), options) == "done"
    assert run_piece(piece("plain"), options) == "done before"
    assert calls(tmp_path) == ["a", "b"]
    assert part_of(tmp_path, "plain")["cases"]["b"]["found"] == {"name": "b"}
    assert run_piece(piece("plain"), Options(tmp_path, again=True)) == "done"
    gone = replace(piece("plain"), leaves=str(tmp_path / "gone"))
    assert run_piece(gone, options) == "done"  # on another machine what it had made is not there
    assert run_piece(piece("plain"), Options(tmp_path, dry=True)) == "done"  # a measured part is not a dry one
    assert calls(tmp_path) == ["a", "b"] * 4
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.usefixtures("here")
def test_a_part_of_another_machine_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_piece(piece("plain"), Options(tmp_path)) == "done"
    before = part_of(tmp_path, "plain")
    assert (before["gpu"], before["torch"], before["commits"]) == (None, torch.__version__, [origin.commit()])
    monkeypatch.setattr(runner, "commit", lambda: "another")
    assert run_piece(piece("plain"), Options(tmp_path)) == "done before"
    monkeypatch.setattr(origin, "gpu", lambda device: "Example GPU")
    assert run_piece(piece("plain"), Options(tmp_path)) == "done"
    assert "begun anew" in capsys.readouterr().out
    assert (part_of(tmp_path, "plain")["gpu"], part_of(tmp_path, "plain")["commits"]) == ("Example GPU", ["another"])
    parts.write(parts.path_of(tmp_path, "plain"), before | {"gpu": "Example GPU", "torch": "1.0"})
    assert run_piece(piece("plain"), Options(tmp_path)) == "done"
    assert calls(tmp_path) == ["a", "b"] * 3
    parts.write(
        parts.path_of(tmp_path, "plain"), part_of(tmp_path, "plain") | {"status": "running", "commits": ["old"]}
    )
    run_piece(piece("plain"), Options(tmp_path))  # gone on with, at a later commit
    assert part_of(tmp_path, "plain")["commits"] == ["old", "another"]
    assert calls(tmp_path) == ["a", "b"] * 3


@pytest.mark.usefixtures("here")
def test_a_broken_device_costs_one_case_and_only_that_is_tried_again(tmp_path: Path) -> None:
    assert run_piece(piece("broken"), Options(tmp_path)) == "failed: 1 of 3 cases"
    found = part_of(tmp_path, "broken")
    assert "illegal memory access" in found["cases"]["second"]["reason"]
    assert found["log"].count("+ ") >= 2  # the third one had a process of its own
    assert calls(tmp_path) == ["first", "third"]
    assert run_piece(piece("broken"), Options(tmp_path, retry=False)) == "failed before"
    (tmp_path / "mended").touch()
    assert run_piece(piece("broken"), Options(tmp_path)) == "done"
    assert calls(tmp_path) == ["first", "third", "second"]


@pytest.mark.usefixtures("here")
def test_a_crash_is_told_and_the_next_case_goes_on(tmp_path: Path) -> None:
    assert run_piece(piece("crash"), Options(tmp_path)) == "failed: 1 of 3 cases"
    found = part_of(tmp_path, "crash")["cases"]
    assert found["crash"]["reason"] == "ended by SIGSEGV"
    assert calls(tmp_path) == ["before", "after"]


@pytest.mark.usefixtures("here")
def test_a_case_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set forward to the limit once the case hangs, however long the process took to get there."""
    late = [0.0]

    class Process(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            assert 0 < timeout <= 600 + runner.GRACE
            while not (tmp_path / "asleep").exists():
                assert self.poll() is None
                time.sleep(0.02)
            late[0] = timeout
            return super().wait(0.1)

    names = {name: getattr(subprocess, name) for name in ("STDOUT", "TimeoutExpired")}
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Process, **names))
    monkeypatch.setattr(runner, "time", SimpleNamespace(time=lambda: time.time() + late[0], strftime=time.strftime))
    assert run_piece(piece("hang", seconds=600), Options(tmp_path)) == "failed: 1 of 2 cases"
    found = part_of(tmp_path, "hang")
    assert found["cases"]["hang"]["reason"] == "timeout"
    assert "now it sleeps" in found["log"]
    assert calls(tmp_path) == ["before"]


@pytest.mark.usefixtures("here")
def test_what_cannot_run_says_why(tmp_path: Path) -> None:
    assert run_piece(piece("nothing"), Options(tmp_path)) == "skipped: there is no such tool on cpu"
    assert run_piece(piece("no_setup"), Options(tmp_path)) == "failed: 1 of 1 cases"
    assert "does not fit" in part_of(tmp_path, "no_setup")["cases"]["setup"]["reason"]
    assert run_piece(piece("plain"), Options(tmp_path, stop=time.time() - 1)) == "not begun: no time left"


@pytest.mark.usefixtures("here")
def test_a_bundle_is_gone_on_with_elsewhere(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    run_piece(piece("plain"), Options(one))
    parts.bundle(one, ["plain", "broken"], one / "bundle.json")
    assert parts.unbundle(one / "bundle.json", two) == ["plain"]
    assert run_piece(piece("plain"), Options(two)) == "done before"
    assert parts.unbundle(one / "bundle.json", two) == []
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.json is no bundle"):
        parts.unbundle(tmp_path / "no.json", two)


MACHINE = {"gpu": "NVIDIA Example 80GB", "versions": {"torch": "2.0"}, "nvidia-smi": {"driver_version": "1.2"}}

HERE = {"device": "cuda", "dry": False, "gpu": MACHINE["gpu"], "torch": "2.0", "commits": ["c0ffee"], "status": "done"}


def made(out: Path, **changes: Any) -> None:
    cases = {"machine": {"state": "done", "when": 0, "found": MACHINE},
             "bf16 product": {"state": "done", "when": 0, "found": {"TFLOP/s": 100.0}}}  # fmt: skip
    part = HERE | {"piece": "ceilings", "date": "2000-01-02", "log": "/somebody's/folder", "command": "c",
                   "cases": cases}  # fmt: skip
    parts.write(parts.path_of(out, "ceilings"), part | changes)


def inner(out: Path, piece: str = "inner-llama-16", **milliseconds: float) -> None:
    cases: dict[str, Any] = {"work": {"state": "done", "when": 0, "found": {"FLOP": 1e12}}}
    cases |= {name: {"state": "done", "when": 0, "found": {"milliseconds": ms}} for name, ms in milliseconds.items()}
    parts.write(parts.path_of(out, piece), HERE | {"date": "2000-01-03", "cases": cases})


def test_the_report_of_a_gpu_goes_to_the_results(tmp_path: Path) -> None:
    made(tmp_path)
    inner(tmp_path, conventional=60.0, packed=30.0, packed_captured=14.0)
    results = tmp_path / "results"
    results.mkdir()
    report.write(tmp_path, NAMES, results)
    (written,) = results.glob("*.json")
    assert written.name == "nvidia-example-80gb-2000-01-03.json"
    held = json.loads(written.read_text())
    assert "somebody" not in written.read_text()
    goals = {row["goal"]: row for row in held["goals"]}
    assert goals["Llama-3-8B, micro-batch 16: times the conventional loop"]["met"] == "yes"  # 60 / 14
    floor = goals["Llama-3-8B, micro-batch 16: times the floor of its matrix products"]
    assert (floor["outcome"], floor["met"]) == ("1.40, packed_captured", "yes")  # 1e12 at 100 TFLOP/s are 10 ms
    assert goals["30 LPA steps at batch 16, 8B: seconds"]["outcome"] == "not measured"
    table = written.with_suffix(".md").read_text()
    assert "| packed_captured |  | 14 | 4.286 | 1.4 |" in table
    assert table.count("commit c0ffee") == 1


@pytest.mark.parametrize(("key", "value"), [("gpu", "NVIDIA Other"), ("gpu", None), ("torch", "2.1")])
def test_parts_of_several_machines_are_no_results(tmp_path: Path, key: str, value: Any) -> None:
    made(tmp_path)
    parts.write(parts.path_of(tmp_path, "ops"), HERE | {"date": "2000-01-02", "cases": {}, key: value})
    results = tmp_path / "results"
    results.mkdir()
    told = report.write(tmp_path, NAMES, results)
    assert f"the parts differ in their {key} ({HERE[key]}: ceilings; {value or 'unknown'}: ops)" in told
    assert not list(results.iterdir())


def test_commits_are_shown_where_they_differ(tmp_path: Path) -> None:
    made(tmp_path)
    parts.write(
        parts.path_of(tmp_path, "ops"), HERE | {"date": "2000-01-02", "cases": {}, "commits": ["c0ffee", "b0b"]}
    )
    table = report.markdown(parts.collect(tmp_path, NAMES))
    assert "; commit c0ffee and b0b." in table
    assert "2000-01-02, commit c0ffee: done" in table
    assert "2000-01-02, commit c0ffee and b0b: done" in table
    assert report.record(parts.collect(tmp_path, NAMES))["pieces"]["ops"]["commits"] == ["c0ffee", "b0b"]


@pytest.mark.parametrize(("changes", "why"), [({"dry": True}, "ceilings ran dry"), ({"device": "cpu"}, "ran on cpu")])
def test_what_is_no_gpu_measurement_stays_out_of_the_results(tmp_path: Path, changes: Any, why: str) -> None:
    made(tmp_path, **changes)
    results = tmp_path / "results"
    results.mkdir()
    assert why in report.write(tmp_path, NAMES, results)
    assert not list(results.iterdir())
    assert (tmp_path / "report.md").exists()


def test_dry_run_of_the_cheap_pieces(tmp_path: Path) -> None:
    """The command itself; nothing in benchmarks/results is touched."""
    before = {path: path.stat().st_mtime_ns for path in report.RESULTS.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "ceilings", "report", "--device", "cpu", "--dry", "--out",
         str(tmp_path), "--bundle", str(tmp_path / "bundle.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not in benchmarks/results: ceilings ran dry" in done.stdout
    assert part_of(tmp_path, "ceilings")["status"] == "done"
    assert json.loads((tmp_path / "bundle.json").read_text())["parts"]["ceilings"]["cases"]["copy"]["state"] == "done"
    assert {path: path.stat().st_mtime_ns for path in report.RESULTS.iterdir()} == before


def test_goals_of_the_ops(tmp_path: Path) -> None:
    made(tmp_path)
    large = {"ours (triton)": {"milliseconds": 1.0, "share_of_copy": 0.91, "meets the goal": True, "launches": 1},
             "ours (native)": {"milliseconds": 1.2, "share_of_copy": 0.7, "meets the goal": False, "launches": 1},
             "torch.compile": {"milliseconds": 2.0, "share_of_copy": 0.4}}  # fmt: skip
    cases = {"pgd_update_ large": large, "token_loss_ small": {"ours (triton)": {"milliseconds": 0.1, "launches": 2}}}
    part = HERE | {"date": "2000-01-02", "cases": {
            name: {"state": "done", "when": 0, "found": found} for name, found in cases.items()}}  # fmt: skip
    parts.write(parts.path_of(tmp_path, "ops"), part)
    rows = {row["goal"]: row for row in report.record(parts.collect(tmp_path, NAMES))["goals"]}
    share = rows["pgd_update_: least share of the copy's bandwidth beyond the L2"]
    assert (share["outcome"], share["met"]) == ("0.91, pgd_update_ large", "yes")  # the backend that is in use
    assert rows["perturb: least share of the copy's bandwidth beyond the L2"]["outcome"] == "not measured"
    assert (rows["small ops: launches"]["outcome"][:9], rows["small ops: launches"]["met"]) == ("at most 2", "no")
    assert rows["CUDA C++'s time by Triton's"]["outcome"] == "1.20, pgd_update_ large"


def test_a_variant_meets_no_goal_and_folders_are_left_out(tmp_path: Path) -> None:
    made(tmp_path)
    inner(tmp_path, conventional=60.0, packed=30.0)
    inner(tmp_path, "inner-llama-8", conventional=60.0, packed=40.0)
    found = {"compiled": {"state": "done", "when": 0, "found": {"milliseconds": 12.0}},
             "broken": {"state": "failed", "when": 0, "reason": "no file /home/someone/a.py, 3/4 of it"}}  # fmt: skip
    skipped = {"date": "2000-01-02", "cases": found, "status": "skipped: there is no /home/someone/tool"}
    parts.write(parts.path_of(tmp_path, "variants-llama-16"), HERE | skipped)
    held = report.record(parts.collect(tmp_path, NAMES))
    rows = {row["goal"]: (row["wanted"], row["outcome"], row["met"]) for row in held["goals"]}
    goal = "Llama-3-8B, micro-batch 16: times the conventional loop"
    assert rows[goal] == (">= 3", "2.00, packed", "no")
    assert rows[f"{goal}, by what is only tried"] == ("", "5.00, compiled", "")
    assert rows["Llama-3-8B, micro-batch 8: times the conventional loop"] == ("", "1.50, packed", "")
    assert held["pieces"]["variants-llama-16"]["status"] == "skipped: there is no tool"
    assert held["pieces"]["variants-llama-16"]["cases"]["broken"]["reason"] == "no file a.py, 3/4 of it"
    assert "someone" not in report.markdown(parts.collect(tmp_path, NAMES))


def test_a_table_within_a_case(tmp_path: Path) -> None:
    found = {"wall ms": 1.5, "products": {"ms": 1.0}, "longest": {"mm": {"ms": 0.5}}, "rounds": [1.0, 2.0]}
    made(tmp_path, cases={"p": {"state": "done", "when": 0, "found": found}})
    table = report.markdown(parts.collect(tmp_path, NAMES))
    assert "**p**; wall ms 1.5; rounds 1, 2" in table
    assert "| products | 1 |" in table
    assert "| mm | 0.5 |" in table


@pytest.mark.parametrize(("kernel", "group"), [
    ("triton_poi_fused__to_copy_add_mul_3", "compiled"),
    ("triton_red_fused__softmax_index_mean_pow_rsqrt_0", "compiled"),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies, casts, indexing"),
    ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
    ("_update_norms_kernel", "this package's kernels"),
])  # fmt: skip
def test_the_kind_of_a_kernel(kernel: str, group: str) -> None:
    """A compiled kernel is named after all that it fuses."""
    assert group_of(kernel.lower(), KERNELS) == group


def test_the_page_has_every_piece_variant_and_count() -> None:
    from benchmarks.gpu.variants import VARIANTS

    page = (ROOT / "docs" / "performance.md").read_text()
    for name, variant in VARIANTS.items():
        row = "| {} | {:.2f}, {:.2f} | {} |".format(name, *variant.expected, variant.why)
        assert row in page or name == "as it is", row
    for name in NAMES:
        assert f"`{name}`" in page or f"`-{name.rpartition('-')[2]}`" in page, name
    steps = json.loads((report.RESULTS / "counts-8b.json").read_text())["steps"]
    states = [steps[f"{family}, 16 pairs"]["GB"]["the rest"] * 1e9 / depth / (16 * 142 * 4096 * 2)
              for family, depth in (("llama", 32), ("qwen3", 36))]  # fmt: skip
    assert "as {:.0f}\nof its hidden states in bf16 have (Qwen3: {:.0f})".format(*states) in page
    for name, step in steps.items():
        family, _, rest = name.partition(", ")
        row = next(line for line in page.splitlines() if line.startswith(f"| {FAMILIES[family]}, {rest} |"))
        assert f"| {step['FLOP'] / 1e12:.1f} | {step['FLOP of the public loop'] / 1e12:.1f} |" in row
        assert row.endswith(f"| {step['ms by the assumed rates']['step']:.1f} |")


def test_every_piece_can_be_found() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for each in PIECES:
        module, _, function = each.target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert f"def {function}(setting: Setting" in path.read_text(), each
        assert 0 < each.minutes <= 9
