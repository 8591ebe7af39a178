"""Captured steps: what is replayed on tensors that stay where they are must be what the plain loop does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from lpa_kernels.attack import LatentPGD, graphs, loop
from lpa_kernels.attack.graphs import bucketed, padded_layout
from lpa_kernels.attack.layout import pack
from lpa_kernels.attack.state import AttackState
from lpa_kernels.model import modes
from lpa_kernels.model.head import plain_head
from lpa_kernels.model.modes import merged_adapters

from ...support.batches import RAGGED, assert_same, attack_with, llama, pairs, with_lora
from ...support.models import DEVICE, tiny

SITES = ["embedding", "mlp:1"]
SMALL, LARGER = [(6, 4, 3, 0), (4, 2, 5, 0)], [(7, 3, 4, 0), (3, 5, 1, 0)]  # of one bucket


@pytest.fixture(params=["stand-in", *(["graphs"] if DEVICE == "cuda" else [])])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """CUDA graphs, and what stands in for them: it replays by running the step again on its own tensors.

    Lists what was recorded.
    """
    steps: list[Callable[[], None]] = []

    def record(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        steps.append(step)
        if request.param == "graphs":
            return graphs.cuda_graph(step, restore)
        for _ in range(2):  # as a warm-up does, and it must leave no trace
            restore()
            step()
        return step

    monkeypatch.setitem(graphs.RECORDERS, DEVICE, record)
    monkeypatch.setattr(modes, "KEPT_ON", {DEVICE})
    return steps


def check(model: Any, batch: Any, sites: Any = SITES, **options: Any) -> None:
    got = attack_with(model, batch, sites, "packed", capture_graph=True, **options)
    want = attack_with(model, batch, sites, "packed", capture_graph=False, **options)
    assert (got.captured, want.captured) == ("yes", "capture_graph='off'")
    assert torch.equal(got.grid, want.grid)
    assert [d.shape for d in got.deltas_by_row] == [d.shape for d in want.deltas_by_row]
    assert torch.equal(got.clipped, want.clipped)
    assert_same(got, want, losses=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_batches_share_a_bucket(family: str, attn: str, recorded: list[Any]) -> None:
    """Other lengths, other masks, other tokens: the inputs and the attention masks of each batch come in anew."""
    model = tiny(family, attn=attn)
    for sizes, attack, seed in ((SMALL, "all", 1), (LARGER, "prompt", 2), (SMALL, "some", 3), (LARGER, "all", 4)):
        check(model, pairs(sizes, attack, seed))
    assert len(recorded) == 1
    check(model, pairs(RAGGED, "all"))
    assert len(recorded) == 2  # more rows
    assert (
        all(step.forward.last is not None for step in recorded) or family == "llama4_text"
    )  # whose experts mix tokens


OPTIONS: list[dict[str, Any]] = [
    {"rule": "normalised", "norm": "linf", "step_size": 0.1, "epsilon": 0.02},
    {"coefs": {"toward": 1.0}},
    {"coefs": {"away": 2.0}},
    {"l2_penalty": 0.5, "clip_grad": 0.01},
    {"stop_below": 4.4},
    {"relative": True, "epsilon": 0.02},
    {"random_start": True, "seed": 3},
    {"merge_adapters": True},
    {"steps": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_settings(options: dict[str, Any], recorded: list[Any]) -> None:
    model = llama(lora=True)
    for sizes, seed in ((SMALL, 1), (LARGER, 2)):
        check(model, pairs(sizes, "all", seed), **options)
    assert len(recorded) == 1


def test_counts_step_size_and_radius_may_change(recorded: list[Any]) -> None:
    model = llama()
    for options in ({}, {"step_size": 0.05}, {"epsilon": 0.01}):
        check(model, pairs(), **options)
    for counts in ((7.0, 8.0), (100.0, 50.0)):
        attacks = [LatentPGD(model, SITES, steps=3, step_size=0.02, epsilon=0.1, threshold=-8.0, capture_graph=graph)
                   .attack(pairs(), counts) for graph in (True, False)]  # fmt: skip
        assert_same(*attacks, losses=1e-6)
    assert len(recorded) == 1


def test_lower_blocks_are_an_input(recorded: list[Any]) -> None:
    model = llama(lora=True)
    for sizes, seed in ((SMALL, 1), (LARGER, 2), (SMALL, 3)):
        check(model, pairs(sizes, "all", seed), ["mlp:2", "block:3"])
    assert len(recorded) == 1
    assert "forward" not in model.base_model.model.model.layers[0].__dict__


def test_a_chunked_head_above_frozen_blocks(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(lora=True)
    want = attack_with(model, pairs(), ["mlp:2"], "reference")
    monkeypatch.setattr(loop, "CHUNK_FROM", 1)
    monkeypatch.setattr(loop, "plain_head", lambda model: plain_head(model) and not chunks.append(1))
    chunks: list[int] = []
    untouched = tiny("llama")
    for tested, expected in ((model, want), (untouched, attack_with(untouched, pairs(), ["mlp:2"], "reference"))):
        check(tested, pairs(), ["mlp:2"])
        assert_same(attack_with(tested, pairs(), ["mlp:2"], "packed", capture_graph=True), expected)
    assert chunks
    assert len(recorded) == 2


def test_adapters_hooks_and_buffers_need_their_own_graph(recorded: list[Any]) -> None:
    model = llama(lora=True)
    model.add_adapter("b", model.peft_config["default"])
    check(model, pairs())
    model.set_adapter("b")
    check(model, pairs())
    assert len(recorded) == 2
    with model.disable_adapter():
        check(model, pairs())
    assert len(recorded) == 3
    model.set_adapter("default")
    check(model, pairs())
    assert len(recorded) == 3  # the first again
    model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] *= 3
    check(model, pairs())
    handle = model.base_model.model.model.layers[3].register_forward_hook(lambda m, args, out: out * 2)
    check(model, pairs())
    handle.remove()
    rope = model.base_model.model.model.rotary_emb
    rope.inv_freq = rope.inv_freq.clone() * 0.5
    check(model, pairs())
    assert len(recorded) == 6


def test_a_shape_is_captured_when_it_comes_again(recorded: list[Any]) -> None:
    model = llama()
    found = [attack_with(model, pairs(seed=seed), SITES, "packed") for seed in (1, 1, 2)]
    assert [attack.captured for attack in found] == [graphs.ONCE, "yes", "yes"]
    assert_same(found[1], found[0], losses=1e-6)
    assert len(recorded) == 1


def test_a_pool_ends_with_its_last_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object, raising=False)
    monkeypatch.setattr(graphs, "_streams", {})
    for name in ("current_device", "Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock(name=name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", [MagicMock()])
    used = lambda: torch.cuda.graph.call_args.kwargs["pool"]  # noqa: E731
    replays, pools = [], []
    for _ in range(2):
        replays.append(graphs.cuda_graph(lambda: None, lambda: None))
        pools.append(used())
    assert pools[0] is pools[1]
    replays.pop()
    gc.collect()
    replays.append(graphs.cuda_graph(lambda: None, lambda: None))
    assert used() is pools[0]
    replays.clear()
    gc.collect()
    assert graphs.cuda_graph(lambda: None, lambda: None)
    assert used() is not pools[0]


class Generator:
    """What of a GPU's generator a capture handles."""

    state = "own"

    def graphsafe_get_state(self) -> str:
        return self.state

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state

    def clone_state(self) -> str:
        return "a copy"


def test_a_capture_that_cannot_be_ended_gives_its_pool_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's `capture_end` may throw before it has stopped to allocate in the pool, and to count random numbers."""

    class Graph:
        def __enter__(self) -> None:
            assert generator.state == "a copy"
            calls.append("begin")

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("capture_end")

    calls: list[Any] = []
    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", [None] * 3 + [generator])
    streams = MagicMock(), MagicMock()
    monkeypatch.setattr(graphs, "_streams", {torch.device("cuda", 3): streams})
    for name in ("current_stream", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock(name=name))
    torch.cuda.stream.return_value.__exit__.return_value = False
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: Graph())
    for name in ("end", "release"):
        full = {"end": "_cuda_endAllocateToPool", "release": "_cuda_releasePool"}[name]
        monkeypatch.setattr(torch._C, full, lambda *pool, name=name: calls.append((name, *pool)))
    step = MagicMock(side_effect=[None] * graphs.WARM_UP + [torch.OutOfMemoryError("no room")])
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        graphs.cuda_graph(step, lambda: None)
    assert calls == ["begin", ("end", 3, (0, 7)), ("release", 3, (0, 7))]
    assert generator.state == "own"
    with pytest.raises(RuntimeError, match="capture_end"):
        graphs.cuda_graph(lambda: None, lambda: None)
    # an error while warming up: the stream of the plain loop waits for what that has begun
    torch.cuda.current_stream.return_value.wait_stream.reset_mock()
    with pytest.raises(ValueError, match="in the step"):
        graphs.cuda_graph(MagicMock(side_effect=ValueError("in the step")), lambda: None)
    torch.cuda.current_stream.return_value.wait_stream.assert_called_once_with(streams[0])


def test_weights_that_move_or_change(recorded: list[Any]) -> None:
    """A change in place is seen by a replay; other memory needs another capture."""
    model = llama()
    check(model, pairs())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    check(model, pairs())
    assert len(recorded) == 1
    weight = model.model.layers[2].mlp.down_proj.weight
    weight.data = weight.data.clone()
    check(model, pairs())
    assert len(recorded) == 2


def test_a_hook_in_the_place_of_another_needs_another_graph(recorded: list[Any]) -> None:
    model = llama()
    for scale in (1.0, 2.0, 3.0):
        handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, out, scale=scale: out * scale)
        check(model, pairs())
        handle.remove()
    assert len(recorded) == 3


def test_a_hook_of_ones_own_runs_at_every_step_unless_a_graph_is_asked_for(recorded: list[Any]) -> None:
    model, seen = llama(), [0]

    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return out * 2

    handle = model.model.layers[3].mlp.register_forward_hook(hook)
    found = [attack_with(model, pairs(), SITES, "packed") for _ in range(3)]
    assert {attack.captured.partition(",")[0] for attack in found} == {
        "a hook on one of its modules may do something else at every step"
    }
    before = seen[0]
    attack_with(model, pairs(), SITES, "packed", steps=7)
    assert seen[0] - before >= 7
    handle.remove()
    assert [attack_with(model, pairs(), SITES, "packed").captured for _ in range(2)] == [graphs.ONCE, "yes"]
    assert len(recorded) == 1


def test_a_first_batch_is_not_prepared_and_a_later_one_is_copied_once(
    recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"laid out": 0, "copied": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(graphs, "padded_layout", counted("laid out", padded_layout))
    monkeypatch.setattr(AttackState, "padded", counted("copied", AttackState.padded))
    model = llama()
    for after in ({"laid out": 0, "copied": 0}, {"laid out": 1, "copied": 1}, {"laid out": 2, "copied": 1}):
        attack_with(model, pairs(), SITES, "packed")
        assert counts == after


def test_the_cache_is_bounded_and_dies_with_the_model(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    # no reference to the model, as a CUDA graph has none
    record = lambda step, restore: recorded.append(step()) or (lambda: None)  # noqa: E731
    monkeypatch.setitem(graphs.RECORDERS, DEVICE, record)
    model = llama()
    # three steps are used all the time, so that four, not they, make room for five
    for steps, count in ((3, 1), (4, 2), (3, 2), (5, 3), (3, 3), (4, 4)):
        attack_with(model, pairs(), SITES, "packed", steps=steps, capture_graph=True)
        assert len(recorded) == count
        assert len(graphs.graphs_of(model).kept) == min(count, 2)
    monkeypatch.setattr(graphs, "GRAPH_BYTES", 1)  # only the one in use stays
    attack_with(model, pairs(), SITES, "packed", steps=3, capture_graph=True)
    assert len(graphs.graphs_of(model).kept) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("'dpo' counts rows", {"coefs": {"dpo": 1.0}, "reference_free": True}),
    ("'kl' counts rows", {"coefs": {"toward": 1.0, "kl": 0.1}}),
    ("norm='l2_sequence' counts rows", {"norm": "l2_sequence"}),
    ("only the packed engine", {"engine": "reference"}),
]


@pytest.mark.parametrize(("reason", "options"), REFUSED, ids=[r for r, _ in REFUSED])
def test_what_cannot_be_captured(reason: str, options: dict[str, Any], recorded: list[Any]) -> None:
    model, options = llama(), {"engine": "packed"} | options
    found = attack_with(model, pairs(), SITES, **options)
    assert reason in found.captured
    assert_same(found, attack_with(model, pairs(), SITES, capture_graph=False, **options), losses=0, deltas=0)
    with pytest.raises(RuntimeError, match=f'capture_graph="on", but .*{reason}'):
        attack_with(model, pairs(), SITES, capture_graph=True, **options)
    assert not recorded


@pytest.mark.skipif(DEVICE != "cpu", reason="about the CPU")
def test_the_cpu_has_no_graphs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = llama()
    for _ in range(2):
        assert attack_with(model, pairs(), SITES, "packed").captured == "it runs on cpu, which has no graphs"
    assert sum("not captured: it runs on cpu" in record.message for record in caplog.records) == 1
    with pytest.raises(RuntimeError, match='capture_graph="on", but it runs on cpu'):
        attack_with(model, pairs(), SITES, "packed", capture_graph=True)
    with pytest.raises(ValueError, match="capture_graph='yes' is unknown"):
        attack_with(model, pairs(), SITES, "packed", capture_graph="yes")


FAILURES = [
    (RuntimeError("operation not permitted when stream is capturing"),
     "the capture failed: operation not permitted when stream is capturing"),
    (torch.OutOfMemoryError("tried to allocate 2 GiB"), graphs.OUT_OF_MEMORY),
]  # fmt: skip


@pytest.mark.parametrize(("error", "reason"), FAILURES, ids=["not permitted", "out of memory"])
def test_a_capture_that_fails(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plain loop runs instead, from the start; no shape is tried again, and earlier graphs are let go of."""
    tries = []

    def record(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        tries.append(1)
        step()
        if len(tries) > 1:
            raise error
        return lambda: None

    monkeypatch.setitem(graphs.RECORDERS, DEVICE, record)
    model = llama()
    attack_with(model, pairs(RAGGED), SITES, "packed", capture_graph=True)
    assert len(graphs.graphs_of(model).kept) == 1
    assert attack_with(model, pairs(), SITES, "packed").captured == graphs.ONCE
    for sizes in (SMALL, SMALL, RAGGED, RAGGED):
        found = attack_with(model, pairs(sizes), SITES, "packed")
        assert found.captured == reason
        plain = attack_with(model, pairs(sizes), SITES, "packed", capture_graph=False)
        assert_same(found, plain, losses=0, deltas=0)
        assert not graphs.graphs_of(model).kept
    assert len(tries) == 2
    assert [r.levelname for r in caplog.records if f"captured no more: {reason}" in r.message] == ["WARNING"]
    graphs.forget_graphs(model)  # as the trainer does for a smaller micro-batch
    attack_with(model, pairs(), SITES, "packed")
    assert len(tries) == 3


@pytest.mark.parametrize(("error", "reason"), FAILURES, ids=["not permitted", "out of memory"])
def test_a_capture_that_was_asked_for_and_fails(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of the same kind, so that a trainer halves the micro-batch where memory ran out."""
    monkeypatch.setitem(graphs.RECORDERS, DEVICE, MagicMock(side_effect=error))
    said = f'capture_graph="on", but {reason}; capture_graph="auto" runs the plain loop then'
    with pytest.raises(type(error), match=said):
        attack_with(llama(), pairs(), SITES, "packed", capture_graph=True)


def test_the_unshared_path_is_not_captured(recorded: list[Any]) -> None:
    found = attack_with(tiny("bloom"), pairs(), ["embedding"], "auto")
    assert (found.engine, found.captured) == ("unshared", "only the packed engine can be")


def test_an_attack_outlives_the_next_replay(recorded: list[Any]) -> None:
    model = llama()
    first = attack_with(model, pairs(SMALL), SITES, "packed", capture_graph=True)
    before = [delta.clone() for delta in first.deltas_by_row], first.losses
    assert attack_with(model, pairs(LARGER, seed=9), SITES, "packed").captured == "yes"
    first._read.clear()
    assert first.losses == before[1]
    assert all(map(torch.equal, first.deltas_by_row, before[0]))


@pytest.mark.parametrize(("number", "least", "want"), [
    (1, 16, 16), (16, 16, 16), (17, 16, 32), (130, 16, 144), (1000, 16, 1024), (1025, 16, 1152), (0, 32, 0),
])  # fmt: skip
def test_buckets(number: int, least: int, want: int) -> None:
    assert bucketed(number, least) == want


def test_padding_keeps_every_token_in_its_place() -> None:
    layout = pack(pairs(RAGGED, "some"))
    wide = padded_layout(layout)
    (rows, length), width = layout.shape, wide.shape[1]
    assert wide.shape == (rows, bucketed(length, 16))
    assert torch.equal(wide.input_ids[:, :length], layout.input_ids)
    assert bool((wide.branch[:, length:] == -1).all())
    deltas, labels = len(layout.row_tokens), len(layout.labels)
    there = layout.row_tokens >= 0
    assert torch.equal(wide.row_tokens[:deltas] >= 0, there)
    assert bool((wide.row_tokens[deltas:] == -1).all())
    assert torch.equal(
        wide.input_ids.flatten()[wide.row_tokens[:deltas][there]], layout.input_ids.flatten()[layout.row_tokens[there]]
    )
    back = torch.arange(rows * width, device=DEVICE)[wide.token_rows >= 0]
    assert sorted(back.tolist()) == sorted(wide.row_tokens[wide.row_tokens >= 0].tolist())
    assert torch.equal(wide.labels[:labels], layout.labels)
    assert bool((wide.labels[labels:] == -100).all())


def test_the_tokens_that_are_scored_have_a_shape_that_goes_by_the_bucket() -> None:
    """Distinct ones, those before a label among them: what the last feed-forward is run on, in a graph too."""
    found = []
    for sizes in (SMALL, LARGER):
        layout = padded_layout(pack(pairs(sizes)))
        tokens = layout.scored_tokens
        assert len(set(tokens.tolist())) == len(tokens)
        assert set((layout.select_rows * layout.shape[1] + layout.select_positions).tolist()) <= set(tokens.tolist())
        found.append(tokens)
    assert found[0].shape == found[1].shape
    assert not torch.equal(*found)
    short = pack(pairs([(1, 2, 2, 0)]))  # fewer tokens than labels: the last of the prompt predicts two
    assert sorted(short.scored_tokens.tolist()) == list(range(short.shape[1]))


@pytest.mark.parametrize("graphs", [True, False])
def test_merged_weights_are_where_they_were(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "KEPT_ON", {DEVICE} if graphs else set())
    model = llama(lora=True)
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    where = base.data_ptr()
    with merged_adapters(model):
        assert (base.data_ptr() == where) == graphs
    assert base.data_ptr() == where


@pytest.mark.gpu
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs(dtype: torch.dtype, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are in use: the default recorder, float32 adapters on weights of half precision, training between."""
    monkeypatch.setitem(graphs.RECORDERS, "cuda", graphs.cuda_graph)
    model = with_lora(tiny("qwen3", attn=attn, dtype=dtype))
    for merged in (False, True):
        for sizes, seed in ((SMALL, 1), (LARGER, 2), (SMALL, 3)):
            options = {"merge_adapters": merged, "capture_graph": True}
            batch = pairs(sizes, "all", seed)
            if dtype == torch.float32:
                check(model, batch, merge_adapters=merged)
            else:  # padding rounds otherwise
                got = attack_with(model, batch, SITES, "packed", **options)
                want = attack_with(model, batch, SITES, "packed", merge_adapters=merged, capture_graph=False)
                assert got.losses[0]["total"] == pytest.approx(want.losses[0]["total"], rel=0.02)
                assert got.losses[-1]["total"] < got.losses[0]["total"]
            with torch.no_grad():  # in place, as an optimiser does: the graph's copies are made anew
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.mul_(1.1)
    assert len(graphs.graphs_of(model).kept) == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_is_of_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cuda", graphs.cuda_graph)
    check(llama().to("cuda:1"), pairs())


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cuda", graphs.cuda_graph)
    model = llama()
    waits: list[float] = []

    def wait(module: Any, args: Any, out: torch.Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            waits.append(float(out.sum()))  # not permitted

    model.model.norm.register_forward_hook(wait)
    before = torch.cuda.current_stream()
    attack_with(model, pairs(), SITES, "packed", capture_graph="auto")
    found = attack_with(model, pairs(), SITES, "packed", capture_graph="auto")
    assert "the capture failed" in found.captured
    assert torch.cuda.current_stream() == before
    assert_same(found, attack_with(model, pairs(), SITES, "packed", capture_graph=False))
    torch.randn(3, device="cuda")  # the generator still works
    torch.cuda.empty_cache()
    assert attack_with(llama(), pairs(), SITES, "packed", capture_graph=True).captured == "yes"
