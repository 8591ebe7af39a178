"""The directions of adversaries that need them: from a file, or between two sets of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lpa_kernels.attack import Site, adapters_off, mean_difference, read_directions
from lpa_kernels.model import remembered

from ..config import LPAConfig
from ..data import ChatEncoder
from ..models import context_length
from .sets import Prompt, load_set

PROMPTS = 64  # of each set


def directions_of(model: Any, config: LPAConfig, sites: Sequence[Site], tokenizer: Any) -> dict[str, Tensor] | None:
    """One direction [H] a site, as `attack_direction` says; None for an adversary that needs none.

    Of two sets of prompts: the mean hidden state at the last prompt token in the first, less that in the second, under
    the run's system prompt, without the model's adapters. Found once a model.

    Raises:
        ValueError: no such file, a set that is unavailable, or no tokenizer to encode prompts with.
    """
    given = config.attack_direction
    if given is None:
        return None
    if len(given) == 1:
        return read_directions(given[0])
    if tokenizer is None:
        raise ValueError(f"attack_direction={given} needs processing_class, a tokenizer to encode these prompts with")
    key = tuple(given), tuple(site.name for site in sites), config.system_prompt

    def find() -> dict[str, Tensor]:
        encoder = ChatEncoder(
            tokenizer, config.system_prompt or None, context_length(model) or 2**31, **config.chat_options
        )
        sets = [
            [torch.tensor(encoder.row(prompt.text, [], "the prompt")[0][0]) for prompt in _prompts(name)]
            for name in given
        ]
        if not hasattr(model, "disable_adapter"):
            return mean_difference(model, sites, *sets)
        with adapters_off(model):
            return mean_difference(model, sites, *sets)

    return remembered(model, "directions between prompts", key, find)


def check_direction(config: LPAConfig) -> None:
    """Read what `attack_direction` names, before a model is loaded.

    Raises:
        ValueError: no such file, or a set that is unavailable.
    """
    given = config.attack_direction or []
    if len(given) == 1:
        read_directions(given[0])
    else:
        for name in given:
            _prompts(name)


def _prompts(name: str) -> Sequence[Prompt]:
    """The prompts of a set.

    Raises:
        ValueError: the set is unavailable, and why.
    """
    found = load_set(name, PROMPTS)
    if found.reason:  # a direction may lead to benign prompts
        benign = load_set(name, PROMPTS, harmful=False)
        found = found if benign.reason else benign
    if found.reason:
        raise ValueError(f"attack_direction: the set {name!r} is unavailable: {found.reason}")
    return found.prompts
