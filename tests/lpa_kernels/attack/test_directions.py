"""Adversaries without an inner pass: what they do to hidden states, that engines agree on it, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lpa_kernels import AttackSettings, LatentPGD, PairBatch, mean_difference
from lpa_kernels.attack import ADVERSARIES, read_directions
from tests.support.batches import llama, ragged_batch
from tests.support.models import DEVICE, VOCAB, WIDTH, tiny

SITES = ["embedding", "mlp:1", "block:2"]
FIXED = [name for name in ADVERSARIES if name != "pgd"]


def directions(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(WIDTH, generator=draw).to(DEVICE) for name in SITES}


def made(model: Any, adversary: str, **options: Any) -> LatentPGD:
    given = None if adversary == "random" else directions()
    return LatentPGD(model, SITES, directions=given, adversary=adversary, **{"epsilon": 2.0, "seed": 1} | options)


def seen_at(site: Any, model: Any, batch: PairBatch, hook: Any = None) -> Tensor:
    """Hidden states [B, L, H] of the rejected texts at a site, after a hook on it."""
    seen: list[Any] = []
    handles = [] if hook is None else [site.module.register_forward_hook(hook)]
    handles.append(site.module.register_forward_hook(lambda _, __, out: seen.append(out)))
    with torch.no_grad():
        model(input_ids=batch.rejected_ids)
    for handle in handles:
        handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("adversary", FIXED)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_is_done_to_hidden_states(adversary: str, share: float) -> None:
    model, batch = tiny("llama", attn="sdpa"), ragged_batch()
    pgd = made(model, adversary, share=share)
    attack = pgd.attack(batch)
    assert attack.losses == []
    changed = []
    for site in pgd.sites:
        before, after = seen_at(site, model, batch), seen_at(site, model, batch, attack.hook(site.name))
        unit = directions()[site.name] / directions()[site.name].norm()
        moved = (after - before)[:, : batch.attack_mask.shape[1]]
        there = moved.norm(dim=-1) > 1e-6
        assert not bool(there[~batch.attack_mask].any())
        changed.append(there[batch.attack_mask].float().mean())
        if adversary == "ablate":
            along = (before @ unit)[:, : moved.shape[1]]
            assert torch.allclose(moved[there], -(along[..., None] * unit)[there], atol=1e-5)
            assert float((after[:, : moved.shape[1]] @ unit)[there].abs().max()) < 1e-5
        else:
            assert torch.allclose(moved[there].norm(dim=-1), torch.tensor(2.0, device=DEVICE), atol=1e-4)
        if adversary == "vector":
            assert torch.allclose(moved[there], (2 * unit).expand_as(moved[there]), atol=1e-5)
    assert 0.6 * share < float(torch.stack(changed).mean()) <= share * 1.3  # rows past the last label are left alone


@pytest.mark.parametrize("adversary", FIXED)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba2"])
def test_engines_agree_and_rows_are_those_of_plain_calls(adversary: str, family: str) -> None:
    batch = ragged_batch()
    sites = ["embedding", "block:1"]
    given = {name: torch.linspace(-1, 1, WIDTH, device=DEVICE) for name in sites}
    model, found = tiny(family), []
    for engine in ("auto", "reference"):
        pgd = LatentPGD(
            model, sites, directions=None if adversary == "random" else given, adversary=adversary, engine=engine,
            epsilon=1.0, seed=3, share=0.7,
        )  # fmt: skip
        attack = pgd.attack(batch)
        rows = pgd.rows(batch, attack)
        with attack.applied(), torch.no_grad():
            logits = model(input_ids=batch.chosen_ids).logits[:, :-1][batch.chosen_mask[:, 1:]]
        assert torch.allclose(rows.logits[~rows.rejected], logits, atol=2e-4)
        assert not torch.allclose(rows.logits, pgd.rows(batch).logits, atol=1e-2)
        found.append(rows.logits)
    assert torch.allclose(found[0], found[1], atol=2e-4)


def test_they_cost_no_pass() -> None:
    model, batch = tiny("llama"), ragged_batch()
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for adversary in FIXED:
        pgd = made(model, adversary)
        pgd.attack(batch)  # what is found out of a model is found once
        calls.clear()
        pgd.attack(batch)
        assert not calls


def test_gradients_of_weights_under_ablation_with_checkpointing() -> None:
    batch, found = ragged_batch(), []
    for checkpointed in (False, True):
        model = llama(lora=True)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pgd = made(model, "ablate", share=0.5)
        attack = pgd.attack(batch)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows = pgd.rows(batch, attack)
        loss = torch.nn.functional.cross_entropy(rows.logits, rows.labels)
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    assert max(float(grad.abs().max()) for grad in found[0]) > 1e-3


def test_a_part_of_an_ablation_is_the_ablation_of_the_part() -> None:
    model, batch = tiny("llama"), ragged_batch()
    pgd = made(model, "ablate", share=0.5)
    attack = pgd.attack(batch)
    part = attack.part(1, 3, batch.part(1, 3))
    rows, own = pgd.rows(batch, attack), pgd.rows(batch.part(1, 3), part)
    assert torch.allclose(rows.logits[rows.example >= 1], own.logits, atol=1e-4)


def test_draws_follow_from_the_seed() -> None:
    model, batch = tiny("llama"), ragged_batch()
    first, same, other = (made(model, "random", seed=seed).attack(batch).delta("mlp:1") for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_norms_and_relative_radii() -> None:
    model, batch = tiny("llama"), ragged_batch()
    as_it_is = made(model, "vector", norm="none").attack(batch)
    assert torch.allclose(as_it_is.delta("mlp:1")[0, 0], directions()["mlp:1"] * float(batch.attack_mask[0, 0]))
    corners = made(model, "random", norm="linf", epsilon=0.5).attack(batch).deltas_by_row[0]
    assert set(corners.abs().flatten().tolist()) == {0.0, 0.5}
    relative = made(model, "vector", relative=True, epsilon=0.1).attack(batch)
    moved = relative.row_norms > 0
    assert torch.allclose(relative.row_norms[moved], relative.epsilon[moved], rtol=1e-4)


def test_mean_difference_is_that_of_last_tokens() -> None:
    model = tiny("llama")
    draw = torch.Generator().manual_seed(0)
    towards, away = ([torch.randint(VOCAB, (n,), generator=draw) for n in sizes] for sizes in ((4, 7, 2), (5, 3)))
    found = mean_difference(model, ["block:1", "mlp:0"], towards, away)

    def mean(prompts: list[Tensor]) -> Tensor:
        with torch.no_grad():
            states = [model(ids[None].to(DEVICE), output_hidden_states=True).hidden_states[2][0, -1] for ids in prompts]
        return torch.stack(states).mean(0)

    assert set(found) == {"block:1", "mlp:0"}
    assert torch.allclose(found["block:1"], mean(towards) - mean(away), atol=1e-5)


def test_directions_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    save_file({name: value.cpu() for name, value in directions().items()}, path)
    model, batch = tiny("llama"), ragged_batch()
    attack = LatentPGD(model, SITES, adversary="vector", directions=read_directions(path)).attack(batch)
    assert torch.equal(attack.delta("mlp:1"), made(model, "vector", epsilon=6.0).attack(batch).delta("mlp:1"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "adversary='ablate' needs directions"),
        ({"embedding": torch.ones(WIDTH), "mlp:1": torch.ones(WIDTH)}, "no direction for site 'block:2', only for emb"),
        ({"direction": torch.ones(WIDTH), "mlp:9": torch.ones(WIDTH)}, "a direction for 'mlp:9', which is no site of"),
        (torch.zeros(WIDTH), "direction of site 'embedding' has shape .* and norm 0"),
        (torch.full((WIDTH,), float("nan")), "expected a vector .* of finite numbers"),
        (torch.ones(2, WIDTH), r"has shape \(2, 32\)"),
        (torch.ones(WIDTH + 1), "direction of site 'embedding' has width 33; .* have width 32"),
    ],
)
def test_bad_directions_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentPGD(tiny("llama"), SITES, adversary="ablate", directions=given).attack(ragged_batch())


def test_bad_settings_are_named(tmp_path: Path) -> None:
    for options, message in (
        ({"adversary": "fgsm"}, "adversary='fgsm' is unknown; use one of pgd, vector, ablate, random"),
        ({"share": 0.5}, "share=0.5 must be above 0 and at most 1, and 1 for adversary='pgd'"),
        ({"adversary": "ablate", "share": 0.0}, "share=0.0"),
        ({"adversary": "random", "norm": "none"}, "adversary='random' needs a radius"),
        ({"adversary": "vector", "epsilon": float("inf")}, "norm='none' adds it as it is"),
        ({"adversary": "vector", "norm": "l2_sequence"}, "the same at every token"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackSettings(**options)
    with pytest.raises(ValueError, match="out of range: the model has layers 0 to 3"):
        LatentPGD(tiny("llama"), ["mlp:9"], adversary="ablate", directions=torch.ones(WIDTH))
    with pytest.raises(ValueError, match=r"cannot read directions from .*none\.safetensors"):
        read_directions(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="away has 0 prompts"):
        mean_difference(tiny("llama"), "mlp:1", [torch.ones(2, dtype=torch.long)], [])
