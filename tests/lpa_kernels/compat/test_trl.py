"""`patch_trl` leaves a trainer in the manner of TRL its losses, metrics and gradients, and runs each prompt once."""

from __future__ import annotations

import inspect
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpa_kernels import patch_trl
from tests.support.batches import with_lora
from tests.support.foreign import trl_like
from tests.support.models import DEVICE, VOCAB, tiny

PROMPTS, CHOSEN, REJECTED = (9, 6, 12), (4, 7, 1), (5, 3, 6)


def batch(same: bool = True) -> dict[str, Tensor]:
    """Chosen and then rejected texts, right padded; `same`: with the same prompts."""
    draw = torch.Generator().manual_seed(4)
    width = max(PROMPTS) + max(*CHOSEN, *REJECTED)
    ids = torch.randint(1, VOCAB, (2, len(PROMPTS), width), generator=draw)
    if same:
        for row, prompt in enumerate(PROMPTS):
            ids[1, row, :prompt] = ids[0, row, :prompt]
    starts = torch.tensor(PROMPTS).repeat(2)
    ends = starts + torch.tensor(CHOSEN + REJECTED)
    position = torch.arange(width)
    there = position < ends[:, None]
    held = {
        "input_ids": ids.flatten(0, 1).masked_fill(~there, 0),
        "attention_mask": there.long(),
        "completion_mask": (there & (position >= starts[:, None])).long(),
    }
    return {name: value.to(DEVICE) for name, value in held.items()}


@contextmanager
def places(model: nn.Module) -> Iterator[list[int]]:
    """How many places each pass of the decoder runs."""
    seen: list[int] = []
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    hook = inner.base_model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1].numel()))
    yield seen
    hook.remove()


def step(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    loss, metrics = trl_like.PreferenceTrainer(model, **options).compute_loss(inputs)
    weights = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), metrics, list(torch.autograd.grad(loss, weights, materialize_grads=True))


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-4)
    largest = max(float(grad.abs().max()) for grad in theirs[2])
    assert largest > 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(ours[2], theirs[2], strict=True)) < 1e-4 * largest


def lora(**options: Any) -> Any:
    return with_lora(tiny("qwen3", attn="sdpa", **options), lora_dropout=0.0).train()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "kto_pair"])
def test_losses_metrics_and_gradients(loss_type: str) -> None:
    inputs = batch()
    theirs = step(lora(), inputs, loss_type=loss_type)
    with patch_trl(trl_like):
        model = lora()
        with places(model) as seen:
            ours = step(model, inputs, loss_type=loss_type)
    assert_same(ours, theirs)
    own = [length - 1 for length in CHOSEN + REJECTED]
    assert sum(PROMPTS) + sum(own) <= seen[-1] < inputs["input_ids"].numel() * 0.8


def test_a_reference_model_full_weights_and_precomputed_references() -> None:
    inputs = batch()
    theirs = step(tiny("llama").train(), inputs, ref_model=tiny("llama", seed=1))
    with patch_trl(trl_like):
        assert_same(step(tiny("llama").train(), inputs, ref_model=tiny("llama", seed=1)), theirs)
        assert_same(step(tiny("llama").train(), inputs, ref_model=tiny("llama", seed=1), precompute=inputs), theirs)


def test_checkpointed_activations() -> None:
    inputs, found = batch(), []
    for patched in (False, True):
        model = lora()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if patched:
            with patch_trl(trl_like):
                found.append(step(model, inputs))
        else:
            found.append(step(model, inputs))
    assert_same(*found)


def groups() -> list[Tensor]:
    """Prompts padded on the left and completions on the right, each with its mask: two groups of three completions."""
    draw = torch.Generator().manual_seed(0)
    lengths, sizes = (3, 7, 7), (4, 2)
    prompts = [torch.randint(1, VOCAB, (length,), generator=draw) for length in sizes]
    prompt_ids = torch.stack([nn.functional.pad(p, (6 - len(p), 0)) for p in prompts]).repeat_interleave(3, 0)
    prompt_mask = (prompt_ids > 0).long()
    ends = torch.tensor(lengths * 2)[:, None]
    completion_mask = (torch.arange(7) < ends).long()
    completion_ids = torch.randint(1, VOCAB, (6, 7), generator=draw) * completion_mask
    return [t.to(DEVICE) for t in (prompt_ids, prompt_mask, completion_ids, completion_mask)]


def test_groups_padded_on_the_left() -> None:
    found = []
    for patch in (None, patch_trl(trl_like)):
        model = tiny("llama")
        trl_like.add_fused_lm_head(model, temperature=0.7)
        with places(model) as seen:
            found.append(trl_like.group_log_probs(model, *groups()))
        if patch is not None:
            assert seen[-1] < 6 * 13 / 1.5
            patch.undo()
    assert torch.allclose(*found, atol=2e-5)
    assert float(found[0].detach().abs().max()) > 1


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_updates_of_grpo_and_rloo(method: str) -> None:
    """Two updates, reference passes without adapters among them: the same losses and weights, each prompt run once."""
    rewards = torch.tensor([0.3, 0.9, 0.1, 0.7, 0.2, 0.6], device=DEVICE)
    found = []
    for patched in (False, True):
        with patch_trl(trl_like) if patched else nullcontext():
            model = lora()
            trainer = trl_like.GroupTrainer(model, method)
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizer, losses = torch.optim.SGD(trained, lr=0.1), []
        with places(model) as seen:
            for _ in range(2):
                losses.append(trainer.compute_loss(rewards, *groups()))
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
        assert (seen[-1] < 6 * 13 / 1.5) == patched
        found.append((losses, [p.detach() - b for p, b in zip(trained, before, strict=True)]))
    (theirs, moved), (ours, moved_patched) = found
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-5)
    most = max(float(step.abs().max()) for step in moved)
    assert most > 1e-4
    assert max(float((a - b).abs().max()) for a, b in zip(moved, moved_patched, strict=True)) < 1e-3 * most


@pytest.mark.parametrize("why", ["other prompts", "recurrent", "more arguments"])
def test_elsewhere_it_is_their_own_pass(why: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = batch(same=why != "other prompts")
    if why == "more arguments":
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1], device=DEVICE)[None]
    family = "jamba" if why == "recurrent" else "llama"
    theirs = step(tiny(family).train(), inputs, ref_model=tiny(family, seed=1))
    with patch_trl(trl_like), caplog.at_level(logging.WARNING, "lpa_kernels"):
        ours = step(tiny(family).train(), inputs, ref_model=tiny(family, seed=1))
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
    said = [r.getMessage() for r in caplog.records if r.name == "lpa_kernels"]
    assert len(said) == (2 if why == "recurrent" else 0)  # one a model


def test_a_trainer_keeps_its_forward_and_the_module_gets_its_function_back() -> None:
    before = trl_like.add_fused_lm_head
    patch = patch_trl(trl_like)
    assert trl_like.add_fused_lm_head is not before
    model = lora()
    trainer = trl_like.PreferenceTrainer(model)
    patch.undo()
    assert trl_like.add_fused_lm_head is before
    with places(model) as seen:
        trainer.compute_loss(batch())
    assert seen[-1] < batch()["input_ids"].numel() * 0.8
    names = set(inspect.signature(model.get_base_model().forward).parameters)
    assert {"input_ids", "position_ids"} <= names  # `generate` reads them
    assert "self" not in names


def other_version(change: str) -> types.ModuleType:
    """A module as the known one but for one thing."""
    module = types.ModuleType("trl_of_another_day")
    source = inspect.getsource(trl_like)
    changes = {
        "parameters": ("cast_lm_head_to_fp32=False", "head_dtype=None"),
        "keywords": ("shift_labels", "next_labels"),
        "fields": ("    entropy: torch.Tensor | None = None\n", "    entropies: torch.Tensor | None = None\n"),
        "function": ("def add_fused_lm_head", "def add_head"),
    }
    assert changes[change][0] in source
    exec(compile(source.replace(*changes[change]), "other", "exec"), vars(module))
    return module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parameters", r"lack \['cast_lm_head_to_fp32'\] and have \['head_dtype'\] beside those of trl 1.16"),
        ("keywords", r"its forward's keywords lack \['shift_labels'\]"),
        ("fields", r"FusedCausalLMOutput's fields lack \['entropy'\] and have \['entropies'\]"),
        ("function", "trl_of_another_day has no add_fused_lm_head"),
    ],
)
def test_another_version_is_refused_and_left_as_it_was(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl_of_another_day", types.ModuleType("trl_of_another_day"))
    module = other_version(change)
    monkeypatch.setitem(sys.modules, "trl_of_another_day", module)
    before = dict(vars(module))
    with pytest.raises(ValueError, match=message):
        patch_trl(module)
    assert vars(module) == before


def test_refusals() -> None:
    with patch_trl(trl_like), pytest.raises(RuntimeError, match="patched already"):
        patch_trl(trl_like)
    with pytest.raises(ImportError, match="cannot patch 'no_such_trl'"):
        patch_trl("no_such_trl")
    with pytest.raises(TypeError, match="expected a module or its name"):
        patch_trl(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("binds", [0, 12])
def test_a_forward_that_means_something_else_by_its_arguments_is_noticed(
    binds: int, caplog: pytest.LogCaptureFixture
) -> None:
    """shift_labels are shifted once more: the shared pass gives other log-probabilities, and is not taken.

    Also where that begins with more than `binds` labels, after a shorter batch without.
    """
    module = types.ModuleType("shifting")
    shifted = f"labels = shift_labels.roll(int(shift_labels.shape[1] > {binds}), 1)"
    source = inspect.getsource(trl_like).replace("labels = shift_labels", shifted)
    exec(compile(source, "shifting", "exec"), vars(module))
    inputs = batch()
    with patch_trl(module), caplog.at_level(logging.WARNING, "lpa_kernels"):
        trainer = module.PreferenceTrainer(tiny("llama"), ref_model=tiny("llama", seed=1))
        if binds:
            trainer.compute_loss({name: value[1::3] for name, value in inputs.items()})  # 10 labels in shorter rows
            assert not caplog.records
        loss, _ = trainer.compute_loss(inputs)
    theirs, _ = trl_like.PreferenceTrainer(tiny("llama"), ref_model=tiny("llama", seed=1)).compute_loss(inputs)
    assert torch.equal(loss, theirs)
    assert any("differ from TRL's own" in record.getMessage() for record in caplog.records)
