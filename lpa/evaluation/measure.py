"""The before/after table: what a model says of held-out statements, clean and under attack, and perplexity."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa import assets
from lpa_kernels.attack import AttackResult, AttackSettings, LatentPGD, PairBatch, resolve_sites
from lpa_kernels.model import decoder_layers, frozen_eval, say_once

from ..config import LPAConfig, default_sites
from ..data import PairCollator, load_pairs, perplexity_text
from .directions import directions_of
from .stats import auroc, auroc_interval

if TYPE_CHECKING:
    from rich.table import Table

ROWS = {
    "disagree_undesirable": "disagrees with undesirable statements",
    "disagree_undesirable_attacked": "  under a latent attack",
    "disagree_undesirable_ipip": "  of the IPIP inventory",
    "agree_desirable": "agrees with desirable statements",
    "agree_desirable_attacked": "  under a latent attack",
    "agree_desirable_ipip": "  of the IPIP inventory",
    "auroc": "tells the two kinds apart (AUROC)",
    "auroc_attacked": "  under a latent attack",
    "auroc_ipip": "  of the IPIP inventory",
    "perplexity": "perplexity on plain text",
}
_KINDS = {"undesirable": "disagree_undesirable", "desirable": "agree_desirable"}
_IPIP_ASSET = "ipip-neo-120"


def attack_of(model: Any, config: LPAConfig, tokenizer: Any = None, **changes: Any) -> LatentPGD:
    """The attack that a config describes, on a model. `changes` are fields of `AttackSettings`, or `sites`.

    Args:
        tokenizer: needed where the adversary's direction lies between two sets of prompts.
    """
    sites = changes.pop("sites", None) or config.attack_sites
    if not sites:
        sites = default_sites(len(decoder_layers(model)))
        if config.attack_direction is not None:  # at the embedding all prompts end alike
            sites.remove("embedding")
    sites = [sites] if isinstance(sites, (str, int)) else sites
    found = resolve_sites(model, [int(site) if site.isdigit() else site for site in map(str, sites)])
    directions = directions_of(model, config, found, tokenizer)
    made = LatentPGD(model, found, config.attack_settings, directions=directions, **changes)
    said = made.settings.never_binds(model.get_input_embeddings().weight.shape[1])
    if said and made.settings.epsilon == AttackSettings.epsilon:  # the published radius, which is known not to bind
        say_once(model, said, logging.INFO)
    return made


@torch.no_grad()
def completion_log_probs(pgd: LatentPGD, batch: PairBatch, attack: AttackResult | None = None) -> Tensor:
    """[B, 2] float32: total log-probability of each pair's rejected and chosen completion, under an attack or not."""
    with frozen_eval(pgd.model):
        rows = pgd.rows(batch, attack)
    log_probs = rows.logits.float().log_softmax(-1).gather(1, rows.labels[:, None])[:, 0]
    totals = torch.zeros(2 * rows.size, device=log_probs.device)
    return totals.index_add_(0, 2 * rows.example + (~rows.rejected).long(), log_probs).view(rows.size, 2)


def pair_batches(pairs: Any, collator: Callable[..., Any], size: int) -> Iterator[PairBatch]:
    """The rows of a data set in batches of at most `size` pairs."""
    for start in range(0, len(pairs), size):
        yield PairBatch.from_dict(collator([pairs[i] for i in range(start, min(start + size, len(pairs)))]))


def margins(pgd: LatentPGD, pairs: Any, collator: PairCollator, *, attacked: bool, batch_size: int = 12) -> Tensor:
    """[pairs] float32: log-probability of the chosen completion minus that of the rejected one."""
    device = pgd.model.get_input_embeddings().weight.device  # type: ignore[operator]
    found = []
    for batch in (each.to(device) for each in pair_batches(pairs, collator, batch_size)):
        rejected, chosen = completion_log_probs(pgd, batch, pgd.attack(batch) if attacked else None).unbind(1)
        found.append((chosen - rejected).cpu())
    return torch.cat(found)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str | None = None, *, window: int = 256) -> float:
    """exp of the mean negative log-probability of a text's tokens, each with up to `window` tokens before it.

    The text is cut into windows that do not overlap; their first tokens are not scored.

    Args:
        text: by default the shipped one.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    ids: Tensor = tokenizer(perplexity_text() if text is None else text, return_tensors="pt")["input_ids"][0]
    device = model.get_input_embeddings().weight.device
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token{'s' * (len(ids) != 1)}; perplexity needs at least 2")
    total, count = 0.0, 0
    with frozen_eval(model):
        for part in ids.split(window):
            if len(part) < 2:
                continue
            logits = model(input_ids=part[None].to(device), use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), part[1:].to(device), reduction="sum"))
            count += len(part) - 1
    return math.exp(total / count) if total / count < 700 else math.inf  # exp(710) is no float64


def measure(
    model: Any,
    tokenizer: Any,
    config: LPAConfig | None = None,
    *,
    pgd: LatentPGD | None = None,
    attacked_rows: int | None = None,
    trained_on: Collection[str] = (),
) -> dict[str, float]:
    """The numbers of the table, on the shipped held-out statements and text; the model is unchanged.

    A statement is answered by the completion with the larger total log-probability, under the run's own system prompt.
    The attack is the run's own and pushes toward the wrong answer. The AUROC is that of the log-odds of agreeing,
    desirable statements against undesirable ones: leaning to one answer for all does not move it. Where the asset
    "ipip-neo-120" is in the cache, its 72 items of agreeableness, conscientiousness and neuroticism are measured too.

    Args:
        pgd: the attack; by default that of `config`.
        attacked_rows: how many statements of each kind are attacked (0 for none); by default all.
        trained_on: statements of the training; those among the measured ones are left out.

    Returns:
        by the names in `ROWS`: shares and AUROCs in [0, 1], and the perplexity. After a share's name, "_margin" is the
        mean log-odds of the right answer in nats; after an AUROC's name, "_low" and "_high" bound its 95% interval
        (`stats.auroc_interval`); "_n" is the number of statements.

    Raises:
        ValueError: attacked_rows is negative.
        FloatingPointError: the model's answers or its perplexity are not finite.
    """
    if attacked_rows is not None and attacked_rows < 0:
        raise ValueError(f"attacked_rows={attacked_rows} must be 0 (none) or more")
    config = config or LPAConfig()
    pgd = pgd or attack_of(model, config, tokenizer)
    collator = PairCollator(
        tokenizer, system_prompt=config.system_prompt or None, attack_on=config.attack_on, **config.chat_options
    )
    sources = {"": {kind: load_pairs(kind=kind, split="heldout") for kind in _KINDS}}
    if assets.is_cached(_IPIP_ASSET):
        sources["_ipip"] = {kind: load_pairs(kind=f"ipip-{kind}") for kind in _KINDS}
    found: dict[str, float] = {}
    for source, by_kind in sources.items():
        pairs = {kind: _unseen(rows, trained_on) for kind, rows in by_kind.items()}
        for attacked in (False, True):
            if attacked and (source or not config.attack_steps):
                continue
            suffix, odds = "_attacked" if attacked else source, {}
            for kind, name in _KINDS.items():
                count = attacked_rows if attacked and attacked_rows is not None else len(pairs[kind])
                if not len(chosen := spread(pairs[kind], count)):
                    continue
                # an attack needs the memory of a training batch, so its batches are no larger
                size = min(12, config.per_device_train_batch_size) if attacked else 12
                odds[kind] = margins(pgd, chosen, collator, attacked=attacked, batch_size=size)
                found |= _share(f"{name}{suffix}", odds[kind])
            if len(odds) == 2:
                found |= _area(f"auroc{suffix}", odds["desirable"], -odds["undesirable"])
    found["perplexity"] = perplexity(model, tokenizer)
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        raise FloatingPointError(
            f"{odd[0]} is {found[odd[0]]}: the model's logits are not finite; look for NaN in its weights, or load it "
            "in bfloat16 or float32 instead of float16"
        )
    return found


def spread(pairs: Any, count: int) -> Any:
    """At most `count` of the pairs, at even distances: shipped statements are sorted by their traits."""
    count = min(count, len(pairs))
    return pairs.select([i * len(pairs) // count for i in range(count)])


def _unseen(pairs: Any, trained_on: Collection[str]) -> Any:
    known = {" ".join(text.lower().split()) for text in trained_on}
    return pairs.select([i for i, text in enumerate(pairs["prompt"]) if " ".join(text.lower().split()) not in known])


def _share(name: str, values: Tensor) -> dict[str, float]:
    share, margin = float((values > 0).float().mean()), float(values.mean())
    return {name: share, f"{name}_margin": margin, f"{name}_n": len(values)}


def _area(name: str, desirable: Tensor, undesirable: Tensor) -> dict[str, float]:
    """The AUROC of log-odds of agreeing."""
    area = auroc(desirable.tolist(), undesirable.tolist())
    low, high = auroc_interval(area, len(desirable), len(undesirable))
    return {name: area, f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(desirable) + len(undesirable)}


def as_text(name: str, found: Mapping[str, float] | None) -> str:
    """A number of the table as people read it; "-" where it was not measured."""
    if not found or name not in found:
        return "-"
    if name == "perplexity":
        return f"{found[name]:.2f}"
    if f"{name}_low" in found:
        area, low, high = (100 * found[f"{name}{end}"] for end in ("", "_low", "_high"))
        return f"{area:.0f}% [{low:.0f}, {high:.0f}]"
    return f"{100 * found[name]:.0f}% ({found[f'{name}_margin']:+.2f})"


def labels(before: Mapping[str, float]) -> dict[str, str]:
    """Name -> label of the rows that were measured, with n, the number of statements."""
    counts = {name: f" (n={before[f'{name}_n']:.0f})" if f"{name}_n" in before else "" for name in ROWS}
    return {name: f"{label}{counts[name]}" for name, label in ROWS.items() if name in before}


def table(before: Mapping[str, float], after: Mapping[str, float] | None) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    grid = Table("held out: share (mean log-odds)")
    for column in ("before", "after"):
        grid.add_column(column, justify="right")
    for name, label in labels(before).items():
        grid.add_row(label, as_text(name, before), as_text(name, after))
    return grid
