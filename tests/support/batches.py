"""Small ragged batches of pairs, LoRA models to attack, and the comparison of two attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lpa_kernels.attack import AttackResult, LatentPGD, PairBatch

from .models import DEVICE, VOCAB, tiny

# (prompt, rejected, chosen, how many first tokens the completions share), all in tokens; no prompt: unrelated texts
RAGGED = [(11, 9, 4, 0), (5, 1, 1, 0), (7, 5, 8, 3), (0, 6, 7, 0)]
PLAIN = [(6, 4, 3, 0), (4, 2, 5, 0)]


def pairs(sizes: list[tuple[int, int, int, int]] = PLAIN, attack: str = "all", seed: int = 1) -> PairBatch:
    """Random pairs, right padded with random tokens, so that reading padding shows.

    Args:
        attack: "prompt" (its tokens; where there is none the first two), "all" (up to the end of the longer text), or
            "some" of all positions, some past the end.
    """
    draw = torch.Generator().manual_seed(seed)
    width = max(prompt + max(rejected, chosen) for prompt, rejected, chosen, _ in sizes) + 2
    ids = torch.randint(VOCAB, (2, len(sizes), width), generator=draw)
    labels = torch.zeros(2, len(sizes), width, dtype=torch.bool)
    attacked = torch.zeros(len(sizes), width, dtype=torch.bool)
    for i, (prompt, rejected, chosen, shared) in enumerate(sizes):
        ids[1, i, : prompt + shared] = ids[0, i, : prompt + shared]
        ids[1, i, prompt + shared] = (ids[0, i, prompt + shared] + 1) % VOCAB
        labels[0, i, prompt : prompt + rejected] = True
        labels[1, i, prompt : prompt + chosen] = True
        attacked[i, : prompt or 2] = True
        if attack == "all":
            attacked[i, : prompt + max(rejected, chosen)] = True
    if attack == "some":
        attacked = torch.rand(attacked.shape, generator=draw) < 0.6
    return PairBatch(ids[0], labels[0], ids[1], labels[1], attacked).to(DEVICE)


def late(batch: PairBatch) -> PairBatch:
    """The same batch with its completions alone attacked."""
    first = torch.where(batch.rejected_mask.any(1), batch.rejected_mask.long().argmax(1), 0)
    position = torch.arange(batch.attack_mask.shape[1], device=first.device)
    return replace(batch, attack_mask=batch.attack_mask & (position >= first[:, None]))


def with_lora(model: Any, seed: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model with LoRA of rank 4 on its linear layers, both factors random, in eval mode."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1} | options
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.1).to(parameter.device, dtype)
    return peft.eval()


def llama(lora: bool = False, **options: Any) -> Any:
    model = tiny("llama", **options)
    return with_lora(model) if lora else model


def attack_with(model: nn.Module, batch: PairBatch, sites: Any, engine: str, **options: Any) -> AttackResult:
    settings: dict[str, Any] = {"steps": 3, "step_size": 0.02, "epsilon": 0.1, "threshold": -8.0} | options
    return LatentPGD(model, sites, engine=engine, **settings).attack(batch)


def assert_same(got: AttackResult, want: AttackResult, losses: float = 2e-6, deltas: float = 1e-3) -> None:
    """Every logged number within `losses` (relative, from 1 on), every delta within `deltas` of the largest entry.

    On a GPU, whose products add up in an order that goes by their shape, within five times `losses`.
    """
    losses *= 5 if DEVICE == "cuda" else 1
    assert set(got.history) == set(want.history)
    for name, values in want.history.items():
        allowed = losses * values.abs().clamp(min=1)
        assert bool(((got.history[name] - values).abs() <= allowed).all()), (name, got.history[name], values)
    for name, delta in want.deltas.items():
        assert_close(got.deltas[name], delta, deltas)
    assert_close(got.row_norms, want.row_norms, deltas)
    assert got.boundary_fraction == want.boundary_fraction


def assert_close(got: Tensor, want: Tensor, share: float) -> None:
    """Within `share` of the largest entry, which is not 0.

    One entry in 500 may stray to 2% of it: where a gradient is nothing but rounding, Adam divides it by its own size.
    """
    assert got.shape == want.shape
    largest = float(want.detach().abs().max())
    assert largest > 0
    off = (got - want).detach().abs() / largest
    assert float(off.max()) <= max(share, 0.02)
    assert float((off > share).float().mean()) <= 0.002, float(off.max())


def ragged_batch() -> PairBatch:
    """Prompts of 13, 5 and 8 tokens; completions of 9 and 4, of one token each, of 5 and 8 that share their first 3."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, 3, 24), generator=draw)
    starts, ends = torch.tensor([13, 5, 8]), torch.tensor([[22, 6, 13], [17, 6, 16]])
    shared = torch.tensor([13, 5, 11])
    position = torch.arange(24)
    ids[1] = torch.where(position < shared[:, None], ids[0], ids[1])
    ids[1, torch.arange(3), shared] = (ids[0, torch.arange(3), shared] + 1) % VOCAB
    labels = (position >= starts[:, None]) & (position < ends[..., None])
    attack = torch.rand(3, 20, generator=draw) < 0.8
    return PairBatch(ids[0], labels[0], ids[1], labels[1], attack).to(DEVICE)
