"""shared_prefix gives the log-probabilities, and the gradients, of a plain pass over every text alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny_models import build
from lpa_kernels import Completions, shared_prefix
from lpa_kernels.attack import shared_layout
from lpa_kernels.attack.completions import pack_completions
from tests.support.batches import pairs, with_lora
from tests.support.models import DEVICE, PACKS, STANDS_APART, VOCAB, implementations, tiny

# by prompt: its length and those of its completions
GROUPS = [(9, (4, 7, 1)), (6, (3,)), (8, (5, 2, 2, 6))]


def completions(groups: list[tuple[int, tuple[int, ...]]] = GROUPS, shuffle: bool = True) -> Completions:
    """Random texts, right padded with random tokens, the groups' texts in any order."""
    draw = torch.Generator().manual_seed(2)
    width = max(prompt + max(own) for prompt, own in groups) + 2
    ids, masks, numbers = [], [], []
    for number, (prompt, own) in enumerate(groups):
        start = torch.randint(VOCAB, (prompt,), generator=draw)
        for length in own:
            text = torch.randint(VOCAB, (width,), generator=draw)
            text[:prompt] = start
            ids.append(text)
            masks.append((torch.arange(width) >= prompt) & (torch.arange(width) < prompt + length))
            numbers.append(number * 10)
    order = torch.randperm(len(ids), generator=draw) if shuffle else torch.arange(len(ids))
    held = torch.stack(ids)[order], torch.stack(masks)[order], torch.tensor(numbers)[order]
    return Completions(*(value.to(DEVICE) for value in held))


def plain(model: nn.Module, texts: Completions) -> Tensor:
    """The same, by a pass over each text alone."""
    out = []
    for ids, mask in zip(texts.ids, texts.mask, strict=True):
        end = int(mask.nonzero()[-1]) + 1
        logits = model(input_ids=ids[None, :end], use_cache=False).logits[0, :-1].float()
        found = logits.log_softmax(-1).gather(1, ids[1:end, None])[:, 0] * mask[1:end]
        out.append(nn.functional.pad(found, (0, len(ids) - end)))
    return torch.stack(out)


def gradients(model: nn.Module, log_probs: Tensor) -> list[Tensor]:
    """By the weights that want one, of a sum that weighs every token differently."""
    weights = [p for p in model.parameters() if p.requires_grad]
    scale = torch.linspace(0.5, 1.5, log_probs.numel(), device=log_probs.device).view(log_probs.shape)
    return list(torch.autograd.grad((log_probs * scale).sum(), weights, materialize_grads=True))


def assert_same(model: nn.Module, texts: Completions) -> None:
    ours, theirs = shared_prefix(model, texts), plain(model, texts)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert float((ours - theirs).detach().abs().max()) < 1e-4  # of up to 20
    ours, theirs = gradients(model, ours), gradients(model, theirs)
    largest = max(float(grad.abs().max()) for grad in theirs)
    assert largest > 0.1
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 2e-5 * largest


@pytest.mark.parametrize("family", sorted(PACKS))
def test_values_and_gradients_are_those_of_texts_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family, attn=implementations(family)[-1])
    assert_same(model, completions())
    assert not [record for record in caplog.records if record.name == "lpa_kernels"]
    assert pack_completions(completions()).packed


@pytest.mark.parametrize("family", ["mamba2", "bloom", "lfm2"])
def test_models_that_cannot_share_run_every_text_with_one_warning(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert family in STANDS_APART
    model = tiny(family)
    with caplog.at_level(logging.WARNING, "lpa_kernels"):
        assert_same(model, completions())
        shared_prefix(model, completions())
    said = [record.getMessage() for record in caplog.records if record.name == "lpa_kernels"]
    assert len(said) == 1
    assert "once for each of their completions" in said[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_checkpointed_in_training_mode(lora: bool, reentrant: bool) -> None:
    model: Any = tiny("qwen3", attn="sdpa")
    if lora:
        model = with_lora(model, lora_dropout=0.0)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    texts, found = completions(), []
    for run in (shared_prefix, plain):  # the reentrant kind knows .backward() alone
        model.zero_grad()
        run(model, texts).sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) > 4
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(*found, strict=True))


def test_a_batch_of_pairs_gives_rejected_and_then_chosen() -> None:
    model, batch = tiny("llama"), pairs()
    found = shared_prefix(model, batch)
    width = found.shape[1] + 1
    for half, name in zip(found.chunk(2), ("rejected", "chosen"), strict=True):
        ids, mask = getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_mask")
        theirs = plain(model, Completions(ids[:, :width], mask[:, :width]))
        assert torch.allclose(half, theirs, atol=1e-5)
    mapping = {name: getattr(batch, name) for name in ("rejected_ids", "rejected_mask", "chosen_ids", "chosen_mask")}
    assert torch.equal(shared_prefix(model, mapping | {"attack_mask": batch.attack_mask}), found)


def test_a_prompt_is_run_once() -> None:
    texts = completions([(9, (4, 7, 1))], shuffle=False)
    layout = pack_completions(texts)
    assert layout.shape == (1, 9 + 3 + 6 + 0)  # a completion's last token predicts nothing
    assert int(layout.attention_mask.sum()) == layout.input_ids.numel()
    assert layout.branch.tolist() == [[0] * 9 + [1] * 3 + [2] * 6]
    assert pack_completions(texts, share=False).shape == (3, 15)


def test_a_short_prompt_is_not_shared_where_attention_costs_more() -> None:
    long, short = completions([(512, (64, 64))]), completions([(64, (256, 256))])
    assert [pack_completions(texts, width=576).packed for texts in (long, short)] == [True, False]
    assert pack_completions(short, width=4096).packed
    assert pack_completions(short).packed


def test_groups_are_found_in_the_tokens() -> None:
    texts = completions()
    found = Completions(texts.ids, texts.mask)
    same = lambda groups: groups[:, None] == groups[None]  # noqa: E731
    assert torch.equal(same(found.groups), same(texts.groups))


@pytest.mark.parametrize("positions", [256, 56])  # more than the row is stretched to; fewer
def test_a_window_binds_in_a_row_of_many_completions(positions: int) -> None:
    """Two completions of the prompt fill 22 places, all eight 52: only there does a window of 40 by index bind."""
    model = build("gpt_neo", window_size=40, max_position_embeddings=positions)
    assert_same(model, completions([(12, (6, 6))]))
    assert shared_layout(model, completions([(12, (6, 6))]))[0].packed  # type: ignore[union-attr]
    texts = completions([(12, (6,) * 8)])
    assert pack_completions(texts).shape == (1, 52)
    assert_same(model, texts)


def test_rows_end_where_positions_do() -> None:
    texts = completions([(12, (6,) * 8)])
    assert pack_completions(texts, limit=51).shape == (2, 32)
    model = build("gpt2", max_position_embeddings=32)
    assert shared_layout(model, texts)[0].shape == (2, 32)  # type: ignore[union-attr]
    assert_same(model, texts)


def test_texts_without_anything_in_common_stand_alone() -> None:
    texts = completions([(5, (3,)), (7, (4,))])
    assert not pack_completions(texts).packed
    assert_same(tiny("llama"), texts)


def test_a_large_head_runs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lpa_kernels.attack import completions as module

    monkeypatch.setattr(module, "CHUNK_FROM", 1)
    monkeypatch.setattr(module, "_CHUNK", 5 * VOCAB)
    assert_same(tiny("llama"), completions())
    assert_same(tiny("granite"), completions())  # its scale follows the head, so that it cannot be chunked


def test_sharded_weights_are_not_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from lpa_kernels.attack import completions as module

    monkeypatch.setattr(module, "sharded", lambda model: True)
    with caplog.at_level(logging.WARNING, "lpa_kernels"):
        assert_same(tiny("llama"), completions())
    assert "sharded over ranks" in caplog.text
    monkeypatch.undo()
    model = tiny("llama")
    assert not module.sharded(model)
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    assert module.sharded(model)


def test_gradients_can_be_left_out() -> None:
    model = tiny("llama")
    with torch.no_grad():
        assert not shared_prefix(model, completions()).requires_grad


def test_bad_input_is_named() -> None:
    texts = completions()
    with pytest.raises(ValueError, match=r"texts \d and \d are of one group and have no common prompt: they differ"):
        Completions(texts.ids, texts.mask, torch.zeros_like(texts.groups))
    with pytest.raises(ValueError, match=r"group has shape \(2,\); expected \(8,\)"):
        Completions(texts.ids, texts.mask, texts.groups[:2])
    with pytest.raises(ValueError, match=r"mask has shape .* dtype torch.int64"):
        Completions(texts.ids, texts.mask.long())
    with pytest.raises(ValueError, match=r"ids has shape \(0, 4\)"):
        Completions(texts.ids[:0, :4], texts.mask[:0, :4])
    with pytest.raises(ValueError, match="Linear is no causal language model"):
        shared_prefix(nn.Linear(2, 2), texts)
    with pytest.raises(KeyError, match="the batch has no 'rejected_ids'"):
        shared_prefix(tiny("llama"), {"ids": texts.ids})
