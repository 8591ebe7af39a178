"""Does one packed pass give what two plain passes give, for every family, and are its masks what they should be?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from lpa_kernels.attack import masks
from lpa_kernels.attack.batch import PairBatch
from lpa_kernels.attack.layout import pack, unshared
from lpa_kernels.attack.masks import packed_masks
from lpa_kernels.attack.passes import layout_logits
from lpa_kernels.model.sites import decoder_layers, hidden_of, in_block, resolve_sites, with_hidden

from ...support.batches import ragged_batch
from ...support.models import DEPTH, DEVICE, PACKS, WIDTH, WINDOW, implementations, tiny

EVERY_FAMILY = [(family, attn) for family in PACKS for attn in implementations(family)]


@dataclass
class Perturbation:
    """A random delta at the embedding and at a middle feed-forward layer."""

    model: nn.Module
    batch: PairBatch

    def __post_init__(self) -> None:
        rows = int(self.batch.attack_mask.sum())
        draw = torch.Generator().manual_seed(2)
        self.deltas = [torch.randn(rows, WIDTH, generator=draw).mul(0.3).to(DEVICE).requires_grad_() for _ in range(2)]

    @contextmanager
    def at(self, rows: Tensor) -> Iterator[None]:
        """Added to the tokens of the next passes; `rows` [tokens] says which delta row each gets, -1 = none."""

        def add(delta: Tensor) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                hidden = hidden_of(output)
                extra = torch.where(rows[:, None] >= 0, delta[rows], 0.0)
                return with_hidden(output, hidden + extra.view_as(hidden))

            return hook

        sites = resolve_sites(self.model, ["embedding", 1])
        handles = [s.module.register_forward_hook(add(d)) for s, d in zip(sites, self.deltas, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def separately(model: nn.Module, batch: PairBatch, perturbation: Perturbation) -> Tensor:
    """[N, V]: every text alone, without padding or masks of any kind."""
    found = []
    for ids, mask in ((batch.rejected_ids, batch.rejected_mask), (batch.chosen_ids, batch.chosen_mask)):
        for pair in range(len(batch)):
            labels = [p for p in range(1, mask.shape[1]) if mask[pair, p]]
            length = labels[-1] + 1
            rows = torch.full((length,), -1, device=DEVICE)
            grid = batch.grid[pair, :length]
            rows[: len(grid)] = grid
            with perturbation.at(rows):
                logits = model(input_ids=ids[pair : pair + 1, :length]).logits[0]
            found.append(logits[[p - 1 for p in labels]])
    return torch.cat(found)


def assert_near(value: Tensor, expected: Tensor, relative: float) -> None:
    assert float((value - expected).detach().abs().max()) <= relative * float(expected.detach().abs().max())


def compare(model: nn.Module) -> int:
    """Assert that logits and the gradients of delta and of the weights that have any agree; how many gradients."""
    batch = ragged_batch()
    layout = pack(batch)
    perturbation = Perturbation(model, batch)
    leaves = [*perturbation.deltas, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        return torch.autograd.grad((logits.log_softmax(-1) * direction).sum(), leaves)

    with perturbation.at(layout.token_rows):  # the backward too: checkpointing runs the hooks again
        logits = layout_logits(model, layout)
        grads = gradients(logits)
    expected = separately(model.eval(), batch, perturbation)
    assert_near(logits, expected, 2e-5)
    for grad, expected_grad in zip(grads, gradients(expected), strict=True):
        assert float(expected_grad.abs().max()) > 0
        assert_near(grad, expected_grad, 1e-4)
    return len(grads)


@pytest.mark.parametrize(("family", "attn"), EVERY_FAMILY)
def test_one_packed_pass_is_two_plain_ones(family: str, attn: str) -> None:
    compare(tiny(family, attn=attn).requires_grad_(False))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "attn"), [("llama", "sdpa"), ("gemma3_text", "sdpa"), ("gpt_oss", "eager")])
def test_lora_gradients(family: str, attn: str, checkpointing: bool) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny(family, attn=attn), config)
    passes: list[int] = []
    attention = in_block(decoder_layers(model)[0], 0, "attn")
    attention.register_forward_pre_hook(lambda *_: passes.append(1) if model.training else None)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert compare(model) == 2 + 2 * 2 * DEPTH
    assert len(passes) == 1 + checkpointing


def test_windows_bind_in_these_tests() -> None:
    """Else the equality above would not test them."""
    batch = ragged_batch()
    with torch.no_grad():
        short, long = (layout_logits(tiny("mistral", sliding_window=w), pack(batch)) for w in (WINDOW, 100))
    assert float((short - long).abs().max()) > 0.1


# ---- the masks themselves


PATTERNS: dict[str, tuple[Callable[..., Any], Callable[[int, int], bool]]] = {
    "full": (create_causal_mask, lambda q, k: k <= q),
    "sliding": (create_sliding_window_causal_mask, lambda q, k: q - 3 < k <= q),
    "chunked": (create_chunked_causal_mask, lambda q, k: k <= q and k // 4 == q // 4),
}


def config_of(attn: str) -> LlamaConfig:
    config = LlamaConfig(sliding_window=3, attention_chunk_size=4)
    config._attn_implementation = attn
    return config


def ask(create: Callable[..., Any], attn: str, layout: Any, dtype: torch.dtype = torch.float32) -> Any:
    return create(
        config=config_of(attn),
        inputs_embeds=torch.zeros(*layout.shape, 4, dtype=dtype, device=DEVICE),
        attention_mask=layout.attention_mask,
        past_key_values=None,
        position_ids=layout.position_ids,
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_entry(pattern: str) -> None:
    create, sees = PATTERNS[pattern]
    layout = pack(ragged_batch())
    with packed_masks(layout) as calls:
        mask = ask(create, "sdpa", layout)
        half = ask(create, "eager", layout, torch.bfloat16)
    rows, length = layout.shape
    branch, position = layout.branch.tolist(), layout.position_ids.tolist()
    for b in range(rows):
        for i in range(length):
            for j in range(length):
                of, key = branch[b][i], branch[b][j]
                expected = (key == of or (of > 0 and key == 0)) and sees(position[b][i], position[b][j])
                if of == -1:
                    expected = i == j
                assert bool(mask[b, 0, i, j]) == expected
    assert mask.shape == (rows, 1, length, length)
    assert mask.dtype == torch.bool
    assert half.dtype == torch.bfloat16
    least = torch.full_like(half, torch.finfo(torch.bfloat16).min)
    assert torch.equal(half, torch.where(mask, torch.zeros_like(half), least))
    assert calls.count == 2
    assert calls.local_sizes == {"full": set(), "sliding": {3}, "chunked": {4}}[pattern]


def test_a_mask_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    evaluate = masks._evaluate
    monkeypatch.setattr(masks, "_evaluate", lambda *args: made.append(1) or evaluate(*args))
    model, layout = tiny("gemma3_text"), pack(ragged_batch())
    with torch.inference_mode():
        first = layout_logits(model, layout)
    second = layout_logits(model, layout)  # with gradients, from the masks of the pass without
    second.sum().backward()
    assert torch.equal(first, second.detach())
    assert len(made) == len(layout.masks) == 2  # full and sliding


def test_patterns_of_one_kind_have_masks_of_their_own() -> None:
    layout = pack(ragged_batch())
    config = config_of("sdpa")
    seen = []
    with packed_masks(layout):
        for window in (2, 5, 2):
            config.sliding_window = window
            embeds = torch.zeros(*layout.shape, 4, device=DEVICE)
            seen.append(create_sliding_window_causal_mask(config, embeds, layout.attention_mask, None))
    assert seen[0] is seen[2]
    assert not torch.equal(seen[0], seen[1])


def test_the_library_is_left_as_it_was() -> None:
    before = [ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("eager", "sdpa")]
    layout, other = pack(ragged_batch()), unshared(ragged_batch())

    def fail() -> None:
        with packed_masks(layout):
            assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not before[1]
            with packed_masks(other):
                assert ask(create_causal_mask, "sdpa", other).shape[-1] == other.shape[1]
            assert ask(create_causal_mask, "sdpa", layout).shape[-1] == layout.shape[1]
            raise RuntimeError("from within")

    with pytest.raises(RuntimeError, match="from within"):
        fail()
    assert [ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("eager", "sdpa")] == before


def test_other_threads_get_the_librarys_masks() -> None:
    layout = pack(ragged_batch())
    seen = []

    def elsewhere() -> None:
        seen.append(ask(create_causal_mask, "sdpa", layout))
        with packed_masks(layout):
            seen.append(ask(create_causal_mask, "sdpa", layout))

    with packed_masks(layout):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        here = ask(create_causal_mask, "sdpa", layout)
    assert torch.equal(seen[1], here)
    assert not torch.equal(seen[0], here)
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


def test_masks_that_cannot_be_packed_are_refused() -> None:
    layout = pack(ragged_batch())
    embeds, two = torch.zeros(*layout.shape, 4, device=DEVICE), layout.attention_mask
    by_index = torch.ones(layout.shape, dtype=torch.bool, device=DEVICE)
    with packed_masks(layout):
        with pytest.raises(ValueError, match="shape"):
            create_causal_mask(config_of("sdpa"), embeds[:, 1:], two[:, 1:], None)
        with pytest.raises(ValueError, match="lets a token see later ones"):
            create_bidirectional_mask(config_of("sdpa"), embeds, two)
        with pytest.raises(ValueError, match="mask function of its own"):
            create_causal_mask(config_of("sdpa"), embeds, two, None, and_mask_function=lambda b, h, q, k: k <= q)
        with pytest.raises(ValueError, match="may go by index"):
            create_causal_mask(config_of("sdpa"), embeds, two, None, block_sequence_ids=by_index)
