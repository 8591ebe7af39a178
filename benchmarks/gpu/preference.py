"""A DPO step's policy pass by each library: plain passes, ours, TRL as it is and patched, flash-pref, Unsloth."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import measures
from benchmarks.gpu.measures import Found, Skip, synchronized
from benchmarks.loop_cases import LORA, Shape, base_model, batch_of, forget_model, model_of
from benchmarks.measure import Run, device
from lpa_kernels import PairBatch, patch_trl, shared_prefix

BETA = 0.1
Logps = Callable[[Any, PairBatch], Tensor]


def texts(batch: PairBatch) -> Tensor:
    """[2B, L] int64: the rejected texts, then the chosen ones."""
    return torch.cat([batch.rejected_ids, batch.chosen_ids])


def plain_logps(model: Any, batch: PairBatch) -> Tensor:
    """[2B, L - 1] log-probabilities, 0 off the completions, from one pass over both texts of each pair."""
    ids, mask = texts(batch), torch.cat([batch.rejected_mask, batch.chosen_mask])[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][mask]
    own = -F.cross_entropy(logits.float(), ids[:, 1:][mask], reduction="none")
    return own.new_zeros(mask.shape).masked_scatter(mask, own)


def by_logps(logps: Logps, around: Callable[[Any, PairBatch], AbstractContextManager[Any]] | None = None) -> Any:
    """A step of DPO's loss, without the reference's constants. around: a context for both passes, backward too."""

    def make(model: Any, batch: PairBatch) -> Run:
        def run() -> None:
            with nullcontext() if around is None else around(model, batch):
                rejected, chosen = logps(model, batch).sum(1).chunk(2)
                F.softplus(-BETA * (chosen - rejected)).mean().backward()
            model.zero_grad()

        return run

    return make


def flash_pref(model: Any, batch: PairBatch) -> AbstractContextManager[Any]:
    """flash-pref's context, on its flash attention."""
    from flash_pref import shared_prefix as context

    model.set_attn_implementation("flash_attention_2")
    ids = texts(batch)
    return context(model, input_ids=ids, attention_mask=torch.ones_like(ids), interleaved=True)


def by_trl(patched: bool) -> Any:
    """A step of TRL's DPOTrainer, as it is or patched, with the reference's log-probabilities given."""

    def make(model: Any, batch: PairBatch) -> Run:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        from tests.support.tiny import tiny_tokenizer

        data = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
        with tempfile.TemporaryDirectory() as folder, patch_trl() if patched else nullcontext():
            args = DPOConfig(
                folder, report_to="none", use_cpu=device() == "cpu", bf16=False, beta=BETA, max_length=None
            )
            trainer = DPOTrainer(model, None, args, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.precompute_ref_logps = True
        mask = torch.cat([batch.chosen_mask, batch.rejected_mask])
        inputs = {"input_ids": torch.cat([batch.chosen_ids, batch.rejected_ids]), "completion_mask": mask.long(),
                  "attention_mask": torch.ones_like(mask, dtype=torch.long)}  # fmt: skip
        given = torch.full((len(batch),), -200.0, device=mask.device)
        inputs |= {f"ref_{name}_logps": given for name in ("chosen", "rejected")}
        trainer.model.train()

        def run() -> None:
            trainer.compute_loss(trainer.model, inputs).backward()
            trainer.model.zero_grad()

        return run

    return make


WAYS: dict[str, tuple[Any, tuple[str, ...]]] = {  # what makes a step, and the packages that it needs
    "two texts a pass": (by_logps(plain_logps), ()),
    "shared_prefix": (by_logps(shared_prefix), ()),
    "TRL": (by_trl(False), ("trl",)),
    "TRL, patched": (by_trl(True), ("trl",)),
    "flash-pref": (by_logps(plain_logps, flash_pref), ("flash_pref", "flash_attn")),
    "Unsloth": (None, ("unsloth",)),
}


def step(own: Shape, way: str, rounds: int) -> Found:
    """Milliseconds and peak memory of a step; activations are checkpointed, as in flash-pref's own figures.

    Raises:
        Skip: a package is not installed.
    """
    make, needed = WAYS[way]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise Skip(f"{' and '.join(missing)}: not installed")
    if make is None:
        return in_a_process(own, rounds)
    try:
        model = model_of(own)
        model.gradient_checkpointing_enable()  # a long prompt needs it
        model.enable_input_require_grads()
        model.train()
        return timed(make(model, batch_of(own)), rounds)
    finally:
        forget_model()  # the next way gets a model as it was


def timed(run: Run, rounds: int) -> Found:
    """The median of the rounds, and the peak since before the first."""
    measures.fresh()
    run()
    taken = [-synchronized() + (run(), synchronized())[1] for _ in range(rounds)]
    return {"ms": sorted(taken)[len(taken) // 2] * 1e3} | measures.peaks()


def in_a_process(own: Shape, rounds: int) -> Found:
    """`unsloth_step` in a process of its own: Unsloth changes what is imported after it.

    Raises:
        RuntimeError: it failed.
    """
    given = asdict(own) | {"dtype": str(own.dtype).removeprefix("torch.")}
    done = measures.process([sys.executable, "-m", "benchmarks.gpu.preference", json.dumps(given), str(rounds)], 400)
    if done.returncode:
        raise RuntimeError(done.stdout[-800:])
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def unsloth_step(own: Shape, rounds: int) -> Found:
    """The plain step on Unsloth's model of the shape: its kernels, its checkpointing.

    It shares prompts in GRPO alone, and its releases want a TRL older than the one that `patch_trl` knows, so that its
    DPO trainer cannot stand beside TRL's here.
    """
    from unsloth import FastLanguageModel

    from tests.support.tiny import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        base_model(own).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        longest = own.prompt + max(own.rejected, own.chosen)
        model, _ = FastLanguageModel.from_pretrained(
            folder, dtype=own.dtype, load_in_4bit=False, max_seq_length=longest
        )
    model = FastLanguageModel.get_peft_model(model, **LORA, use_gradient_checkpointing="unsloth")
    return timed(by_logps(plain_logps)(model, batch_of(own)), rounds)


if __name__ == "__main__":
    import unsloth  # noqa: F401  # before all that it changes

    words = json.loads(sys.argv[1])
    shape = Shape(**words | {"dtype": getattr(torch, words["dtype"]), "sites": ()})
    print(json.dumps(unsloth_step(shape, int(sys.argv[2]))))
