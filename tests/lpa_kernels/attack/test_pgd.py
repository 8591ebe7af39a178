"""LatentPGD: what it puts back, what it returns, how its attacks are applied, and what it refuses."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lpa_kernels.attack import LatentPGD, PairBatch, loop
from lpa_kernels.model.modes import cast_adapters, inner_mode, merged_adapters, weights_dtype
from lpa_kernels.ops import registry

from ...support.batches import PLAIN, assert_close, assert_same, attack_with, llama, pairs, with_lora
from ...support.models import DEVICE, WIDTH, tiny

SITES = ["embedding", "mlp:1"]
ENGINES = ["packed", "reference"]


def logits(model: nn.Module, batch: PairBatch, name: str = "rejected") -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=getattr(batch, f"{name}_ids"), use_cache=False).logits


def losses(model: nn.Module, batch: PairBatch) -> float:
    """The objective of the default coefficients, from two plain calls and torch's own losses."""
    parts = []
    for name in ("rejected", "chosen"):
        mask = getattr(batch, f"{name}_mask")[:, 1:]
        own = logits(model, batch, name)[:, :-1][mask].float().log_softmax(-1)
        own = own.gather(1, getattr(batch, f"{name}_ids")[:, 1:][mask][:, None])[:, 0]
        parts.append(-own.mean() if name == "rejected" else -torch.log1p(-own.exp()).mean())
    return float(sum(parts) / 2)


# ---- the attack works ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_it_beats_a_random_delta_of_the_same_norm(engine: str) -> None:
    model, batch = llama(), pairs()
    found = attack_with(model, batch, SITES, engine, steps=8, step_size=0.05, epsilon=0.5)
    start = losses(model, batch)
    with found.applied():
        attacked = losses(model, batch)
    draw = torch.Generator().manual_seed(0)
    best = start
    for _ in range(20):
        noise = [torch.randn(d.shape, generator=draw).to(d.device) for d in found.deltas_by_row]
        own = found.deltas_by_row
        found.deltas_by_row = [n * (d.norm(dim=1) / n.norm(dim=1))[:, None] for n, d in zip(noise, own, strict=True)]
        with found.applied():
            best = min(best, losses(model, batch))
        found.deltas_by_row = own
    assert start - attacked > 3 * (start - best)
    assert start - attacked > 0.5


@pytest.mark.parametrize("engine", ENGINES)
def test_diagnostics(engine: str) -> None:
    model, batch = llama(), pairs()
    found = attack_with(model, batch, SITES, engine, steps=12, step_size=0.1, epsilon=1.0)
    assert len(found.losses) == 12
    assert found.losses[0].keys() == {"toward", "away", "total", "toward_accuracy", "away_accuracy"}
    assert 0.5 * (found.losses[0]["toward"] + found.losses[0]["away"]) == pytest.approx(losses(model, batch), rel=1e-5)
    assert found.losses[-1]["total"] < found.losses[0]["total"]
    own = logits(model, batch)[:, :-1][batch.rejected_mask[:, 1:]].argmax(-1) == batch.labels("rejected")
    assert found.losses[0]["toward_accuracy"] == pytest.approx(float(own.float().mean()))
    assert found.losses[-1]["toward_accuracy"] > 0.5  # it has won
    assert found.norms.keys() == set(SITES)
    assert all(bool((norms <= 1 + 1e-5).all()) for norms in found.norms.values())
    # every row whose token predicts something moves, and this far it reaches the boundary
    assert found.boundary_fraction == 1.0
    assert attack_with(model, batch, SITES, engine, epsilon=1.0).boundary_fraction == 0.0
    assert bool((found.clipped > 0).all())
    assert "q_proj" not in repr(found)
    assert len(repr(found)) < 400


def test_delta_is_zero_off_the_mask() -> None:
    batch = pairs(attack="some")
    found = attack_with(llama(), batch, SITES, "packed")
    for delta in found.deltas.values():
        assert delta.shape == (*batch.attack_mask.shape, WIDTH)
        assert not delta[~batch.attack_mask].any()
        assert delta[batch.attack_mask].any()


def test_the_same_seed_starts_the_same(caplog: pytest.LogCaptureFixture) -> None:
    options = {"random_start": True, "steps": 1, "step_size": 1e-6, "epsilon": 0.5}
    found = [attack_with(llama(), pairs(), SITES, "packed", seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(found[0].deltas_by_row[0], found[1].deltas_by_row[0])
    assert not torch.allclose(found[0].deltas_by_row[0], found[2].deltas_by_row[0], atol=1e-2)
    norms = torch.cat(list(found[0].norms.values()))
    assert float(norms.max()) <= 0.5 + 1e-4
    assert float(norms.median()) > 0.45  # uniform in a ball of 32 dimensions is near its surface
    cube = attack_with(llama(), pairs(), SITES, "packed", norm="linf", seed=1, **options)
    assert float(cube.deltas_by_row[0].abs().mean()) == pytest.approx(0.25, rel=0.1)
    assert attack_with(llama(), pairs(), SITES, "packed", **options).deltas_by_row[0].any()


def test_a_callers_generator_is_drawn_from_in_place_of_the_seeds() -> None:
    options = {"random_start": True, "steps": 1, "step_size": 1e-6, "epsilon": 0.5, "engine": "packed"}
    model, batch = llama(), pairs()
    pgd, untouched = (LatentPGD(model, SITES, seed=1, **options) for _ in range(2))
    given = [pgd.attack(batch, generator=torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)]
    assert torch.equal(given[0].deltas_by_row[0], given[1].deltas_by_row[0])
    assert not torch.equal(given[0].deltas_by_row[0], given[2].deltas_by_row[0])
    assert torch.equal(pgd.attack(batch).deltas_by_row[0], untouched.attack(batch).deltas_by_row[0])


def test_the_sequence_ball() -> None:
    batch = pairs(attack="all")
    for options in ({"steps": 10, "step_size": 0.1}, {"random_start": True, "seed": 1, "steps": 1, "step_size": 1e-6}):
        found = attack_with(llama(), batch, SITES, "packed", norm="l2_sequence", epsilon=0.4, **options)
        for delta in found.deltas.values():
            assert delta.flatten(1).norm(dim=1).tolist() == pytest.approx([0.4] * len(batch), rel=0.05)


def test_a_relative_radius() -> None:
    model, batch = llama(), pairs()
    seen: dict[str, Any] = {}
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: seen.__setitem__("out", out))
    found = attack_with(model, batch, ["mlp:1"], "packed", relative=True, epsilon=0.1, steps=10, step_size=0.5)
    logits(model, batch)
    handle.remove()
    prompt = torch.zeros_like(batch.attack_mask)  # the same in both texts
    for row, (length, *_) in enumerate(PLAIN):
        prompt[row, :length] = True
    want = 0.1 * seen["out"].norm(dim=-1)[prompt]
    torch.testing.assert_close(found.delta("mlp:1").norm(dim=-1)[prompt], want, rtol=1e-4, atol=0)


def test_the_warning_that_the_radius_never_binds(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    for _ in range(2):
        LatentPGD(model, SITES, steps=2, step_size=1e-3).attack(pairs())
    told = [r for r in caplog.records if "never binds" in r.message]
    assert len(told) == 1
    assert "epsilon=6 never binds: 2 steps of 0.001 reach a norm of 0.0113 at width 32" in told[0].message
    assert told[0].levelno == logging.WARNING
    caplog.clear()
    for options in ({"epsilon": 0.01}, {"norm": "none"}, {"rule": "sgd"}, {"relative": True, "epsilon": 0.1}):
        LatentPGD(llama(), SITES, steps=2, **options).attack(pairs())
    assert not caplog.records


def test_a_model_is_measured_once_a_place() -> None:
    model, passes = llama(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = LatentPGD(model, SITES).widths()
    assert LatentPGD(model, SITES).widths() is first
    assert len(passes) == 1
    assert len(LatentPGD(model, ["mlp:0"]).widths()) == 1
    assert len(passes) == 2
    model.elsewhere = nn.Parameter(torch.empty(1, device="meta"))  # its parameters' devices are others now
    assert LatentPGD(model, SITES).widths() == first
    assert len(passes) == 3


# ---- what an attack is good for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "opt"])
def test_applying(family: str) -> None:
    """Plain calls on either text, in one context or with plain hooks, give what the rows of the attack are."""
    model, batch = tiny(family), pairs()
    attacker = LatentPGD(model, SITES, engine="packed", steps=2, step_size=0.1, epsilon=0.3)
    clean, found = logits(model, batch), attacker.attack(batch)
    assert torch.equal(logits(model, batch), clean)  # no hook is left
    with found.applied():
        attacked = logits(model, batch)
    assert not torch.allclose(attacked, clean, atol=1e-2)
    rows = attacker.rows(batch, found)
    assert_close(rows.logits[rows.rejected], attacked[:, :-1][batch.rejected_mask[:, 1:]], 1e-4)
    handles = [site.module.register_forward_hook(found.hook(site.name)) for site in found.sites]
    assert torch.equal(logits(model, batch), attacked)
    found.enabled = False
    assert torch.equal(logits(model, batch), clean)
    with found.applied():
        assert torch.equal(logits(model, batch), clean)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("compiled", ["another module", "in place"])
def test_a_compiled_model_is_perturbed_too(compiled: str) -> None:
    """Compiled code calls the hooks that there were when it was compiled, and no others."""
    model, batch = llama(), pairs()
    found = attack_with(model, batch, SITES, "packed", step_size=0.1, epsilon=0.3)
    with found.applied():
        want = logits(model, batch)
    if compiled == "in place":
        model.compile(backend="eager")
    called = torch.compile(model, backend="eager") if compiled == "another module" else model
    clean = logits(called, batch)
    with found.applied():
        assert torch.equal(logits(called, batch), want)
    assert torch.equal(logits(called, batch), clean)
    assert not torch.allclose(clean, want, atol=1e-2)
    if compiled == "in place":
        assert_same(attack_with(model, batch, SITES, "packed", step_size=0.1, epsilon=0.3), found)


@pytest.mark.parametrize("attacked", [6, 1])
def test_generation_under_an_attack(attacked: int) -> None:
    """With a cache, what it gives is what plain calls over ever longer texts give."""
    model = llama()
    batch = pairs([(6, 4, 3, 0), (6, 2, 5, 0)], "prompt")
    batch = replace(batch, attack_mask=batch.attack_mask[:, :attacked])
    found = attack_with(model, batch, SITES, "packed", steps=4, step_size=0.3, epsilon=2.0)
    prompt = batch.rejected_ids[:, :6]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with found.applied():
        got = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        want = prompt
        for _ in range(5):
            want = torch.cat([want, model(input_ids=want, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want)
    assert not torch.equal(got, model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))


def test_attacks_side_by_side() -> None:
    """Each micro-batch keeps its own; applying one does not touch another."""
    model = llama()
    attacker = LatentPGD(model, SITES, steps=2, step_size=0.1, epsilon=0.3)
    batches = [pairs(seed=1), pairs([(3, 2, 2, 0)], seed=2), pairs(seed=3)]
    attacks = [attacker.attack(batch) for batch in batches]
    again = [attacker.attack(batch) for batch in reversed(batches)][::-1]
    for attack, same, batch in zip(attacks, again, batches, strict=True):
        assert_same(attack, same, losses=0, deltas=0)
        with attack.applied():
            assert losses(model, batch) < attack.losses[0]["total"]
    with attacks[0].applied(), pytest.raises(ValueError, match=r"attack is on a batch of 2.* batch of 1"):
        logits(model, batches[1])
    for other, field in ((batches[1], "rejected_ids"), (batches[2], "rejected_ids")):
        with pytest.raises(ValueError, match=rf"attack is on another batch \(its {field} differs\)"):
            attacker.rows(other, attacks[0])
    assert attacker.rows(vars(batches[0]), attacks[0]).size == 2  # the same in other memory
    assert attacks[0].layout.masks
    assert attacks[0].to("cpu") is attacks[0]
    assert not attacks[0].layout.masks  # they would keep the GPU's memory


@pytest.mark.parametrize("field", ["rejected_mask", "attack_mask", "chosen_ids", "chosen_labels"])
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_another_batch_are_refused(engine: str, field: str) -> None:
    batch = pairs()
    attacker = LatentPGD(llama(), SITES, engine=engine, steps=1)
    found = attacker.attack(batch)
    changed = batch.labels("chosen") if field == "chosen_labels" else getattr(batch, field).clone()
    if field == "chosen_labels":
        changed = changed + 1
    else:
        changed[1, 4] = ~changed[1, 4] if changed.dtype == torch.bool else changed[1, 4] + 1
    with pytest.raises(ValueError, match=f"its {field} differs"):
        attacker.rows(PairBatch(**vars(batch) | {field: changed}), found)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_backend_reaches_every_op(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = registry.select
    monkeypatch.setattr(registry, "select", lambda op, backend, args: asked.append((op, backend))
                        or original(op, "auto", args))  # fmt: skip
    attacker = LatentPGD(llama(), SITES, engine=engine, steps=1, backend="reference")
    found = attacker.attack(pairs())
    with found.applied():
        logits(attacker.model, pairs())
    attacker.rows(pairs(), found)
    handle = found.sites[0].module.register_forward_hook(found.hook(found.names[0]))
    logits(attacker.model, pairs())
    handle.remove()
    assert {op for op, _ in asked} >= {"perturb", "pgd_update_", "token_loss_"}
    assert {backend for _, backend in asked} == {"reference"}


def test_without_a_ball_nothing_is_at_its_boundary() -> None:
    for options in ({}, {"relative": True}):
        found = attack_with(llama(), pairs(), SITES, "packed", norm="none", epsilon=1e-6, **options)
        assert found.boundary_fraction == 0.0
        assert found.epsilon == float("inf")


def test_the_share_of_padding() -> None:
    uneven = pairs([(6, 4, 3, 0), (2, 2, 2, 0)])
    found = attack_with(llama(), uneven, SITES, "packed", steps=1)
    # the last label's token predicts nothing: rows of 6 + 3 + 2 and 2 + 1 + 1 tokens
    assert found.padding_share == pytest.approx(1 - (11 + 4) / 22)
    assert attack_with(llama(), uneven, SITES, "reference", steps=1).padding_share is None


def test_a_mapping_is_a_batch() -> None:
    batch = pairs()
    as_mapping = {k: v for k, v in vars(batch).items() if v is not None} | {"other": 1}
    as_mapping["attack_mask"] = batch.attack_mask.long()
    assert_same(attack_with(llama(), as_mapping, SITES, "packed"), attack_with(llama(), batch, SITES, "packed"), 0, 0)
    with pytest.raises(KeyError, match="the batch has no 'chosen_mask'"):
        PairBatch.from_dict({k: v for k, v in as_mapping.items() if k != "chosen_mask"})


# ---- what is put back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("options", [{}, {"engine": "reference"}, {"merge_adapters": True}, {"coefs": {"dpo": 1.0}}],
                         ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else str(o))  # fmt: skip
def test_the_model_is_left_as_it_was(options: dict[str, Any], fail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure half way too."""
    model = with_lora(llama().to(torch.bfloat16))
    model.train()
    model.base_model.model.model.layers[2].eval()
    before = {
        name: (p.data_ptr(), p.dtype, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()
    }
    flags = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    if fail:
        monkeypatch.setattr("lpa_kernels.attack.state.pgd_update_", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attack_with(model, pairs(), ["mlp:2"], **({"engine": "packed"} | options))
    else:
        attack_with(model, pairs(), ["mlp:2"], **({"engine": "packed"} | options))
    for name, p in model.named_parameters():
        pointer, dtype, wanted, data = before[name]
        assert (p.data_ptr(), p.dtype, p.requires_grad, p.grad) == (pointer, dtype, wanted, None), name
        assert torch.equal(p.detach(), data), name
    assert [m.training for m in model.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not any(getattr(m, "merged_adapters", None) for m in model.modules())


def test_dropout_has_no_part() -> None:
    model = llama(lora=True)
    want = attack_with(model, pairs(), SITES, "packed")
    model.train()
    assert_same(attack_with(model, pairs(), SITES, "packed"), want, losses=0, deltas=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_take_the_weights_dtype(dtype: torch.dtype) -> None:
    model = with_lora(llama().to(dtype))
    assert weights_dtype(model) == dtype
    seen = set()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"]
    layer.register_forward_pre_hook(lambda m, args: seen.add((m.weight.dtype, args[0].dtype)))
    got, want = (attack_with(model, pairs(), SITES, engine) for engine in ENGINES)
    assert seen == {(dtype, dtype)}
    assert layer.weight.dtype == torch.float32
    assert got.losses[-1]["total"] == pytest.approx(want.losses[-1]["total"], abs=0.05)
    with cast_adapters(llama(lora=True)) as nothing:
        assert nothing is None


def test_a_changed_adapter_is_copied_again() -> None:
    model = with_lora(llama().to(torch.bfloat16))
    first = attack_with(model, pairs(), SITES, "packed")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(3)
    second = attack_with(model, pairs(), SITES, "packed")
    assert abs(first.losses[0]["toward"] - second.losses[0]["toward"]) > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_merged_adapters(engine: str) -> None:
    model = llama(lora=True)
    want = attack_with(model, pairs(), SITES, engine)
    assert_same(attack_with(model, pairs(), SITES, engine, merge_adapters=True), want, losses=1e-5, deltas=1e-3)
    with merged_adapters(model), merged_adapters(model):  # what is merged already is left to whoever merged it
        pass
    with pytest.raises(ValueError, match="no adapter that peft can merge"):
        attack_with(llama(), pairs(), SITES, engine, merge_adapters=True)


def test_autocast_outside_has_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    want = attack_with(model, pairs(), SITES, "packed")
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
        assert_same(attack_with(model, pairs(), SITES, "packed"), want, losses=0, deltas=0)
    with inner_mode(model, autocast=torch.bfloat16):
        assert model(input_ids=pairs().rejected_ids).logits.dtype == torch.bfloat16
    low = attack_with(model, pairs(), SITES, "packed", autocast=torch.bfloat16)
    assert low.losses[0]["toward"] == pytest.approx(want.losses[0]["toward"], abs=0.1)
    assert low.losses[0]["toward"] != want.losses[0]["toward"]
    monkeypatch.setattr(loop, "CHUNK_FROM", 1)  # whose products would not be in the autocast's dtype
    again = attack_with(model, pairs(), SITES, "packed", autocast=torch.bfloat16)
    assert_same(again, low, losses=0, deltas=0)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_broken_model(engine: str) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    attacker = LatentPGD(model, SITES, engine="reference" if engine == "reference" else "auto", steps=2)
    with pytest.raises(FloatingPointError, match="loss is nan at inner step 0"):
        attacker.attack(pairs())


def test_a_gradient_that_is_cut() -> None:
    model = llama()
    model.model.norm.register_forward_hook(lambda m, args, out: out.detach().requires_grad_())
    for engine in ENGINES:
        with pytest.raises(RuntimeError, match="no gradient reaches any site"):
            attack_with(model, pairs(), SITES, engine)


def test_batches_with_nothing_to_do() -> None:
    batch = pairs()
    held = vars(batch)
    nothing = torch.zeros_like(batch.attack_mask)
    with pytest.raises(ValueError, match="chosen_mask has no completion token after position 0"):
        attack_with(llama(), PairBatch(**held | {"chosen_mask": nothing}), SITES, "packed")
    with pytest.raises(ValueError, match="rejected_mask has no completion token after position 0"):
        attack_with(llama(), PairBatch(**held | {"rejected_mask": nothing}), SITES, "packed", coefs={"toward": 1.0})
    with pytest.raises(ValueError, match="attack_mask has no True"):
        attack_with(llama(), PairBatch(**held | {"attack_mask": nothing}), SITES, "packed")


def test_a_reference_needs_adapters() -> None:
    for engine in ENGINES:
        with pytest.raises(ValueError, match="it has none; use reference_free=True"):
            attack_with(llama(), pairs(), SITES, engine, coefs={"dpo": 1.0})


EMPTY = {
    "no position": ("attack_mask",),
    "no rejected": ("rejected_mask",),
    "nothing": ("rejected_mask", "chosen_mask"),
}


@pytest.mark.parametrize("options", [{}, {"random_start": True, "seed": 0}, {"relative": True}, {"clip_grad": 0.1}])
@pytest.mark.parametrize("engine", ["reference", "packed"])
def test_a_part_with_nothing_to_do_is_as_in_the_whole(engine: str, options: dict[str, Any]) -> None:
    """Batches of one pair each, three of which have nothing to attack or to score."""
    model, batch = llama(lora=True), pairs([(6, 4, 3, 0), (4, 2, 5, 0), (3, 3, 3, 1), (5, 2, 2, 0)])
    for row, names in enumerate(EMPTY.values()):
        for name in names:
            getattr(batch, name)[row] = False
    pgd = LatentPGD(model, SITES, engine=engine, steps=3, step_size=0.02, epsilon=0.1, **options)
    whole, start = pgd.attack(batch), 0
    sums = {name: torch.zeros(3, device=DEVICE) for name in ("toward", "away")}
    for row in range(len(batch)):
        own = batch.part(row, row + 1)
        if row < len(EMPTY):
            with pytest.raises(ValueError, match="has no"):
                pgd.attack(own, batch.counts)
        found, taken = pgd.attack(own, batch.counts, part=True), whole.part(row, row + 1, own)
        assert found.row_norms.shape[1] == int(own.attack_mask.sum()) == taken.row_norms.shape[1]
        for attack in (found, taken):
            logits = pgd.rows(own, attack).logits
            assert len(logits) == sum(own.counts)
            if row == 0:
                assert torch.equal(logits, pgd.rows(own).logits)
        if not options:
            for name, delta in found.deltas.items():
                assert torch.allclose(delta, taken.deltas[name], atol=1e-4)
            for name, total in sums.items():
                total += found.history[name]
        start += found.row_norms.shape[1]
    assert start == whole.row_norms.shape[1]
    if not options:
        for name, total in sums.items():
            assert torch.allclose(total, whole.history[name].float(), atol=1e-5)
