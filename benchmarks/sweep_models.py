"""Exact or refused: every causal-LM type, wrapper, tuner and quantised base against an oracle of one text a pass.

    python -m benchmarks.sweep_models                    # all of it, into benchmarks/results/sweep-models.json
    python -m benchmarks.sweep_models types:llama tuners # some cases by their names' beginnings, in their places there
    python -m benchmarks.sweep_models --resume           # the cases that are not there

Every case runs in a process of its own with a time limit: a tiny random float32 model, its windows and chunks of 24
tokens, attacked on a ragged batch of short rows and then, by the same object, on rows longer than the window.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks import measure
from benchmarks.adapted_models import QUANTISED, TRIGGER, TUNERS, quantised, tuned, with_lora
from benchmarks.oracle import CUT_OFF, plain_attack
from benchmarks.tiny_models import VOCAB, build
from lpa.files import write_json, write_text
from lpa_kernels.attack import LatentPGD, PairBatch

STEPS, STEP_SIZE, EPSILON = 3, 0.02, 0.15
# (prompt, rejected, chosen, first tokens that the completions share): rows below the window, and above it
SHORT = [(9, 5, 3, 0), (5, 3, 4, 1)]
LONG = [(37, 9, 4, 0), (28, 4, 8, 1), (6, 3, 5, 0)]
LOSSES, DELTAS, STRAY = 2e-6, 1e-3, 5e-3  # what is exact: relative losses, deltas, the share that may be further off
SECONDS = 240


@dataclass(frozen=True)
class Result:
    """One case: how it ran, how far from the oracle, and what that means.

    Attributes:
        engine: "stack", "packed", "unshared", "alone", or "" where it was refused or failed.
        losses, deltas, stray: see `Off`; None in the record where they are not finite.
        floor: the losses' difference that roundings of the weights make.
        verdict: "packed-exact" (or "unshared-", "alone-"), "refused", "silently wrong", "unclear message", "not built".
    """

    case: str
    verdict: str
    engine: str = ""
    losses: float | None = 0.0
    deltas: float | None = 0.0
    stray: float | None = 0.0
    floor: float | None = 0.0
    reason: str = ""


def pairs(sizes: list[tuple[int, int, int, int]], trigger: int | None = None, seed: int = 1) -> PairBatch:
    """Random ragged pairs; both completions of a pair share their first tokens, and whole texts are attacked.

    Args:
        trigger: a token to put into every prompt and into every rejected completion.
    """
    draw = torch.Generator().manual_seed(seed)
    width = max(prompt + max(rejected, chosen) for prompt, rejected, chosen, _ in sizes)
    ids = torch.randint(5, VOCAB, (2, len(sizes), width), generator=draw)
    labels = torch.zeros(2, len(sizes), width, dtype=torch.bool)
    attacked = torch.zeros(len(sizes), width, dtype=torch.bool)
    for i, (prompt, rejected, chosen, shared) in enumerate(sizes):
        ids[1, i, : prompt + shared] = ids[0, i, : prompt + shared]
        ids[1, i, prompt + shared] = 5 + (ids[0, i, prompt + shared] - 4) % (VOCAB - 5)
        if trigger is not None:
            ids[:, i, 2] = ids[0, i, prompt + 1] = trigger
        for text, completion in enumerate((rejected, chosen)):
            labels[text, i, prompt : prompt + completion] = True
        attacked[i, : prompt + max(rejected, chosen)] = True
    return PairBatch(ids[0], labels[0], ids[1], labels[1], attacked)


def attacker(model: nn.Module, merge: bool = False) -> LatentPGD:
    """An attack on the embedding and on the second block's feed-forward, or its output where it has none."""
    common: dict[str, Any] = {"steps": STEPS, "step_size": STEP_SIZE, "epsilon": EPSILON, "threshold": CUT_OFF}
    common["merge_adapters"] = merge
    for second in ("mlp:1", "block:1"):
        try:
            found = LatentPGD(model, ["embedding", second], **common)
        except ValueError:
            continue
        runs: list[Any] = []
        handle = found.sites[1].module.register_forward_hook(lambda *call, runs=runs: runs.append(call))
        _some_logits(model)
        handle.remove()
        if len(runs) == 1:
            return found
    return LatentPGD(model, ["embedding"], **common)


@dataclass(frozen=True)
class Off:
    """How far an attack is from the oracle's.

    Attributes:
        losses: the largest relative difference of a step's total. deltas: of deltas, as a share of the largest entry.
        stray: the share of a site's entries that are further off than `DELTAS`.
    """

    losses: float = 0.0
    deltas: float = 0.0
    stray: float = 0.0

    @property
    def exact(self) -> bool:
        return self.losses <= LOSSES and self.stray <= STRAY

    def within(self, floor: Off) -> bool:
        """Whether it is exact, or no further off than a few roundings go."""
        return self.losses <= max(LOSSES, 10 * floor.losses) and self.stray <= max(STRAY, 10 * floor.stray)

    def worst(self, other: Off) -> Off:
        return Off(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))


def off_by(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> Off:
    """The difference of two attacks, each of totals [steps] and deltas, one [R, H] a site."""
    losses = float(((found[0] - wanted[0]).abs() / wanted[0].abs().clamp(min=1)).max())
    far = [
        (own - want).abs() / want.abs().max().clamp(min=1e-30) for own, want in zip(found[1], wanted[1], strict=True)
    ]
    return Off(losses, max(float(f.max()) for f in far), max(float((f > DELTAS).float().mean()) for f in far))


def compared(model: Any, other: Any, merge: bool) -> tuple[str, Off, Off, str]:
    """(engine, how far off, how far a few roundings go, reason), the worst of both batches.

    Args:
        other: a second model of the same weights, for the oracle: what an attack does to a model must not reach it.
        merge: the attack merges adapters, the oracle does not.

    Raises:
        AssertionError: the attack left other logits than it found.
    """
    pgd = attacker(model, merge)
    modules = [site.module for site in attacker(other).sites]
    engines, reasons, off, floor = [], [], Off(), Off()
    for batch in (pairs(SHORT), pairs(LONG, TRIGGER)):
        before = _some_logits(model)
        found = pgd.attack(batch)
        assert torch.equal(before, _some_logits(model)), "the attack left the model changed"
        wanted = plain_attack(other, modules, batch, STEPS, STEP_SIZE, EPSILON)
        rows = [
            torch.cat([delta[i][batch.attack_mask[i]] for i in range(len(batch))]) for delta in found.deltas.values()
        ]
        now = off_by((found.history["total"].double().cpu(), rows), wanted)
        off = off.worst(now)
        if not now.exact:
            for seed in range(8):  # a router near a tie turns in some of them
                if off.within(floor):
                    break
                with rounded_a_little(other, seed):
                    moved = plain_attack(other, modules, batch, STEPS, STEP_SIZE, EPSILON)
                floor = floor.worst(off_by(moved, wanted))
        engines.append(found.engine)
        reasons.append(found.reason)
    slowest = min(engines, key=("alone", "reference", "unshared", "packed", "stack").index)
    return slowest, off, floor, next((reason for reason in reasons if reason), "")


@contextmanager
def rounded_a_little(model: Any, seed: int) -> Iterator[None]:
    """Every plain weight some roundings away, more with `seed`: no order of operations promises less."""
    draw = torch.Generator().manual_seed(seed)
    held = [(p, p.data.clone()) for p in model.parameters() if type(p.data) is Tensor and p.dtype == torch.float32]
    try:
        for parameter, own in held:
            sign = torch.randint(0, 2, own.shape, generator=draw) * 2 - 1
            parameter.data.mul_(1 + sign * (1 + seed) * torch.finfo(torch.float32).eps)
        yield
    finally:
        for parameter, own in held:
            parameter.data.copy_(own)


def _some_logits(model: Any) -> Tensor:
    """[1, 10, V], from hidden states that want a gradient: some quantised layers repack their weights for others."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.detach().requires_grad_() * 1)
    try:
        logits: Tensor = model(input_ids=torch.arange(5, 15)[None], use_cache=False).logits
    finally:
        handle.remove()
    return logits.detach()


def _merged_alike(model: Any) -> bool:
    """Merge the adapters for good; whether that leaves the logits as they are."""
    before = _some_logits(model)
    model.merge_adapter()
    return float((_some_logits(model) - before).abs().max()) <= 1e-4 * float(before.abs().max())


def judged(case: str, make: Callable[[], Any]) -> Result:
    """The case's result, in this process."""
    try:
        torch.manual_seed(0)
        model = make().eval()
        if _some_logits(model).dim() != 3:
            raise ValueError("its logits are not [batch, length, vocabulary]")
    except Exception as error:
        return Result(case, "not built", reason=_said(error))
    try:
        torch.manual_seed(0)
        merge, other = case.startswith("merged:"), make().eval()
        engine, off, floor, reason = compared(model, other, merge)
        if merge and not off.within(floor) and _merged_alike(other):
            engine, off, floor, _ = compared(model, other, merge)
            reason = "as the model merged by peft; unmerged it has the same logits and other gradients"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = "lpa_kernels" in frames[-1].filename and isinstance(error, (RuntimeError, ValueError, TypeError))
        return Result(case, "refused" if ours else "unclear message", reason=_said(error))
    shared = "packed" if engine == "stack" else engine  # a stack's rows are packed too
    exact = f"{shared}-exact" if off.within(floor) else "silently wrong"
    return Result(case, exact, engine, off.losses, off.deltas, off.stray, floor.losses, reason)


def _said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(where.filename).name}:{where.lineno})"


def _with_lora(make: Callable[[str], Any], name: str) -> Any:
    return with_lora(make(name))


def cases() -> dict[str, Callable[[], Any]]:
    """By name, what makes each case's model."""
    found: dict[str, Callable[[], Any]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[f"types:{kind}"] = partial(build, kind)
        found[f"types:{kind}+lora"] = partial(_with_lora, build, kind)
    for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:  # used for text
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            found[f"wrappers:{kind}"] = partial(build, kind)
    for name in TUNERS:
        found[f"tuners:{name}"] = found[f"merged:{name}"] = partial(tuned, name)
    for name in QUANTISED:
        found[f"quantised:{name}"] = partial(quantised, name)
        found[f"quantised:{name}+lora"] = partial(_with_lora, quantised, name)
    return found


def _report(case: str, make: Callable[[], Any], answer: Any) -> None:
    torch.set_num_threads(1)
    answer.put(judged(case, make))


def run(case: str, make: Callable[[], Any]) -> Result:
    """The case's result, from a process of its own that has imported the libraries already."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_report, args=(case, make, answer))
    process.start()
    try:
        result: Result = answer.get(timeout=SECONDS)
    except Exception:
        result = Result(case, "unclear message", reason=f"no answer in {SECONDS} s, exit code {process.exitcode}")
    process.kill()
    process.join()
    return result


def table(results: list[Result]) -> str:
    """The results as a page, the verdicts' counts first."""
    lines = ["# Exact or refused: the sweep of models", "", f"transformers {transformers.__version__}, peft "
             f"{peft.__version__}, torch {torch.__version__}, CPU, float32.", ""]  # fmt: skip
    for group in ("types", "wrappers", "tuners", "merged", "quantised"):
        some = [result for result in results if result.case.startswith(group)]
        count = Counter((result.verdict, "+lora" in result.case) for result in some)
        lines += [f"- {group}: " + ", ".join(f"{n} {v}{' with LoRA' * lora}" for (v, lora), n in sorted(count.items()))]
    rows = [[f"{cell:.1e}" if isinstance(cell, float) else cell for cell in astuple(result)] for result in results]
    return "\n".join([*lines, "", measure.table((field.name for field in fields(Result)), rows)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of cases' names; all of them by default")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "sweep-models.json")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there, run the rest")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for module in ("bitsandbytes", "peft", "torch._dynamo"):  # once, before the processes part
        try:
            importlib.import_module(module)
        except ImportError:
            continue
    everything, kept = cases(), {}
    if (args.resume or args.cases) and args.out.exists():
        kept = {result["case"]: Result(**result) for result in json.loads(args.out.read_text())}
    for case, make in everything.items():
        if (args.resume and case in kept) or (args.cases and not case.startswith(tuple(args.cases))):
            continue
        kept[case] = run(case, make)
        print(*asdict(kept[case]).values(), flush=True)
        results = [kept[case] for case in everything if case in kept]
        write_json(args.out, [asdict(result) for result in results], nulls=True)
        write_text(args.out.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
