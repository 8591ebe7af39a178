"""`pytest --benchmark-only` has every op beside its peers, and the stack beside the conventional loop."""

from __future__ import annotations

import pytest

from benchmarks import bench_inner_loop, bench_ops
from benchmarks.loop_cases import SHAPES, WAYS
from benchmarks.op_cases import ALL, GPU, TINY, all_cases
from lpa_kernels.ops import schema

GROUPS = {
    "attention": "attention of",
    "attention_backward_": "attention backward of",
}  # others begin with the op's name


@pytest.mark.parametrize("sizes", [ALL, GPU, TINY], ids=["all", "gpu", "tiny"])
@pytest.mark.parametrize("op", schema.OPS)
def test_every_op_stands_beside_its_peers(op: str, sizes: object) -> None:
    begin = GROUPS.get(op, f"{op} [")
    groups: dict[str, set[bool]] = {}
    for case in all_cases(sizes):  # type: ignore[arg-type]
        if case.group.startswith(begin):
            groups.setdefault(case.group, set()).add(case.name.startswith("ours"))
    assert groups
    assert all(kinds == {True, False} for kinds in groups.values()), groups


def test_the_stack_stands_beside_the_conventional_loop() -> None:
    marks = {mark.args[0]: list(mark.args[1]) for mark in bench_inner_loop.test_inner_loop.pytestmark if mark.args}
    assert {"conventional", "packed engine", "frozen stack"} <= set(marks["way"]) == set(WAYS)
    assert {"small", "late", "ragged"} <= set(marks["shape"]) <= set(SHAPES)
    (ops,) = (mark for mark in bench_ops.test_op.pytestmark if mark.name == "parametrize")
    assert [case.group for case in ops.args[1]] == [case.group for case in all_cases()]
