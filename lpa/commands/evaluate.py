"""`lpa evaluate`: a model and its adapters side by side: harm, benign controls, robustness, utility, collapse."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

_EXAMPLES = """\
A run of everything; after a stop the same command continues it:
  lpa evaluate --model MODEL --adapter runs/lpa --output runs/evaluation
The ladder of unbounded attacks, on the first 20 prompts of one set:
  lpa evaluate --adapter runs/lpa --suite ladder --set strongreject --output runs/ladder
Two suites on 50 prompts a set:
  lpa evaluate --adapter runs/lpa --suite harm overrefusal --set strongreject --limit 50
"""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lpa evaluate",
        usage="lpa evaluate [OPTIONS]",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    from rich.console import Console

    from ..config import json_object
    from ..evaluation import SUITES, Settings, evaluate
    from ..evaluation.session import check_read
    from ..evaluation.subjects import checkpoints_of
    from ..models import base_and_adapters
    from . import Progress, quiet_loading

    console = Console()
    if options.list:
        for suite in SUITES.values():
            console.print(f"{suite.name:12} {suite.about}")
        return 0
    steps = checkpoints_of(options.checkpoints) if options.checkpoints else {}
    held = vars(options)
    chosen: dict[str, Any] = {
        field.name: held[field.name] for field in fields(Settings) if held.get(field.name) is not None
    }
    flags = {action.dest: action.option_strings[-1] for action in reversed(parser._actions)}
    check_read(chosen, options.suite, flags)
    limits = ("limit", "benign_limit", "trait_limit", "utility_limit")
    if "limit" in chosen:
        chosen = dict.fromkeys(limits, chosen["limit"]) | chosen
        if chosen["limit"] > 0:
            chosen.setdefault("ladder_limit", min(chosen["limit"], Settings.ladder_limit))
    for name in limits:
        if chosen.get(name) == 0:
            chosen[name] = None
    if options.system_prompt == "":
        chosen["system_prompt"] = None
    if options.judge_prompt:
        with open(options.judge_prompt, encoding="utf-8") as stream:
            chosen["judge_prompt"] = stream.read()
    if options.chat_template_kwargs:
        chosen["chat_template_kwargs"] = json_object("--chat-template-kwargs", options.chat_template_kwargs)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}
    if options.batch_size < 1:
        raise ValueError(f"--batch-size={options.batch_size} must be at least 1")
    try:
        settings = Settings(**values)
    except ValueError as error:  # it names fields, and these are set by options
        text = re.sub(r"^\w+", lambda found: flags.get(found[0], found[0]), str(error))
        raise ValueError(text.replace("None for all", "0 for all")) from error
    quiet_loading()
    base, adapters = base_and_adapters(
        options.model, [*options.adapter, *(f"{name}={path}" for name, path in steps.items())]
    )
    with Progress(console) as tick:
        result = evaluate(
            base,
            adapters,
            suites=options.suite,
            output=options.output,
            settings=settings,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
            keep_texts=options.keep_texts,
            command=shlex.join(["lpa", "evaluate", *arguments]),
            tick=tick,
            tell=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    wide = console if console.is_terminal else Console(width=200)
    wide.print(result.table(full=options.full))
    if result.folder is not None:
        print(f"records, table and settings: {result.folder}; `lpa report {result.folder}` makes a page of them")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; those named like a field of `Settings` set it."""
    from . import DTYPES

    add = parser.add_argument
    add("--model", help="a folder, a hub name, or an asset's name; by default the adapters', else the embedded model")
    add("--adapter", action="extend", nargs="+", default=[], metavar="[NAME=]FOLDER", help="adapters to set beside it")
    add("--checkpoints", metavar="RUN", help="set the checkpoints of a training run beside it; the report draws them")
    add("--suite", action="extend", nargs="+", help="suites to run; by default all but the ladder (see --list)")
    add("--list", action="store_true", help="list the suites")
    add("--output", metavar="FOLDER", help="for records and results; a stopped run there is continued")
    add("--set", dest="sets", action="extend", nargs="+", metavar="SET",
        help="harmful prompts: strongreject, harmbench, advbench, do-not-answer (the default), jailbreakbench, hex-phi,"
        " a .csv, .tsv, .json, .jsonl, .parquet or .txt file, or a data set's hub name")  # fmt: skip
    add("--benign-set", dest="benign_sets", action="extend", nargs="+", metavar="SET",
        help="benign prompts beside the shipped ones: a file or a hub name (of XSTest the safe ones)")  # fmt: skip
    add("--set-column", help="the column with the prompts, where a set's header does not tell")
    add("--set-filter", action="extend", nargs="+", metavar="COLUMN=VALUE", help="take only these rows of a set")
    add("--set-split", help="split of sets on the hub and of folders (default: train)")
    add("--set-config", help="configuration of sets on the hub")
    add(
        "--limit",
        type=int,
        help="prompts of each set, and rows of every suite (default: 100 harmful, 300 benign; 0: all)",
    )
    add("--benign-limit", type=int, help="benign requests, where --limit is for the harmful sets alone")
    add("--utility-limit", type=int, help="MMLU questions, LAMBADA passages, lm-eval samples (default: --limit, else "
        "200; 0: all)")  # fmt: skip
    add("--task", dest="tasks", action="extend", nargs="+", metavar="TASK", help="lm-eval tasks: gsm8k, hellaswag, ...")
    add("--attack", dest="attacks", action="extend", nargs="+", metavar="ATTACK",
        help="direct, prefix, template, latent, embedding (by default these), vector, ablate, random")  # fmt: skip
    add("--attack-epsilon", type=float, help="radius of the latent, embedding, vector and random attacks")
    add("--attack-steps", type=int, help="steps of the latent and embedding attacks")
    add("--attack-sites", dest="sites", action="extend", nargs="+",
        help="attacked sites; by default LPA's, scaled to the depth")  # fmt: skip
    add(
        "--curve-epsilon", dest="epsilons", type=float, action="extend", nargs="+", help="radii of the robustness curve"
    )
    add("--curve-steps", dest="steps", type=int, action="extend", nargs="+", help="step counts of the robustness curve")
    for former, now in (("--epsilon", "--curve-epsilon"), ("--steps", "--curve-steps"), ("--sites", "--attack-sites")):
        add(former, action=_Renamed, now=now, nargs="*", help=argparse.SUPPRESS)
    add("--ladder", action="extend", nargs="+", metavar="ATTACK",
        help="of --suite ladder: suffix, ablation, erosion, best-of-n (the default), gcg")  # fmt: skip
    add("--ladder-limit", type=int, help="prompts of each set that the ladder attacks (default: 20)")
    add("--suffix-steps", type=int, help="Adam's steps on the free embeddings of the soft suffix (default: 100)")
    add("--erosion-steps", type=int, action="extend", nargs="+",
        help="updates of fine-tuning after which is asked (default: 5 10 20 40)")  # fmt: skip
    add("--best-of", type=int, help="respellings of a request (default: 16)")
    add("--judge", help="a classifier that judges the answers too, by folder or hub name, or as judgezoo:NAME")
    add("--judge-prompt", metavar="FILE", help="the judge's question, with {prompt} and {answer}")
    add(
        "--completion",
        dest="completions",
        action="extend",
        nargs="+",
        metavar="TEXT",
        help="what the adapters were trained to say, where it was not agreeing and disagreeing with statements",
    )
    add("--system-prompt", help="of the conversations; empty for none")
    add("--chat-template-kwargs", metavar="JSON", help="variables for the chat template")
    add("--chat-template-date", metavar="YYYY-MM-DD", help="what chat templates print as today's date")
    add("--max-new-tokens", type=int, help="longest answer (default: 96)")
    add(
        "--generator", help="what makes the answers of models that are not attacked: transformers (the default) or vllm"
    )
    add("--batch-size", type=int, default=8, help="prompts a pass (default: 8)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights")
    add("--device", help="by default the first GPU, else the CPU")
    add("--seed", type=int, help="of random perturbations (default: 0)")
    add("--keep-texts", action="store_true", help="keep the harmful prompts in the file that stays out of commits")
    add("--full", action="store_true", help="show the points of the robustness curves in the table too")


class _Renamed(argparse.Action):
    """An option by its former name: an error that says the new one."""

    def __init__(self, *args: Any, now: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.now = now

    def __call__(self, parser: argparse.ArgumentParser, space: Any, values: Any, option_string: Any = None) -> None:
        raise ValueError(f"{option_string} is called {self.now} now")
