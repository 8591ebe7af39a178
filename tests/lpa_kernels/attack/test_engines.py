"""Does one packed pass a step find what two plain passes a step find: every family, every setting?"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpa_kernels.attack import LatentPGD, loop, pgd
from lpa_kernels.model.facts import ours
from lpa_kernels.model.sites import decoder_layers, in_block
from lpa_kernels.model.trim import trimmable
from lpa_kernels.ops.reference import NORMS, RULES

from ...support.batches import PLAIN, RAGGED, assert_close, assert_same, attack_with, late, llama, pairs, with_lora
from ...support.guards import NoWaiting, guard_steps
from ...support.models import DEPTH, DEVICE, PACKS, STANDS_APART, implementations, tiny

EVERY_FAMILY = [(family, attn) for family in PACKS for attn in implementations(family)]
SITES = ["embedding", "mlp:1", "block:2"]
ENGINES = ["packed", "reference"]
LATE = [(20, 3, 5, 0), (24, 1, 4, 0)]  # prompts that are not attacked


def both(model: nn.Module, batch: Any = None, sites: Any = SITES, **options: Any) -> tuple[Any, Any]:
    """The packed attack and the reference one."""
    batch = pairs() if batch is None else batch
    found = [attack_with(model, batch, sites, engine, **options) for engine in ("packed", "reference")]
    assert [attack.engine for attack in found] == ["packed", "reference"]
    return found[0], found[1]


@pytest.mark.parametrize(("family", "attn"), EVERY_FAMILY)
def test_families(family: str, attn: str) -> None:
    """Ragged batches with one-token, overlapping and unrelated completions, longer than the window; both masks."""
    model = tiny(family, attn=attn)
    for attack in ("prompt", "all"):
        assert_same(*both(model, pairs(RAGGED, attack)))


DENSE = [(family, attn) for family, attn in EVERY_FAMILY if not any("expert" in key for key in PACKS[family])]


@pytest.mark.parametrize(("family", "attn"), DENSE)  # torch's grouped product of experts knows no float64
def test_families_in_float64(family: str, attn: str) -> None:
    """Every entry of every delta, where Adam divides few gradients that are rounding alone by their own size.

    (Norms and routers that compute in float32 whatever they are given leave up to 1e-4.)
    """
    model = tiny(family, attn=attn, dtype=torch.float64)
    got, want = both(model, pairs(RAGGED, "all"), state_dtype=torch.float64)
    for name, delta in want.deltas.items():
        off = (got.deltas[name] - delta).abs().max() / delta.abs().max()
        assert float(off) < 1e-3, (name, float(off))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "gpt2", "opt"])
def test_families_with_lora(family: str) -> None:
    model = with_lora(tiny(family, attn=implementations(family)[-1]), lora_dropout=0.0)
    assert_same(*both(model, pairs(RAGGED, "some"), ["embedding", "attn:1", "mlp:3"]))


@pytest.mark.parametrize("family", STANDS_APART)
def test_families_that_stand_apart(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    batch, sites = pairs(RAGGED, "all"), ["embedding", "block:1"]
    with pytest.raises(RuntimeError, match="engine='packed' cannot run"):
        attack_with(model, batch, sites, "packed")
    told = lambda: [r for r in caplog.records if r.name.startswith("lpa_kernels") and "unshared" in r.message]  # noqa: E731
    assert not told()
    found = [attack_with(model, batch, sites, "auto") for _ in range(2)]
    assert len(told()) == 1
    assert found[0].reason in told()[0].message
    for attack in found:
        assert attack.engine == "unshared"
        assert_same(attack, attack_with(model, batch, sites, "reference"))


@pytest.mark.parametrize("options", [{}, {"l2_penalty": 1e-7}, {"clip_grad": 1e-8}], ids=lambda o: "-".join(o))
@pytest.mark.parametrize("chunk_from", [1, 1 << 27])
def test_float16(options: dict[str, Any], chunk_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 1e-6 a token would leave no float16 gradient; these end within float16's rounding of float32's."""
    monkeypatch.setattr(loop, "CHUNK_FROM", chunk_from)
    found = {}
    for dtype in (torch.float16, torch.float32):
        for engine in ENGINES:
            attacker = LatentPGD(tiny("llama", dtype=dtype), SITES, engine=engine, steps=3, step_size=1e4, rule="sgd",
                                 norm="none", random_start=False, threshold=-8.0, **options)  # fmt: skip
            found[dtype, engine] = attacker.attack(pairs(), (1e6, 1e6))
    for engine in ENGINES:
        for name, want in found[torch.float32, engine].deltas.items():
            assert (found[torch.float16, engine].deltas[name] - want).norm() <= 0.02 * want.norm(), (engine, name)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bfloat16(family: str) -> None:
    """The two engines are as near to each other as bfloat16 is to float32: what differs is where it rounds."""
    batch, options = pairs(RAGGED, "all"), {"rule": "sgd", "step_size": 1.0, "epsilon": 10.0}
    got, want = both(tiny(family, attn="sdpa", dtype=torch.bfloat16), batch, **options)
    exact = attack_with(tiny(family, attn="sdpa"), batch, SITES, "reference", **options)
    rounding = {name: (want.history[name] - exact.history[name]).abs().max() for name in ("toward", "away", "total")}
    for name, allowed in rounding.items():
        assert (got.history[name] - want.history[name]).abs().max() <= allowed + 2e-2, name
    for name, delta in want.deltas.items():
        off, allowed = (got.deltas[name] - delta).norm(), (delta - exact.deltas[name]).norm()
        assert off <= 1.5 * allowed, name
        assert allowed < 0.5 * delta.norm()  # else this would show nothing


@pytest.mark.parametrize("norm", [*NORMS, "l2_sequence"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_and_norms(rule: str, norm: str) -> None:
    model = shared_llama()
    size = {"sgd": 3.0, "normalised": 0.2}.get(rule, 0.02)
    epsilon = {"linf": 0.03, "l2_sequence": 0.3}.get(norm, 0.1)
    got, want = both(model, rule=rule, norm=norm, step_size=size, epsilon=epsilon)
    assert_same(got, want)
    clipped = got.clipped > 0
    assert bool(clipped.all()) == (norm != "none")
    assert torch.equal(got.clipped, want.clipped)


@functools.cache
def shared_llama() -> Any:
    return llama(lora=True)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "toward": {"coefs": {"toward": 1.0}},
    "away": {"coefs": {"away": 0.7}},
    "weights that do not sum to 1": {"coefs": {"toward": 2.0, "away": 0.25}},
    "threshold": {"threshold": -5.0, "coefs": {"away": 1.0}},  # on some tokens of these models
    "penalty": {"l2_penalty": 0.5},
    "clip": {"clip_grad": 0.01, "rule": "sgd", "step_size": 3.0},
    "penalty and clip": {"l2_penalty": 5.0, "clip_grad": 0.01, "rule": "sgd", "step_size": 3.0},
    "random start": {"random_start": True, "seed": 5},
    "random start in a cube": {"random_start": True, "seed": 5, "norm": "linf", "epsilon": 0.03},
    "random start of a sequence": {"random_start": True, "seed": 5, "norm": "l2_sequence"},
    "stop": {"stop_below": 4.4},
    "stop and clip": {"stop_below": 4.4, "clip_grad": 0.01},
    "relative": {"relative": True, "epsilon": 0.02},
    "relative cube": {"relative": True, "epsilon": 0.002, "norm": "linf"},
    "relative sequence": {"relative": True, "epsilon": 0.01, "norm": "l2_sequence"},
    "dpo": {"coefs": {"dpo": 1.0}},
    "dpo, smoothed, with kl": {"coefs": {"dpo": 0.5, "kl": -0.1}, "label_smoothing": 0.1, "beta": 1.0},
    "ipo": {"coefs": {"ipo": 1.0}},
    "dpo without a reference": {"coefs": {"dpo": 1.0}, "reference_free": True},
    "kl alone": {"coefs": {"kl": -1.0}, "random_start": True, "seed": 1},
    "kl beside": {
        "coefs": {"toward": 1.0, "kl": 0.5},
        "random_start": True,
        "seed": 1,
    },  # at 0 its gradient is rounding
    "no decay": {"weight_decay": 0.0},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name: str) -> None:
    options = OBJECTIVES[name]
    got, want = both(shared_llama(), pairs(RAGGED[:3], "all"), **options)
    assert_same(got, want)
    terms = options.get("coefs", {"toward": 0, "away": 0})
    logged = {*terms, "total", "toward_accuracy", "away_accuracy"} | ({"l2_norm"} if "l2_penalty" in options else set())
    assert set(got.history) == logged
    start = sum(got.history[term][0].double() for term in terms)
    assert float(got.history["total"][0]) == pytest.approx(float(start), rel=1e-6)


def test_a_low_precision_state() -> None:
    """Perturbations kept in bfloat16 are within its rounding, 3 steps of half a part in 128, of float32 ones."""
    got, want = both(shared_llama(), state_dtype=torch.bfloat16)
    exact = attack_with(shared_llama(), pairs(), SITES, "reference")
    for name in exact.deltas:
        assert got.deltas[name].dtype == torch.bfloat16
        for delta in (got.deltas[name], want.deltas[name]):
            assert_close(delta.float(), exact.deltas[name], 0.05)


def test_an_example_that_stops_stays() -> None:
    for engine in ("packed", "reference"):
        found = attack_with(shared_llama(), pairs(PLAIN, "prompt"), SITES, engine, stop_below=1e3)
        assert all(not delta.any() for delta in found.deltas_by_row)  # all are below from the start
        assert float(found.history["total"].std()) == 0
        moved = attack_with(shared_llama(), pairs(PLAIN, "prompt"), SITES, engine, stop_below=1e-3)
        assert all(delta.any(dim=-1).all() for delta in moved.deltas_by_row)


@pytest.mark.parametrize(("half", "coefs"), [("rejected", {"away": 1.0}), ("chosen", {"toward": 1.0})])
@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_an_unused_text_is_not_run(engine: str, half: str, coefs: dict[str, float]) -> None:
    """Its tokens may be anything, out of the vocabulary even."""
    batch = pairs(PLAIN, "prompt")
    spoilt = {name: getattr(batch, name).clone() for name in ("rejected_ids", "chosen_ids")}
    spoilt[f"{half}_ids"][:] = 10_000
    other = type(batch).from_dict(vars(batch) | spoilt)
    model = shared_llama()
    assert_same(
        attack_with(model, other, SITES, engine, coefs=coefs), attack_with(model, batch, SITES, engine, coefs=coefs)
    )


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "opt", "falcon", "gemma2"])
@pytest.mark.parametrize("site", ["attn:2", "block:1", "mlp:0", "named"])
def test_sites(family: str, site: str) -> None:
    """Modules that return tuples (gpt_oss's mlp, every attention) and flattened states (opt's fc2) among them."""
    model = tiny(family)
    if site == "named":
        site = next(name for name, m in model.named_modules() if name.endswith(("3.mlp", "3.fc2", "3.self_attn")))
    assert_same(*both(model, sites=[site]))


@pytest.mark.parametrize("sites", [["mlp:2"], ["block:3", "attn:3"], [3, "block:2"]])
def test_lower_blocks_run_once(sites: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those below the lowest site, with results that are the same to the bit as when they run every time."""
    model = llama(lora=True)
    runs: list[int] = []
    lowest = min(int(str(site)[-1]) for site in sites)
    for index, layer in enumerate(model.base_model.model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.append(index))
    attacker = LatentPGD(model, sites, engine="packed", steps=3, step_size=0.02)
    attacker.attack(pairs())
    runs.clear()
    found = attacker.attack(pairs())
    assert [runs.count(index) for index in range(DEPTH)] == [1] * lowest + [3] * (DEPTH - lowest)
    monkeypatch.setattr(pgd, "can_freeze", lambda model, depth: False)
    plain = attacker.attack(pairs())
    assert torch.equal(found.history["total"], plain.history["total"])
    for got, want in zip(found.deltas_by_row, plain.deltas_by_row, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "llama4_text", "gpt2", "falcon"])
def test_the_last_feed_forward_runs_on_few_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    seen: list[int] = []
    layers = decoder_layers(model)
    module = in_block(layers[-1], DEPTH - 1, "mlp")
    # a hook of somebody else's would keep it from being trimmed
    module.register_forward_hook(ours(lambda m, args, out: seen.append(args[0].shape[:-1].numel())))
    batch = pairs(RAGGED, "all")
    found = attack_with(model, batch, SITES, "packed")
    layout = found.layout
    assert layout is not None
    few = len(layout.labels)
    assert few < layout.shape[0] * layout.shape[1]
    assert seen[-3:] == [few] * 3
    whole = attack_with(model, batch, [*SITES, f"mlp:{DEPTH - 1}"], "packed")  # attacked, so run on all
    assert seen[-3:] == [layout.shape[0] * layout.shape[1]] * 3
    assert whole.losses[0]["total"] == pytest.approx(found.losses[0]["total"], rel=1e-5)
    monkeypatch.setattr(loop, "trimmable", lambda model, sites: None)
    assert_same(found, attack_with(model, batch, SITES, "packed"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.003, 1.0])
def test_a_feed_forward_that_mixes_tokens_runs_on_all(dtype: torch.dtype, share: float) -> None:
    model = llama(dtype=dtype)
    # as if it did so by itself: hooks of somebody else's are refused unasked
    model.model.layers[3].mlp.register_forward_hook(ours(lambda m, args, out: out + share * out.mean((0, 1))))
    assert trimmable(model, []) is None
    assert trimmable(llama(dtype=dtype), []) is not None


def test_what_has_no_feed_forward_to_trim() -> None:
    assert trimmable(llama(), []) is not None
    assert trimmable(tiny("mamba2"), []) is None
    assert trimmable(nn.Linear(2, 2), []) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_heads(family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied and untied, plain, with a soft cap, with a scale; whole and (where it is plain) in chunks."""
    model = tiny(family, tie_word_embeddings=tied)
    got, want = both(model)
    assert_same(got, want)
    chunks: list[int] = []
    original = loop.linear_token_loss
    monkeypatch.setattr(loop, "linear_token_loss", lambda *a, **k: chunks.append(1) or original(*a, **k))
    monkeypatch.setattr(loop, "CHUNK_FROM", 1)
    assert_same(attack_with(model, pairs(), SITES, "packed"), want)
    assert len(chunks) == (3 if family == "llama" else 0)


@pytest.mark.parametrize("coefs", [{"dpo": 1.0}, {"away": 1.0}])
def test_a_head_in_chunks_with_other_objectives(coefs: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_llama() if "dpo" in coefs else llama()
    want = attack_with(model, pairs(), SITES, "reference", coefs=coefs)
    monkeypatch.setattr(loop, "CHUNK_FROM", 1)
    monkeypatch.setattr(loop, "plain_head", lambda model: type(loop.output_head(model)) is nn.Linear)
    assert_same(attack_with(model, pairs(), SITES, "packed", coefs=coefs), want)


def test_logits_that_their_own_backward_needs() -> None:
    """A head that ends in a tanh: its gradient must not be written over its result."""
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    assert_same(*both(model))


class _Cap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        out = z.tanh()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.saved_tensors[0] ** 2)


def test_logits_that_a_python_operation_keeps() -> None:
    """Nobody can see what it saves, so its result is left alone."""
    model = llama()
    head = model.lm_head

    class Capped(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return _Cap.apply(head(hidden))

    model.lm_head = Capped()
    assert_same(*both(model, rule="sgd", step_size=3.0))


@pytest.mark.parametrize("after", [lambda z: z[:, :, :97], lambda z: z[..., 2:99], lambda z: z, lambda z: z[0][None]],
                         ids=["cut", "middle", "whole", "row"])  # fmt: skip
def test_views_of_such_logits(after: Any) -> None:
    values = torch.randn(1, 7, 101, requires_grad=True)
    assert loop._saved(after(values.tanh()).flatten(0, -2))
    assert not loop._saved(after(values * 2).flatten(0, -2))


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("options", [{}, {"coefs": {"toward": 1.0}}, {"l2_penalty": 0.5}, {"clip_grad": 0.01},
    {"norm": "l2_sequence"}, {"relative": True, "epsilon": 0.02}], ids=lambda o: "-".join(o))  # fmt: skip
def test_rows_that_no_label_depends_on_stay(options: dict[str, Any], rule: str) -> None:
    """At or past the last label of both texts: they keep their random start in both engines."""
    batch = pairs(RAGGED, "some")
    size = {"sgd": 3.0}.get(rule, 0.02)
    options = {"random_start": True, "step_size": size, "weight_decay": 0.5, "rule": rule} | options
    got, want = (attack_with(shared_llama(), batch, SITES, engine, seed=5, **options) for engine in ENGINES)
    assert_same(got, want)
    if "coefs" in options or options.get("norm") == "l2_sequence":  # other texts; or moved by their sequence's ball
        return
    still = options | {"steps": 1, "step_size": 1e-12, "weight_decay": 0.0}
    start = attack_with(shared_llama(), batch, SITES, "packed", seed=5, **still)
    position = torch.arange(batch.attack_mask.shape[1], device=DEVICE)
    last = torch.stack([(mask * position).amax(1) for mask in (batch.rejected_mask, batch.chosen_mask)]).amax(0)
    unused = batch.attack_mask & (position >= last[:, None])
    assert unused.any()
    for name, delta in got.deltas.items():
        assert_close(delta[unused], start.deltas[name][unused], 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_checkpointing(engine: str, reentrant: bool) -> None:
    """With it the same to the bit, with fewer activations kept; both kinds, with and without an attacked embedding."""
    for sites in (SITES, ["mlp:0", "attn:2"]):
        model = llama(lora=True)
        want = attack_with(model, pairs(), sites, engine)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        function = model.base_model.model.model.layers[0]._gradient_checkpointing_func
        runs: list[bool] = []
        model.base_model.model.model.layers[3].self_attn.register_forward_hook(lambda *_, runs=runs: runs.append(True))
        found = attack_with(model, pairs(), sites, engine)
        per_step = len(runs) / 3
        assert per_step >= (2 if engine == "packed" else 4)  # every block runs again for its gradients
        assert_same(found, want, losses=0, deltas=1e-6)
        assert model.base_model.model.model.layers[0]._gradient_checkpointing_func is function
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_rows_with_checkpointing(engine: str, reentrant: bool) -> None:
    """The gradients of the weights under an attack, taken after the hooks are gone."""
    model = llama(lora=True)
    attacker = LatentPGD(model, SITES, engine=engine, steps=2, step_size=0.5, epsilon=3.0)
    attack = attacker.attack(pairs())

    def gradients() -> list[Tensor]:
        model.zero_grad()
        attacker.rows(pairs(), attack).logits.logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]

    want = gradients()
    unattacked = LatentPGD(model, SITES, engine=engine).rows(pairs()).logits.detach()
    assert not torch.allclose(unattacked, attacker.rows(pairs(), attack).logits.detach(), atol=1e-2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False) is True  # no dropout
    got = gradients()
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()) + 1e-9)


@pytest.mark.parametrize("coefs", [{"toward": 1.0}, {"toward": 1.0, "away": 1.0}])
def test_rows_have_both_completions(coefs: dict[str, float]) -> None:
    batch = pairs(RAGGED, "all")
    found = []
    for engine in ("packed", "reference"):
        attacker = LatentPGD(shared_llama(), SITES, engine=engine, steps=2, step_size=0.02, coefs=coefs)
        found.append(attacker.rows(batch, attacker.attack(batch)))
    for name in ("labels", "rejected", "example"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert_close(found[0].logits, found[1].logits, 1e-4)
    assert len(found[0].labels) == sum(batch.counts)


# ---- nothing waits for the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"coefs": {"dpo": 1.0}}, {"clip_grad": 0.1, "l2_penalty": 0.1, "stop_below": 1.0}, {"norm": "l2_sequence"},
    {"relative": True, "coefs": {"toward": 1.0, "kl": 0.1}},
], ids=["plain", "dpo", "clip, penalty, stop", "sequence", "relative, kl"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("engine", ["packed", "stack"])
def test_no_step_waits(family: str, options: dict[str, Any], engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny(family, attn="sdpa"))
    steps = guard_steps(monkeypatch)
    attack_with(model, pairs(), ["embedding", "mlp:1"], engine, capture_graph=False, **options)
    assert len(steps) >= 3


def test_the_guard_sees_waiting() -> None:
    values = torch.ones(3)
    for wait in (
        lambda: values.sum().item(),
        lambda: values[values > 0],
        lambda: values.nonzero(),
        lambda: bool(values[0]),
    ):
        with pytest.raises(AssertionError, match="in an inner step"), NoWaiting():
            wait()


@pytest.mark.parametrize(
    ("family", "kept"), [("llama", True), ("gpt2", True), ("falcon", True), ("mistral", False), ("gemma2", False)]
)
def test_prompts_that_are_not_attacked_are_run_once(family: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cache holds them all: these families' windows let go of some."""
    model, lengths = tiny(family, attn=implementations(family)[-1]), []
    run = pgd.loop.run

    def watched(model: Any, settings: Any, state: Any, layout: Any, *rest: Any) -> None:
        lengths.append(layout.shape[1])
        run(model, settings, state, layout, *rest)

    monkeypatch.setattr(pgd.loop, "run", watched)
    for sites in (["mlp:1"], ["embedding", "block:2"]):
        found, wanted = both(model, late(pairs(LATE)), sites)
        assert_same(found, wanted)
        assert found.layout is not None
        assert lengths.pop() == found.layout.shape[1] - (19 if kept else 0)


def test_a_reference_without_adapters_has_its_own_prompts() -> None:
    model = llama(lora=True)
    assert_same(*both(model, late(pairs(LATE)), ["mlp:1"], coefs={"dpo": 1.0}))


def test_longer_rows_are_asked_again_whether_prompts_may_be_kept() -> None:
    """The window lets go of nothing of the first batch, and of some of the second."""
    model = tiny("mistral", attn="sdpa")
    for sizes in ([(3, 2, 3, 0)] * 2, LATE):
        assert_same(*both(model, late(pairs(sizes)), ["mlp:1"]))
