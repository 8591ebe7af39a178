"""Merge an adapter into its base model and save a plain model folder, checked to answer as the adapter does."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import PLAIN_PROMPT
from ..models import load
from ..quantization import is_quantized
from .bench import Bench, quiet_generation
from .sets import benign_prompts
from .subjects import Subjects, named_adapters

CHECK_PROMPTS, CHECK_TOKENS = 4, 24
# largest mean KL(adapter || merged) of the next token, in nats: rounding of the weights' dtype, and no more
ALLOWED_KL = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class ExportError(RuntimeError):
    """The model cannot be exported; the message says why."""


@dataclass(frozen=True)
class Check:
    """How the folder, loaded again, answers beside the adapter: prompts, equal greedy answers, mean KL in nats."""

    prompts: int
    equal: int
    kl: float


def export_merged(model: Any, tokenizer: Any, adapter: str | Path, output: str | Path) -> Check:
    """Merge and save. The folder appears only when its check has passed.

    Args:
        model: the base model; the adapter is merged into it, so that it is the merged model afterwards.

    Raises:
        ExportError: the output folder is there already and not empty, the model is quantised, or the saved model does
            not answer as the adapter does.
        lpa.evaluation.EvaluationError: the adapter does not fit the model.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there already and not empty; give another output folder")
    if is_quantized(model):
        raise ExportError("the base model is quantised; load it in float32 or bfloat16 to merge an adapter into it")
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    name, path = next(iter(named_adapters([adapter]).items()))
    subjects = Subjects(model, {name: path}, base=False)
    with subjects.using(name) as adapted:
        wanted = _behaviour(adapted, tokenizer)
    merged = subjects.model.merge_and_unload(safe_merge=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again, own_tokenizer = load(folder, dtype=dtype)
        check = _compare(wanted, _behaviour(again.to(device), own_tokenizer))
        allowed = ALLOWED_KL.get(dtype, ALLOWED_KL[torch.bfloat16])
        if not check.kl <= allowed:
            raise ExportError(
                f"the merged model does not answer as the adapter does: mean KL {check.kl:.3g} nats a token where "
                f"{allowed:g} is allowed for {dtype}, {check.equal} of {check.prompts} greedy answers equal; "
                "merge in float32 (--dtype float32)"
            )
        folder.chmod(0o755)
        if target.exists():
            target.rmdir()
        folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return check


def _behaviour(model: Any, tokenizer: Any) -> tuple[list[str], list[torch.Tensor]]:
    """Greedy answers to a few benign prompts, and the log-probabilities of every next token along the prompts."""
    bench = Bench(model, tokenizer, system_prompt=PLAIN_PROMPT, max_new_tokens=CHECK_TOKENS, batch_size=CHECK_PROMPTS)
    prompts = [bench.prompt_tokens(prompt.text) for prompt in benign_prompts()[:CHECK_PROMPTS]]
    with quiet_generation():
        return bench.answers(prompts), [
            rows.cpu() for rows in bench.log_probs(prompts, [range(len(p)) for p in prompts])
        ]


def _compare(wanted: tuple[list[str], list[torch.Tensor]], found: tuple[list[str], list[torch.Tensor]]) -> Check:
    equal = sum(a == b for a, b in zip(wanted[0], found[0], strict=True))
    rows = zip(wanted[1], found[1], strict=True)
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in rows]).mean()
    return Check(len(wanted[0]), equal, float(kl))
