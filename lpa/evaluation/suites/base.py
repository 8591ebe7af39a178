"""What a suite is: it writes the records of one subject, and makes rows of a table from records alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lpa.data import ASSESSMENT_PROMPT, PLAIN_PROMPT, DataError

from ..bench import Bench, Tokens
from ..records import Record, Records
from ..refusal import TRAINED
from ..sets import HARM_SETS, Choice, Prompt, PromptSet, digest
from ..stats import mean, wilson

ATTACKS = ("direct", "prefix", "template", "latent", "embedding")
FIXED = ("vector", "ablate", "random")  # adversaries of `AttackSettings` that cost no inner pass
UTILITY_SETS = ("mmlu", "lambada", "arithmetic", "knowledge")
GENERATORS = ("transformers", "vllm")
RUNGS = ("suffix", "ablation", "erosion", "best-of-n", "gcg")


@dataclass(frozen=True)
class Settings:
    """What is asked of every subject. Results of different settings are not mixed in one folder.

    Attributes:
        sets: of harmful prompts; see `lpa.evaluation.sets.load_set`. benign_sets: of benign ones, beside the shipped.
        set_column, set_filter, set_split, set_config: what is taken of sets that are files or on the hub, see `Choice`;
            a filter is "column=value".
        limit: prompts of each harmful set, None for all. benign_limit: requests of each benign set; a margin of 5
            points takes about 300.
        system_prompt: of the conversations; trait statements come under `trait_prompt`.
        max_new_tokens: longest answer.
        attacks: of `ATTACKS` and `FIXED`. `attack_epsilon`: radius of latent, embedding, vector and random ones;
            `attack_steps`: steps of the former two.
        epsilons, steps: radii and step counts of the robustness curves; `trait_epsilon`, `trait_steps` are held fixed
            while the other changes, and while the sites do. With neither, no trait is attacked.
        trait_limit: statements of each kind, spread over the traits; None for all.
        sites: attacked; by default LPA's, scaled to the model's depth.
        completions: what an adapter was trained to say; answers that begin with one do nothing that was asked.
        judge: a classifier's hub name or folder, for answers to harmful prompts; `judge_prompt` its question.
        ladder: attacks of the suite "ladder", of `RUNGS`, on the first `ladder_limit` prompts of each set.
            `suffix_tokens`, `suffix_steps`, `suffix_rate`: free embeddings, Adam's steps, and its rate as a share of
            the embeddings' root mean square. `erosion_steps`: updates of fine-tuning after which is asked. `best_of`:
            respellings. `gcg_steps`: of nanogcg.
        utility_sets: beside perplexity: mmlu, lambada, arithmetic, knowledge. tasks: lm-eval's, by name.
        utility_limit: MMLU questions, LAMBADA passages, and samples of each lm-eval task.
        chat_template_kwargs: variables for the chat template; chat_template_date: what it prints as today's date.
        seed: of random perturbations and resampling.
        generator: what makes answers of models that are not attacked: transformers, or vllm where it is installed.
    """

    sets: tuple[str, ...] = HARM_SETS
    benign_sets: tuple[str, ...] = ()
    set_column: str | None = None
    set_filter: tuple[str, ...] = ()
    set_split: str | None = None
    set_config: str | None = None
    limit: int | None = 100
    benign_limit: int | None = 300
    system_prompt: str | None = PLAIN_PROMPT
    max_new_tokens: int = 96
    attacks: tuple[str, ...] = ATTACKS
    attack_epsilon: float = 1.0
    attack_steps: int = 16
    trait_prompt: str | None = ASSESSMENT_PROMPT
    epsilons: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    steps: tuple[int, ...] = (1, 4, 16, 32)
    trait_epsilon: float = 0.3
    trait_steps: int = 16
    trait_limit: int | None = None
    sites: tuple[str, ...] | None = None
    completions: tuple[str, ...] = TRAINED
    ladder: tuple[str, ...] = RUNGS[:4]
    ladder_limit: int = 20
    suffix_tokens: int = 20
    suffix_steps: int = 100
    suffix_rate: float = 0.1
    erosion_steps: tuple[int, ...] = (5, 10, 20, 40)
    best_of: int = 16
    gcg_steps: int = 100
    judge: str | None = None
    judge_prompt: str | None = None
    utility_sets: tuple[str, ...] = UTILITY_SETS
    tasks: tuple[str, ...] = ()
    utility_limit: int | None = 200
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_date: str | None = None
    seed: int = 0
    generator: str = GENERATORS[0]

    def __post_init__(self) -> None:
        for name, known in (("attacks", (*ATTACKS, *FIXED)), ("ladder", RUNGS), ("utility_sets", UTILITY_SETS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"{name} {sorted(unknown)} are unknown; use some of {', '.join(known)}")
        if self.generator not in GENERATORS:
            raise ValueError(f"generator={self.generator!r} is unknown; use {' or '.join(GENERATORS)}")
        counts = ("ladder_limit", "suffix_tokens", "suffix_steps", "best_of", "gcg_steps")
        if odd := [text for text in self.set_filter if not text.partition("=")[0] or "=" not in text]:
            raise ValueError(f"set_filter={odd[0]!r} must be column=value")
        for name in ("max_new_tokens", "attack_steps", "trait_steps", *counts):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("limit", "benign_limit", "trait_limit", "utility_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None for all")
        if list(self.erosion_steps) != sorted(set(self.erosion_steps)) or min(self.erosion_steps, default=1) < 1:
            raise ValueError(f"erosion_steps={self.erosion_steps} must grow from 1 or more")
        for name in ("epsilons", "trait_epsilon", "attack_epsilon"):
            value = getattr(self, name)
            if any(not each > 0 for each in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name}={value} must be above 0; the clean model is always measured")
        if min(self.steps, default=1) < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; the clean model is always measured")

    @property
    def choice(self) -> Choice:
        """What is taken of sets that are files or on the hub."""
        where = {text.partition("=")[0]: text.partition("=")[2] for text in self.set_filter}
        return Choice(self.set_column, where, self.set_split, self.set_config)

    @property
    def chat_options(self) -> dict[str, Any]:
        """What every `ChatEncoder` of the run gets beside tokenizer and system prompt."""
        return {"chat_template_kwargs": self.chat_template_kwargs, "date": self.chat_template_date}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From a record of the run, of `as_dict`."""
        held: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**held)

    def as_dict(self) -> dict[str, Any]:
        """For a record of the run: plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass
class Run:
    """One subject being measured.

    Attributes:
        subject: its name. model: ready to be called as that subject.
        benign: the shipped benign prompts; more_benign: other benign sets. harmful: the harmful ones.
        tick: called with (what, done, total) for progress.
    """

    subject: str
    bench: Bench
    settings: Settings
    records: Records
    benign: PromptSet
    harmful: Sequence[PromptSet]
    more_benign: Sequence[PromptSet] = ()
    tick: Callable[[str, int, int], None] = lambda what, done, total: None

    @property
    def model(self) -> Any:
        """The model as the subject."""
        return self.bench.model

    def has(self, suite: str, set_name: str, number: str, mode: str = "") -> bool:
        """Whether that record is there already."""
        return (self.subject, suite, set_name, number, mode) in self.records

    def add(self, suite: str, set_name: str, number: str, mode: str = "", harmful: bool = False, **values: Any) -> None:
        """Keep one record."""
        record = {"subject": self.subject, "suite": suite, "set": set_name, "id": number, "mode": mode, **values}
        self.records.add(record, harmful)

    def fitting(
        self,
        suite: str,
        set_name: str,
        prompts: Sequence[Prompt],
        mode: str = "",
        wrap: Callable[[str], str] = str,
        **options: Any,
    ) -> tuple[list[Prompt], list[Tokens]]:
        """The prompts that fit into the context, and their tokens; each of the others gets a record of the error.

        Args:
            wrap: what is asked, from a prompt's text. options: prefill and room, as in `Bench.prompt_tokens`.
        """
        kept, tokens = [], []
        for prompt in prompts:
            try:
                tokens.append(self.bench.prompt_tokens(wrap(prompt.text), **options))
                kept.append(prompt)
            except DataError as error:
                self.add(suite, set_name, prompt.id, mode, sha256=prompt.sha256, tag=prompt.tag, error=str(error))
        return kept, tokens


@dataclass(frozen=True)
class Row:
    """One number of the table. `value` is None where there is none, and `note` then says why.

    Attributes:
        good: "up" or "down", which way is better; "" where neither is.
        low, high: of the 95% interval.
        unit: "%" where the value is a share (of 1), else "".
    """

    subject: str
    suite: str
    set: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""
    good: str = ""
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """A kind of measurement."""

    name: str
    about: str
    optional: bool = False  # measured only where it is named

    def measure(self, run: Run) -> None:
        """Write those records of the run's subject that are not there yet."""

    def rows(self, records: Records, subject: str, settings: Settings) -> list[Row]:
        """The table's rows of one subject, from records alone."""

    def data(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """What it asks beside prompt sets, by name: source, rows, rows used, hash of all texts, reason if missing."""
        return {}


def described(source: str, texts: Sequence[str], used: int | None = None) -> dict[str, Any]:
    """What identifies texts in a result, as `PromptSet.described`."""
    whole = digest("\n".join(texts))
    return {"source": source, "rows": len(texts), "used": len(texts) if used is None else used, "sha256": whole}


def share_row(subject: str, suite: str, where: str, metric: str, flags: Sequence[bool], **more: Any) -> Row:
    """A row with a share and its Wilson interval."""
    if not flags:
        return Row(subject, suite, where, metric, None, note=more.pop("note", "") or "nothing was measured")
    low, high = wilson(sum(flags), len(flags))
    return Row(subject, suite, where, metric, mean([float(f) for f in flags]), low, high, len(flags), "%", **more)


def scored(records: Sequence[Record]) -> list[Record]:
    """The records that hold a result."""
    return [record for record in records if "error" not in record]


def skipped_note(records: Sequence[Record]) -> str:
    """Says how many records hold an error instead, and the first of them."""
    failed = [record["error"] for record in records if "error" in record]
    return f"{len(failed)} of {len(records)} skipped: {failed[0]}" if failed else ""
