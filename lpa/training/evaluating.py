"""What `LPATrainer.evaluate` measures of pairs: the defence's losses, and which completion is likelier."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lpa_kernels.attack import Objective
from lpa_kernels.model import frozen_eval

from ..data import SHIPPED, DataError, load_pairs
from ..data.loading import PAIR_COLUMNS
from ..evaluation.measure import completion_log_probs, pair_batches
from .losses import pair_terms
from .prepare import pairs_as_tokens

logger = logging.getLogger(__name__)

EvalSet = tuple[Any, Callable[..., Any]]  # rows of tokens, and what makes a batch of them


def eval_sets(
    given: Any, model: Any, tokenizer: Any, config: Any, collator: Callable[..., Any] | None
) -> dict[str, EvalSet]:
    """The sets of an evaluation by name, "" for a single one.

    Args:
        given: pairs, a mapping of names to pairs, or None for the shipped held-out statements of both kinds. The name
            of shipped statements ("both", ...) means the held-out ones too, and a mapping of columns one set of pairs.
        collator: of the training pairs, where it is not LPA's own.
    """
    if isinstance(given, Mapping):
        one = set(given) >= set(PAIR_COLUMNS) or (collator is None and _is_columns(given))
        if not one:
            return {str(name): eval_sets(part, model, tokenizer, config, collator)[""] for name, part in given.items()}
    if given is None or (isinstance(given, str) and given in SHIPPED and not Path(given).exists()):
        given, collator = _held_out(given or "both"), None
    rows, made, _ = pairs_as_tokens(given, model, tokenizer, config, collator)
    return {"": (rows, made)}


def _is_columns(given: Mapping[str, Any]) -> bool:
    """Whether a mapping holds columns of cells, and not sets of rows."""
    lists = [values for values in given.values() if hasattr(values, "__len__") and not isinstance(values, (str, bytes))]
    if len(lists) < len(given) or any(isinstance(v, Mapping) or hasattr(v, "iterrows") for v in lists):
        return False
    return all(len(values) and not isinstance(next(iter(values)), Mapping) for values in lists)


def _held_out(arm: str) -> Any:
    """The held-out statements of a shipped arm, else, with a warning, those that it trains on."""
    try:
        return load_pairs(arm, split="heldout")
    except DataError as error:
        logger.warning("%s: they are evaluated, and a run that trains on them has seen them", error)
        return load_pairs(arm)


def evaluate_sets(trainer: Any, sets: Mapping[str, EvalSet], prefix: str) -> dict[str, float]:
    """The numbers of `evaluate_pairs` for each set, and "runtime" in seconds, as PREFIX_SET_NUMBER (a single set has no
    name). The time is left out of the LPA step's.
    """
    metrics: dict[str, float] = {}
    for name, (rows, collator) in sets.items():
        begin = time.perf_counter()
        found = evaluate_pairs(trainer, rows, collator) | {"runtime": time.perf_counter() - begin}
        trainer.leave_out(found["runtime"])
        metrics |= {f"{prefix}_{name}_{key}" if name else f"{prefix}_{key}": value for key, value in found.items()}
    return metrics


def evaluate_pairs(trainer: Any, rows: Any, collator: Callable[..., Any]) -> dict[str, float]:
    """The numbers of one set at the model's present weights; model and random state are left as they were.

    Every rank runs all of it, as the ranks may hold the model together.

    Returns:
        "loss": what the defence minimises of pairs, under the run's attack, and its terms by name; "preferred": the
        share of pairs whose chosen completion is likelier than the rejected one; "margin": their mean log-odds in nats;
        both with "_attacked" under the attack.
    """
    args, pgd, device = trainer.args, trainer.pgd, trainer.args.device
    objective = trainer.objective or Objective({"toward": 0.5, "away": 0.5})
    batches = list(pair_batches(rows, collator, args.per_device_eval_batch_size))
    counts = (float(sum(b.counts[0] for b in batches)), float(sum(b.counts[1] for b in batches)))
    sums: dict[str, float] = {}
    margins: dict[str, list[torch.Tensor]] = {}
    for number, batch in enumerate(each.to(device) for each in batches):
        draws = torch.Generator().manual_seed(args.seed + number)
        attack = pgd.attack(batch, generator=draws) if args.attack_steps else None
        share = len(batch) / len(rows) if objective.preference else 1.0
        with torch.no_grad(), frozen_eval(trainer.model):
            total, terms = pair_terms(pgd, batch, attack, objective, counts, trainer.reference(batch, objective))
        for name, value in {"loss": total, **terms}.items():
            sums[name] = sums.get(name, 0.0) + float(value) * share
        for key, used in (("", None), *((("_attacked", attack),) if attack is not None else ())):
            rejected, chosen = completion_log_probs(pgd, batch, used).unbind(1)
            margins.setdefault(key, []).append((chosen - rejected).cpu())
    for key, found in margins.items():
        values = torch.cat(found)
        sums |= {f"preferred{key}": float((values > 0).float().mean()), f"margin{key}": float(values.mean())}
    return sums
