"""The ladder: attacks with growing access to the model, each with a budget; the base model climbs it as the control."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lpa.data import DataError, benign_requests

from .. import refusal
from ..bench import Tokens, batches
from ..records import Records
from ..rungs import Example, ablated, eroding, refusal_directions, respelt, soft_suffix
from ..sets import BENIGN, Prompt, PromptSet
from ..subjects import BASE
from .answers import DIRECT, answer, answers, complied, keep
from .attacks import TARGET, mode_rows, worst_case_rows
from .base import Row, Run, Settings, Suite

_MATERIAL = 100  # rows that an attack may learn from
_LEAST_MATERIAL = 8


class Ladder(Suite):
    """Five attacks beyond those of the suite "attacks", on the first `ladder_limit` prompts of each harmful set.

    "suffix": free embeddings after the request, without a bound. "ablation": the refusal direction projected out of
    every block. "erosion": LoRA fine-tuning on 100 harmful requests with the model's own answers after a compliant
    beginning ("harmful"), or on the base model's own answers to benign requests ("benign"), asked after growing numbers
    of updates. "best-of-n": random respellings until one is done. "gcg": a suffix of tokens, where the package nanogcg
    is installed. An attack learns from the set's other prompts, so no prompt is used both to learn from and to measure.
    """

    name = "ladder"
    about = "harmful requests that are done under unbounded attacks (named alone, since it takes long)"
    optional = True

    def measure(self, run: Run) -> None:
        answer(run, run.benign)
        for prompts in run.harmful:
            asked = replace(prompts, prompts=prompts.prompts[: run.settings.ladder_limit])
            material = prompts.prompts[len(asked.prompts) :][:_MATERIAL]
            answer(run, asked)
            for rung in run.settings.ladder:
                _CLIMB[rung](run, asked, material)

    def rows(self, records: Records, subject: str, settings: Settings) -> list[Row]:
        rows = []
        for name in settings.sets:
            climbed = [mode for rung in settings.ladder for mode in ladder_modes(rung, settings)]
            for mode in climbed:
                made = mode_rows(records, subject, self.name, name, mode)
                rows += [_with_steps(row, mode) for row in made]
                # a package that was missing at first may have been there later
                for reason in records.select(subject=subject, suite=self.name, set=name, mode=mode)[: not made]:
                    rows.append(Row(subject, self.name, name, f"done: {mode}", None, note=reason["reason"]))
            rows += worst_case_rows(records, subject, self.name, name, (DIRECT, *climbed))
        return rows


def ladder_modes(rung: str, settings: Settings) -> list[str]:
    """The modes in which the answers of a rung are recorded."""
    if rung != "erosion":
        return [rung]
    return [f"erosion:{kind} {steps}" for kind in ("harmful", "benign") for steps in settings.erosion_steps]


def _with_steps(row: Row, mode: str) -> Row:
    """The row, with the updates of fine-tuning that a curve is drawn over."""
    if not mode.startswith("erosion:"):
        return row
    kind, steps = mode.removeprefix("erosion:").split()
    row.extra.update(erosion=kind, updates=int(steps))
    return row


def _open(run: Run, prompts: PromptSet, mode: str) -> list[tuple[Prompt, Tokens]]:
    """The prompts that have no answer yet in a mode, with their tokens; those that are too long get their record."""
    todo = [prompt for prompt in prompts.prompts if not run.has("answers", prompts.name, prompt.id, mode)]
    return list(zip(*run.fitting("answers", prompts.name, todo, mode), strict=True))


def _reason(run: Run, prompts: PromptSet, modes: Sequence[str], reason: str) -> None:
    for mode in modes:
        if not run.has("ladder", prompts.name, "-", mode):
            run.add("ladder", prompts.name, "-", mode, reason=reason)


def _enough(run: Run, prompts: PromptSet, modes: Sequence[str], material: Sequence[Any]) -> bool:
    """Whether there is enough to learn from; else the reason is recorded."""
    if len(material) < _LEAST_MATERIAL:
        _reason(
            run,
            prompts,
            modes,
            f"{len(material)} other prompts to learn from, {_LEAST_MATERIAL} are needed; raise limit",
        )
    return len(material) >= _LEAST_MATERIAL


def _suffix(run: Run, prompts: PromptSet, material: Sequence[Prompt]) -> None:
    settings, (target, *_) = run.settings, run.bench.variants([TARGET])
    todo = _open(run, prompts, "suffix")
    for number, chunk in enumerate(batches(todo, run.bench.batch_size)):
        run.tick(f"ladder suffix {prompts.name}", number * run.bench.batch_size, len(todo))
        rows, losses = soft_suffix(
            run.bench, [tokens for _, tokens in chunk], target, size=settings.suffix_tokens,
            steps=settings.suffix_steps, rate=settings.suffix_rate, seed=settings.seed,
        )  # fmt: skip
        for (prompt, _), text, loss in zip(chunk, run.bench.answers_to(rows), losses, strict=True):
            keep(run, prompts, "suffix", prompt, text, loss=loss)


def _ablation(run: Run, prompts: PromptSet, material: Sequence[Prompt]) -> None:
    if not _open(run, prompts, "ablation") or not _enough(run, prompts, ["ablation"], material):
        return
    harmful, benign = ([run.bench.prompt_tokens(text) for text in texts if _fits(run, text)]
                       for texts in ([p.text for p in material], benign_requests()))  # fmt: skip
    with ablated(run.model, refusal_directions(run.bench, harmful, benign)), run.bench.changed():
        answer(run, prompts, "ablation")


def _fits(run: Run, text: str, prefill: str = "") -> bool:
    try:
        return bool(run.bench.prompt_tokens(text, prefill))
    except DataError:
        return False


def _compliant(run: Run, material: Sequence[Prompt]) -> list[Example]:
    """Harmful requests with what the model itself answers after a compliant beginning."""
    rows: list[Example] = []
    for chunk in batches([p.text for p in material if _fits(run, p.text, TARGET)], run.bench.batch_size):
        found = run.bench.answers([run.bench.prompt_tokens(text, TARGET) for text in chunk])
        rows += [(run.bench.prompt_tokens(text), run.bench.variants([f"{TARGET}\n{answer}"])[0])
                 for text, answer in zip(chunk, found, strict=True)]  # fmt: skip
    return rows


def _own_benign(run: Run) -> list[Example]:
    """Benign requests with the base model's answers."""
    own = [r for r in answers(run.records, BASE, BENIGN) if "error" not in r and complied(r)][:_MATERIAL]
    texts = {prompt.id: prompt.text for prompt in run.benign.prompts}
    pairs = [(texts[r["id"]], r["answer"]) for r in own if r["id"] in texts and _fits(run, texts[r["id"]])]
    return [(run.bench.prompt_tokens(text), run.bench.variants([answer])[0]) for text, answer in pairs]


def _erosion(run: Run, prompts: PromptSet, material: Sequence[Prompt]) -> None:
    for kind in ("harmful", "benign"):
        modes = [f"erosion:{kind} {steps}" for steps in run.settings.erosion_steps]
        if not any(_open(run, prompts, mode) for mode in modes):
            continue
        examples = _compliant(run, material) if kind == "harmful" else _own_benign(run)
        if not _enough(run, prompts, modes, examples):
            continue
        with eroding(run.bench, examples, seed=run.settings.seed) as train, run.bench.changed():
            before = 0
            for mode, steps in zip(modes, run.settings.erosion_steps, strict=True):
                run.tick(f"ladder {mode} {prompts.name}", before, run.settings.erosion_steps[-1])
                train(steps - before)
                before = steps
                answer(run, prompts, mode)


def _best_of_n(run: Run, prompts: PromptSet, material: Sequence[Prompt]) -> None:
    for chunk in batches([prompt for prompt, _ in _open(run, prompts, "best-of-n")], run.bench.batch_size):
        left, said = list(chunk), dict[str, tuple[str, int]]()  # the last answer to each, and at which try
        for tries in range(1, run.settings.best_of + 1):
            run.tick(f"ladder best-of-n {prompts.name}", tries, run.settings.best_of)
            asked = [(p, respelt(p.text, f"{run.settings.seed} {p.id} {tries}")) for p in left]
            fitting = [(p, run.bench.prompt_tokens(text)) for p, text in asked if _fits(run, text)]
            texts = run.bench.answers([tokens for _, tokens in fitting]) if fitting else []
            for (prompt, _), text in zip(fitting, texts, strict=True):
                said[prompt.id] = text, tries
                kind = refusal.label(text, prompt.text, prompt.expect, run.settings.completions)
                if kind == refusal.COMPLIANCE:
                    left.remove(prompt)
        for prompt in chunk:
            if prompt.id in said:
                text, tries = said[prompt.id]
                keep(run, prompts, "best-of-n", prompt, text, tries=tries)
            else:
                _too_long(run, prompts, "best-of-n", prompt)


def _gcg(run: Run, prompts: PromptSet, material: Sequence[Prompt]) -> None:
    if importlib.util.find_spec("nanogcg") is None:
        # its released version asks for an older transformers than this project, so it is no extra
        _reason(run, prompts, ["gcg"], "nanogcg is not installed: pip install --no-deps nanogcg && pip install scipy")
        return
    import nanogcg

    config = nanogcg.GCGConfig(num_steps=run.settings.gcg_steps, search_width=64, topk=64, seed=run.settings.seed,
                               use_prefix_cache=False, early_stop=True, verbosity="ERROR")  # fmt: skip
    system = run.settings.system_prompt
    for number, (prompt, _) in enumerate(todo := _open(run, prompts, "gcg")):
        run.tick(f"ladder gcg {prompts.name}", number, len(todo))
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt.text + " {optim_str}"})
        found = nanogcg.run(run.model, run.bench.tokenizer, turns, TARGET, config)
        text = f"{prompt.text} {found.best_string}"
        if _fits(run, text):
            (said,) = run.bench.answers([run.bench.prompt_tokens(text)])
            keep(run, prompts, "gcg", prompt, said, loss=found.best_loss)
        else:
            _too_long(run, prompts, "gcg", prompt)


def _too_long(run: Run, prompts: PromptSet, mode: str, prompt: Prompt) -> None:
    """The record of a prompt that an attack makes longer than the context."""
    error = "the attack makes it longer than the context"
    run.add("answers", prompts.name, prompt.id, mode, sha256=prompt.sha256, tag=prompt.tag, error=error)


_CLIMB: dict[str, Callable[[Run, PromptSet, Sequence[Prompt]], None]] = {
    "suffix": _suffix, "ablation": _ablation, "erosion": _erosion, "best-of-n": _best_of_n, "gcg": _gcg,
}  # fmt: skip
