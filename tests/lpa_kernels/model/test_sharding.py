"""Attacks on a model whose weights two ranks share (FSDP2): each rank's own, on its own batch, as on a whole model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa_kernels.attack import LatentPGD, graphs, loop
from lpa_kernels.model.sharding import is_sharded
from tests.support import ranks

from ...support.batches import PLAIN, RAGGED, assert_close, assert_same, attack_with, llama, pairs

BOTH = ["embedding", "mlp:1"]
# sites, engine, options; the ranks' batches differ in pairs and lengths
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "packed": (BOTH, "packed", {}),
    "frozen blocks": ("mlp:1", "packed", {}),
    "merged": (BOTH, "packed", {"merge_adapters": True}),
    "two passes": (BOTH, "reference", {"relative": True}),
    "a rank's examples stop at once": (BOTH, "packed", {"stop_below": 4.7}),
    "preference": (BOTH, "packed", {"coefs": {"dpo": 1.0}}),
    "all logits at once": (BOTH, "packed", {}),
    "checkpointed": (BOTH, "packed", {}),
}


def shared_by_ranks(model: Any) -> Any:
    """A copy of an adapted Llama, sharded as accelerate does it."""
    from torch.distributed.fsdp import fully_shard

    shared = copy.deepcopy(model)
    base = shared.get_base_model()
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base.model.embed_tokens)
    fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False)
    fully_shard(shared)
    return shared


def attack_both() -> None:
    """Attack and defend the whole and the shared model alike; run on two ranks."""
    import torch.distributed as dist

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lpa_kernels").addHandler(handler)
    dist.init_process_group("gloo")
    model = llama(lora=True)
    shared = shared_by_ranks(model)
    assert (is_sharded(model), is_sharded(shared)) == (False, True)
    batch = pairs(RAGGED if dist.get_rank() else PLAIN, seed=dist.get_rank())
    flags = [p.requires_grad for p in model.parameters()]
    for name, (sites, engine, options) in CASES.items():
        if name == "checkpointed":
            for each in (model, shared):
                each.get_base_model().gradient_checkpointing_enable()
                each.enable_input_require_grads()
        chunks, loop.CHUNK_FROM = loop.CHUNK_FROM, 1 if name == "all logits at once" else loop.CHUNK_FROM
        before = [p.full_tensor() for p in shared.parameters()]
        want, got = (attack_with(each, batch, sites, engine, **options) for each in (model, shared))
        loop.CHUNK_FROM = chunks
        assert_same(got, want)
        # the shards are as they were, bit for bit, and are the parameters that the optimiser knows
        assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, shared.parameters(), strict=True)), name
        assert [p.requires_grad for p in shared.parameters()] == flags, name
        assert all(p.grad is None for p in shared.parameters()), name
        grads = []
        for each, attack in ((model, want), (shared, got)):
            rows = LatentPGD(each, sites, engine=engine, **options).rows(batch, attack)
            torch.nn.functional.cross_entropy(rows.logits, rows.labels).backward()
            grads.append([p.grad for p in each.parameters() if p.requires_grad])
            each.zero_grad(set_to_none=True)
        for one, mean in zip(*grads, strict=True):
            dist.all_reduce(one)
            assert_close(mean.full_tensor(), one / 2, 1e-4)
    with pytest.raises(RuntimeError, match='capture_graph="on", but'):
        attack_with(shared, batch, BOTH, "packed", capture_graph=True)
    assert [text.partition("over ranks: ")[2][:13] for text in told if "sharded" in text] == ["the head make"]
    told.clear()
    graphs.RECORDERS["cpu"] = graphs.cuda_graph  # this device has graphs, and half of the weights' precision
    half = llama(lora=True, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    shared = shared_by_ranks(half)
    for _ in range(2):
        got = attack_with(shared, batch, BOTH, "packed")
    assert got.captured.startswith("its weights are sharded")
    assert [text.partition("over ranks: ")[2] for text in told if "sharded" in text] == [
        "adapters stay float32 in the inner loop, without copies in torch.bfloat16",
        "inner steps are not captured in CUDA graphs",
    ]
    dist.barrier()


@pytest.mark.ranks
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_shared_weights_are_attacked_as_whole_ones(tmp_path: Path) -> None:
    ranks.run(attack_both, folder=tmp_path, world=2)
