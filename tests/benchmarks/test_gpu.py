"""The GPU entry without a GPU: it goes on where it was, cases that fail, its tables, and every piece on tiny shapes."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import counts, pieces, preference
from benchmarks.gpu.measures import Skip
from benchmarks.gpu.shapes import shape
from benchmarks.measure import RESULTS, ROOT
from benchmarks.profile_step import KERNELS, group_of
from lpa_kernels.ops.triton import launch

FAMILIES = {"llama": "Llama-3-8B", "qwen3": "Qwen3-8B"}
QUICK = ("truth", "sanitizer")


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the entry dry on some pieces and words; gives its exit code and its record."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        record = tmp_path / "record.json"
        code = entry.main(["--dry", "--record", str(record), *words])
        return code, json.loads(record.read_text())["pieces"]

    return run


class Stopped(BaseException):
    """As a kill: nothing of it is caught."""


def test_it_goes_on_where_it_was(dry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def case(name: str, error: BaseException | None = None) -> Any:
        def run() -> dict[str, Any]:
            called.append(name)
            if error is not None:
                raise error
            return {"name": name, "odd": float("nan")}

        return run

    cases = {"a": case("a"), "b": case("b", ValueError("no /home/someone/a.py, 3/4 of it")), "c": case("c", Stopped()),
             "d": case("d", Skip("no such tool"))}  # fmt: skip
    monkeypatch.setitem(pieces.PIECES, "fake", lambda dry: cases)
    with pytest.raises(Stopped):
        dry("fake")
    code, found = dry("fake")  # neither the failure nor what stopped it is run again
    assert (code, called) == (0, ["a", "b", "c", "d"])
    own = found["fake"]
    assert own["a"]["found"] == {"name": "a", "odd": None}
    assert own["a"]["command"].startswith("python ")
    assert own["b"]["failed"] == "ValueError: no a.py, 3/4 of it"
    assert own["c"] == {"failed": entry.UNFINISHED}
    assert own["d"]["skipped"] == "no such tool"
    cases |= {name: case(name) for name in "bcd"}
    assert dry("fake", "--retry", "--minutes", "-1")[0] == 1  # no time
    assert called == ["a", "b", "c", "d"]
    assert all("found" in own for own in dry("fake", "--retry")[1]["fake"].values())
    assert called == [*"abcd", *"bcd"]


def test_a_broken_device_ends_the_process(dry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(pieces.PIECES, "fake", lambda dry: {"broken": broken, "next": dict})
    code, found = dry("fake")
    assert (code, list(found["fake"])) == (1, ["broken"])
    code, found = dry("fake")
    assert (code, found["fake"]["next"]["found"]) == (0, {})


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference.importlib.util, "find_spec", lambda name: None)
    for way, says in (("TRL", "trl"), ("flash-pref", "flash_pref and flash_attn"), ("Unsloth", "unsloth")):
        with pytest.raises(Skip, match=f"^{says}: not installed$"):
            preference.step(shape("llama", 2, True), way, 1)


def test_a_record_of_another_machine_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"gpu": "Example GPU", "torch": torch.__version__, "dry": False, "pieces": {}}))
    with pytest.raises(SystemExit, match=r"record\.json was made by .*'Example GPU'.* give another --record"):
        entry.main(["--dry", "--record", str(path), "truth"])
    with pytest.raises(SystemExit):
        entry.main(["--dry", "nothing"])
    if not torch.cuda.is_available():
        assert entry.default_record().parent.name == "runs"  # never among the results
        with pytest.raises(SystemExit):
            entry.main(["truth"])


def test_the_tables_set_goals_beside_outcomes() -> None:
    def found(**cases: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("_", " "): {"found": value} for name, value in cases.items()}

    steps = found(work={"FLOP": 1e12}, public_form={"ms": 60.0}, stack={"ms": 14.0}, reference={"ms": 9.0})
    ops = {"perturb [9, 9]": {"found": {"ours (triton)": {"share_of_copy": 0.91, "beyond_l2": True},
                                        "ours (native)": {"share_of_copy": 0.2, "beyond_l2": False},
                                        "torch.compile": {"share_of_copy": 0.4}}}}  # fmt: skip
    rates = {"products, llama, 2304 rows": {"found": {"TFLOP/s": 100.0}}, "x": {"failed": "why not"}}
    record = {"gpu": "Example GPU", "torch": "2", "dry": False, "date": "2000-01-02",
              "pieces": {"truth": rates, "inner-llama-16": steps, "ops": ops}}  # fmt: skip
    rows = {goal: (wanted, outcome) for goal, wanted, outcome in entry.goals(record)}
    assert rows["llama, 16 pairs: times the public form"] == (">= 3", "4.29, stack")
    assert rows["llama, 16 pairs: by the floor"] == ("<= 1.3", "1.40, stack")  # 1e12 at 100 TFLOP/s are 10 ms
    assert rows["perturb: least share of the copy"] == (">= 0.9", "0.91, perturb [9, 9], ours (triton)")
    assert rows["30 LPA steps, stack: seconds"] == ("<= 70", "not measured")
    page = entry.page(record)
    assert "# Example GPU, torch 2, 2000-01-02" in page
    assert "| ours (triton) | 0.91 | True |" in page
    assert "| x |  | failed: why not |" in page


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in pieces.PIECES
])  # fmt: skip
def test_every_piece_runs_dry(name: str, dry: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    code, found = dry(name)
    assert code == 0
    cases = found[name]
    assert {case: own["failed"] for case, own in cases.items() if "failed" in own} == {}
    assert any("found" in own for own in cases.values())
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


@pytest.mark.skipif(launch.INTERPRETED, reason="Triton's interpreter launches nothing")
def test_a_step_is_counted_by_what_its_kernels_are_given() -> None:
    kernels, *_ = counts.step_of(shape("llama", 2, dry=True))
    launches, moved = Counter[str](), Counter[str]()
    for kernel, many in kernels.items():
        launches["products" if kernel.product else kernel.name] += many
        moved[kernel.name] += many * kernel.bytes
    tokens, scored, inner, blocks = 2 * (10 + 2 + 4), 2 * (1 + 2 + 4), 96, 4
    assert (launches["_swiglu"], launches["_swiglu_backward"], launches["_update"]) == (blocks, blocks, 1)
    gated = (blocks - 1) * tokens + scored  # the last block's feed-forward runs on the scored tokens alone
    assert moved["_swiglu"] == 6 * gated * inner
    assert moved["_swiglu_backward"] == 10 * gated * inner


@pytest.mark.skipif(launch.INTERPRETED, reason="Triton's interpreter launches nothing")
def test_a_step_saves_what_it_says_and_takes_little_more() -> None:
    """Residual stream, factors of norms, queries, keys, values, attention's output and logsumexp, gate and up.

    Beside queries and up stands what adapters of rank 64 make first. The adapters are copied once, A and B.
    """
    _, saved, peak, copies, moved = counts.step_of(shape("llama", 2, dry=True))
    tokens, scored, labels = 2 * (10 + 2 + 4), 2 * (1 + 2 + 4), 2 * (3 + 5)
    width, inner, heads, keys, vocabulary, blocks = 64, 96, 4, 2 * 16, 192, 4
    before, whole = (2 * blocks - 1) * tokens + 2 * scored, (blocks - 1) * tokens + scored
    halves = width * (before + 2 * whole) + 2 * keys * blocks * tokens + 2 * inner * whole
    halves += 3 * 64 * (blocks - 1) * tokens + 64 * whole  # the last block's queries are of fewer tokens
    assert saved == 2 * halves + 4 * (before + heads * whole)  # bf16, and float32 for one number a token or head
    assert saved < peak <= saved + 2 * (labels * vocabulary + tokens * (inner + 3 * width + 3 * 64))
    a_rows, b_columns = (3 + 1 + 1) * 64 * width + 64 * inner, 3 * 64 * (width + 2 * keys) + 64 * (2 * width + inner)
    assert copies == 2 * blocks * (a_rows + b_columns)
    weights = 2 * width * width + 2 * keys * width + 3 * inner * width
    assert moved == 4 * 2 * blocks * weights  # in and out, each read and written


def test_products_in_whole_tiles() -> None:
    product = partial(counts.Kernel, "mm", True, 0, 0)
    assert product((128, 132 * 128)).in_waves() == 1
    assert product((129, 132 * 128)).in_waves() == pytest.approx(129 / 256)
    assert product((1, 64)).in_waves() == pytest.approx(1 / 128 / 132)


@pytest.mark.parametrize(("kernel", "group"), [
    ("triton_poi_fused__to_copy_add_mul_3", "compiled"),
    ("triton_red_fused__softmax_index_mean_pow_rsqrt_0", "compiled"),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies, casts, indexing"),
    ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("_update_norms_kernel", "this package's kernels"),
    ("_attention", "this package's kernels"),
])  # fmt: skip
def test_the_kind_of_a_kernel(kernel: str, group: str) -> None:
    """A compiled kernel is named after all that it fuses."""
    assert group_of(kernel, KERNELS) == group


def test_the_page_has_every_piece_and_count() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for name in pieces.PIECES:
        assert f"`{name}`" in page or f"`-{name.rpartition('-')[2]}`" in page, name
    new, _, old = page.partition("## The packed engine at 8B")
    steps = json.loads((RESULTS / "counts-8b.json").read_text())["steps"]
    states = [steps[f"{family}, 16 pairs"]["GB"]["the rest"] * 1e9 / depth / (16 * 142 * 4096 * 2)
              for family, depth in (("llama", 32), ("qwen3", 36))]  # fmt: skip
    assert "as {:.0f}\nof its hidden states in bf16 have (Qwen3: {:.0f})".format(*states) in old
    for name, step in steps.items():
        family, _, rest = name.partition(", ")
        row = next(line for line in old.splitlines() if line.startswith(f"| {FAMILIES[family]}, {rest} |"))
        assert f"| {step['FLOP'] / 1e12:.1f} | {step['FLOP of the public loop'] / 1e12:.1f} |" in row
        assert row.endswith(f"| {step['ms by the assumed rates']['step']:.1f} |")
    assert "Counts and predictions, not measurements" in new
    steps = json.loads((RESULTS / "counts-stack-8b.json").read_text())["steps"]
    assert counts.summary(steps) in new
    assert counts.by_kernel(steps) in (ROOT / "docs" / "kernels.md").read_text()
