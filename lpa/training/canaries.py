"""What is asked of a model while it is trained: trait statements both ways, benign requests, plain text.

No evaluation uses these statements, requests and text, so that a step chosen by them is not chosen by its own test.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lpa_kernels.model import eval_mode

from ..data import AGREE, DISAGREE, PLAIN_PROMPT, DataError, PairCollator, canary_text, load_pairs
from ..evaluation import refusal
from ..evaluation.bench import Bench, Tokens, batches, quiet_generation
from ..evaluation.measure import margins, perplexity
from ..evaluation.sets import Prompt, benign_prompts, digest, load_set
from ..evaluation.suites.collapse import judge_collapse

if TYPE_CHECKING:
    from lpa_kernels.attack import LatentPGD

    from ..config import LPAConfig

FILE = "benign_canary.jsonl"
_BATCH = 8
_COMPLETION_WORDS = 3  # a shorter completion ("No") is also the beginning of many an honest answer


def watched(config: LPAConfig) -> tuple[Sequence[Prompt], dict[str, Any]]:
    """(the harmful requests that are watched, what describes them), both empty without a canary_set.

    Raises:
        ValueError: canary_set is unavailable.
    """
    if config.canary_set is None:
        return (), {}
    found = load_set(config.canary_set)
    if found.reason:
        raise ValueError(f"canary_set={config.canary_set!r} is unavailable: {found.reason}")
    # lpa evaluate takes the prompts with the least hashes, so these have the greatest
    last = sorted(found.prompts, key=lambda prompt: prompt.sha256)[-config.canary_prompts :]
    return last, found.described() | {"used": len(last)}


class Canaries:
    """The prompts, and how they are asked: always in the same batches and greedily, so that nothing is drawn at random.

    Args:
        completions: the trained ones; an answer that begins with one counts as not done.

    Raises:
        ValueError: canary_set is unavailable, or no prompt fits into the context.
    """

    def __init__(self, tokenizer: Any, config: LPAConfig, completions: Sequence[str] = ()) -> None:
        self.tokenizer, self.config = tokenizer, config
        longer = {text for text in completions if len(text.split()) >= _COMPLETION_WORDS}
        self.completions = sorted({AGREE, DISAGREE, *longer})
        self.pairs = {kind: load_pairs(kind=kind, split="canary") for kind in ("undesirable", "desirable")}
        self.collator = PairCollator(
            tokenizer, system_prompt=config.system_prompt or None, attack_on=config.attack_on, **config.chat_options
        )
        self.benign = benign_prompts(FILE)[: config.canary_prompts]
        self.harmful, self.source = watched(config)

    def described(self) -> dict[str, Any]:
        """What was asked, for a record: how many of each, and a hash of the texts."""
        text = canary_text()
        asked: dict[str, Any] = {
            kind: {"source": f"lpa/data/statements.jsonl, {kind}, canary", **_hashed(pairs["prompt"])}
            for kind, pairs in self.pairs.items()
        }
        asked["benign"] = {"source": f"lpa/data/{FILE}", **_hashed([prompt.text for prompt in self.benign])}
        asked["text"] = {"source": "lpa/data/canary_text.txt", "words": len(text.split()), "sha256": digest(text)}
        if self.harmful:
            asked["harmful"] = {"set": self.config.canary_set, **self.source}
        return asked

    def measure(self, model: Any, pgd: LatentPGD) -> dict[str, float]:
        """The numbers at the model's present weights; model and random state are left as they were.

        Returns:
            "disagrees_undesirable", "agrees_desirable": shares of statements; "margin_undesirable", "margin_desirable":
            their mean log-odds in nats; "perplexity"; "benign_done", and with a harmful set "harmful_done": shares of
            requests; "distinct", "trained", "entropy", "words": what `judge_collapse` looks at in the benign answers;
            "collapsed": 0 or 1; "seconds".

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        begin, found = time.perf_counter(), dict[str, float]()
        for kind, word in (("undesirable", "disagrees"), ("desirable", "agrees")):
            values = margins(pgd, self.pairs[kind], self.collator, attacked=False)
            found |= {f"{word}_{kind}": float((values > 0).float().mean()), f"margin_{kind}": float(values.mean())}
        found["perplexity"] = perplexity(model, self.tokenizer, canary_text())
        if odd := [name for name, value in found.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"the canaries' {odd[0]} is {found[odd[0]]}: the model's logits are not finite")
        with _answering(model):
            texts, done = self._answers(model, self.benign)
            if self.harmful:
                found["harmful_done"] = sum(flags := self._answers(model, self.harmful)[1]) / len(flags)
        verdict = judge_collapse(texts, done, self.completions)
        found |= {"benign_done": verdict.done, "distinct": verdict.distinct, "trained": verdict.trained}
        found |= {"entropy": verdict.entropy, "words": verdict.words, "collapsed": float(verdict.collapsed)}
        return found | {"seconds": time.perf_counter() - begin}

    def _answers(self, model: Any, prompts: Sequence[Prompt]) -> tuple[list[str], list[bool]]:
        """Answers to the prompts that fit into the context, and whether each does what was asked."""
        bench = Bench(model, self.tokenizer, system_prompt=PLAIN_PROMPT, batch_size=_BATCH,
                      max_new_tokens=self.config.canary_max_new_tokens, **self.config.chat_options)  # fmt: skip
        fitting: list[tuple[Prompt, Tokens]] = []
        for prompt in prompts:
            try:
                fitting.append((prompt, bench.prompt_tokens(prompt.text)))
            except DataError as error:
                last = error
        if not fitting:
            raise ValueError(f"no canary fits into the context: {last}; lower canary_max_new_tokens")
        fitting.sort(key=lambda item: len(item[1]))
        texts = [text for chunk in batches(fitting, _BATCH) for text in bench.answers([tokens for _, tokens in chunk])]
        return texts, [
            refusal.label(text, prompt.text, prompt.expect, self.completions) == refusal.COMPLIANCE
            for text, (prompt, _) in zip(texts, fitting, strict=True)
        ]


def _hashed(texts: Sequence[str]) -> dict[str, Any]:
    return {"rows": len(texts), "sha256": digest("\n".join(texts))}


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Eval mode throughout: a block that checkpoints its activations keeps no cache of keys and values."""
    with eval_mode(model), quiet_generation(), torch.no_grad():
        yield
