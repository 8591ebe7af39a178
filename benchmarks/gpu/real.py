"""The real piece: the embedded model at the paper's settings, over rates, radii and seeds, each run then evaluated."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lpa import assets
from lpa.commands import train
from lpa.data import ASSESSMENT_PROMPT, PLAIN_PROMPT
from lpa.evaluation import BASE, Evaluation, Settings, evaluate
from lpa.models import DEFAULT_MODEL, ModelError, resolve

from .worker import Cases, Setting, Skip

STEPS, EVERY = 200, 30  # LPA steps of a run, and between its checkpoints
MEASURED = (30, 60, 120)  # and the last
RATES = (8e-5, 3e-4, 1e-3, 3e-3, 3e-5)
# (step size, radius): the published attack, which never reaches its radius at width 576, and two that do
RADII = {"published": (1e-3, 6.0), "binding 0.2": (1e-3, 0.2), "binding 1": (1e-2, 1.0)}
SEEDS = (0, 1, 2)
SUITES = ("traits", "attacks", "overrefusal", "utility", "collapse")
# as the comparison's on a CPU, with twice the prompts and longer answers
ASKED = Settings(sets=("strongreject",), limit=200, attacks=("direct",), max_new_tokens=64, trait_prompt=PLAIN_PROMPT,
                 epsilons=(), steps=(), utility_sets=())  # fmt: skip
COLUMNS = {  # of the table: suite, metric, set
    "harmful done": ("attacks", "done: direct", "strongreject"),
    "benign not done": ("overrefusal", "not done", "benign"),
    "perplexity": ("utility", "perplexity", "prose"),
    "agrees: undesirable": ("traits", "agrees, clean", "undesirable"),
    "agrees: desirable": ("traits", "agrees, clean", "desirable"),
    "collapsed": ("collapse", "collapsed", "benign"),
}


@dataclass(frozen=True)
class Run:
    """One training run. `anchor`: held to the model's own benign answers, under the prompt that it is used with."""

    rate: float
    radius: str
    seed: int
    anchor: bool

    @property
    def name(self) -> str:
        """For tables and folders."""
        held = "anchored" if self.anchor else "as published"
        return f"{held}, rate {self.rate:g}, {self.radius}, seed {self.seed}"

    def flags(self) -> list[str]:
        """Of `lpa train`."""
        step_size, epsilon = RADII[self.radius]
        held = (["--kl_coef", "1", "--benign", "own", "--system_prompt", PLAIN_PROMPT] if self.anchor
                else ["--kl_coef", "0", "--system_prompt", ASSESSMENT_PROMPT])  # fmt: skip
        return [
            "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--attack_steps", "16",
            "--defence_steps", "4", "--learning_rate", f"{self.rate:g}", "--attack_step_size", f"{step_size:g}",
            "--attack_epsilon", f"{epsilon:g}", "--seed", str(self.seed), *held,
        ]  # fmt: skip


def runs() -> Iterator[Run]:
    """Every run, those first that say most: all rates anchored, then as published, then other radii, then seeds."""
    for seed in SEEDS:
        for radius in RADII:
            for anchor in (True, False):
                for rate in RATES:
                    yield Run(rate, radius, seed, anchor)


def model_here(setting: Setting) -> str:
    """The embedded model's folder; of a dry run a tiny one's."""
    if setting.dry:
        from tests.support.tiny import saved_tiny

        folder = setting.out / "files" / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        return saved_tiny(folder)
    try:
        return resolve(DEFAULT_MODEL)
    except (ModelError, assets.AssetError) as error:
        raise Skip(
            f"{DEFAULT_MODEL} is not here ({str(error)[:200]}); put it under {assets.cache_dir().name}"
        ) from error


def trained(own: Run, model: str, setting: Setting) -> dict[str, Any]:
    """Train one run and evaluate its checkpoints; everything but the numbers is deleted afterwards."""
    dry = setting.dry
    folder = setting.out / "files" / "real" / own.name.replace(", ", "-").replace(" ", "-")
    length, every = (2, 1) if dry else (STEPS, EVERY)
    words = ["--model", model, "--output", str(folder), "--overwrite", "--measure", "false", "--lpa_steps",
             str(length), "--save_steps", str(4 * every), "--save_total_limit", str(length), *own.flags()]  # fmt: skip
    if dry:
        words += ["--attack_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu"]
    if code := train.run(words):
        raise RuntimeError(f"lpa train ended with {code}")
    adapters = {f"{own.name}, step {length}": str(folder)}
    for step in (1,) if dry else MEASURED:
        adapters[f"{own.name}, step {step}"] = str(folder / f"checkpoint-{4 * step}")
    found = evaluate(
        model, adapters, suites=("collapse",) if dry else SUITES, output=setting.out / "files" / "evaluation",
        settings=Settings(limit=2, max_new_tokens=2, sets=()) if dry else ASKED, batch_size=2 if dry else 100,
    )  # fmt: skip
    shutil.rmtree(folder)
    subjects = {"the model before": BASE} | {name.rpartition(", ")[2]: name for name in adapters}
    table = {
        short: {title: value_of(found, subject, where) for title, where in COLUMNS.items()}
        for short, subject in subjects.items()
    }
    return {"flags": shlex.join(own.flags()), **table}


def value_of(found: Evaluation, subject: str, where: tuple[str, str, str]) -> float | None:
    """A number of the evaluation; None where its suite or set was not measured."""
    try:
        return found.value(subject, *where)
    except KeyError:
        return None


def real(setting: Setting) -> Cases:
    """The piece: as many runs as time allows, always from where it was."""
    model = model_here(setting)
    for own in list(runs())[: 1 if setting.dry else None]:
        yield own.name, lambda own=own: trained(own, model, setting)
