"""The options of a run: `lpa train` takes them, and `lpa plan`. Presets and YAML set the parser's defaults."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import run_folder as folder
from ..config import GROUPS, RENAMED, LPAConfig
from ..messages import nearest
from ..models import DEFAULT_MODEL
from ..presets import PRESETS
from ..public_code import is_public, our_name, translated
from . import Dtype

logger = logging.getLogger(__name__)

_COMMAND_LINE_ONLY = ("config", "overwrite", "preset", "resume")
_NOT_KEPT = (*_COMMAND_LINE_ONLY, "output", "output_dir")  # in a run's settings, which lie in its folder


@dataclass
class TrainOptions:
    """What `lpa train` takes beside the fields of `LPAConfig`."""

    model: str = field(default=DEFAULT_MODEL, metadata={
        "help": "Asset, hub name or folder. By default a small model that needs no hub."})  # fmt: skip
    data: str | None = field(default=None, metadata={
        "help": "Pairs with columns prompt, rejected, chosen, or statements with a key: .csv, .tsv, .json, .jsonl, "
                ".parquet, a folder or a data set's name; or an arm "
                "of the shipped statements: undesirable (the default), desirable, both, and the controls inverted, "
                "irrelevant, shuffled; ipip-undesirable, ... for the IPIP-NEO-120 inventory."})  # fmt: skip
    benign: str | None = field(default=None, metadata={
        "help": "Benign examples with columns prompt, response, for sft_coef and kl_coef; own for the model's own "
                "answers to the shipped benign requests. By default the shipped desirable statements."})  # fmt: skip
    output: str | None = field(
        default=None, metadata={"help": "Folder for the result. By default runs/MODEL-DATE-TIME."}
    )
    overwrite: bool = field(default=False, metadata={
        "help": "Replace an earlier run in the output folder, once the new one can start."})  # fmt: skip
    resume: bool = field(default=False, metadata={
        "help": "Go on with the run in --output from its last checkpoint; its settings are the defaults."})  # fmt: skip
    dtype: Dtype = field(default="auto", metadata={
        "help": "Of the weights; auto is what the checkpoint holds."})  # fmt: skip
    load_in_4bit: bool = field(default=False, metadata={
        "help": "Quantise the base model to 4 bits (bitsandbytes); the adapters are trained beside it."})  # fmt: skip
    load_in_8bit: bool = field(default=False, metadata={"help": "The same with 8 bits."})
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "Kind of 4-bit weights."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the scales of 4-bit weights too."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ...; auto by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    measure: bool = field(default=True, metadata={"help": "Measure before and after, on held-out statements."})
    measure_attacked: int = field(default=12, metadata={
        "help": "How many of the 60 held-out statements of each kind are also measured under attack."})  # fmt: skip

    def __post_init__(self) -> None:
        if self.measure_attacked < 0:
            raise ValueError(f"measure_attacked={self.measure_attacked} must be 0 (none) or more")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit=True and load_in_8bit=True exclude each other; give one of them")

    @property
    def quantized(self) -> str | None:
        """How the base model is quantised, in words."""
        if self.load_in_4bit:
            return f"4-bit {self.bnb_4bit_quant_type}{', nested' if self.use_bnb_nested_quant else ''} (bitsandbytes)"
        return "8-bit (bitsandbytes)" if self.load_in_8bit else None


def parser(command: str, text: str) -> Any:
    """The options of a run, for a command that takes them, in groups; those of `TrainingArguments` come last."""
    from transformers import HfArgumentParser

    found = HfArgumentParser(
        [TrainOptions, LPAConfig], prog=command, usage=f"{command} [OPTIONS]", description=text, allow_abbrev=False,
        add_help=False,
    )  # fmt: skip
    found.add_argument("-h", "--help", action=_Help, all_of_them=False, help="Show these options.")
    found.add_argument("--help-all", action=_Help, all_of_them=True, help="Show those of TrainingArguments too.")
    found.add_argument("--config", help="YAML file with any of these options; those on the command line go first.")
    found.add_argument("--preset", choices=sorted(PRESETS), help=(
        "Settings by name, over which options and --config go. By default none where a model is named; without "
        "--model it is demo: " + ", ".join(f"{k} {v}" for k, v in PRESETS["demo"].items()) + "."))  # fmt: skip
    group, groups = "model, data and output", {}
    for name in (*TrainOptions.__annotations__, *LPAConfig.__annotations__):
        group = GROUPS.get(name, group)
        groups[name] = group
    optional = found._optionals
    titles = {title: found.add_argument_group(title) for title in dict.fromkeys(groups.values())}
    inherited = found.add_argument_group(INHERITED)
    for action in list(optional._group_actions):
        if action.dest not in (argparse.SUPPRESS, "config", "preset"):
            optional._group_actions.remove(action)
            into = titles[groups[action.dest]] if action.dest in groups else inherited
            into._group_actions.append(action)
    return found


INHERITED = "inherited from transformers' TrainingArguments"


class _Help(argparse.Action):
    """Prints the help and ends; without --help-all, LPA's own options alone."""

    def __init__(self, option_strings: Sequence[str], dest: str, all_of_them: bool, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.all_of_them = all_of_them

    def __call__(self, parser: Any, *_: Any) -> None:
        if not self.all_of_them:
            parser._action_groups = [group for group in parser._action_groups if group.title != INHERITED]
        parser.print_help()
        parser.exit()


def parsed(parser: Any, given: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(the options by name, the commands of the run: of a resumed one the first, then those that resumed it).

    Of a preset, the YAML files and the command line, each goes over the one before.

    Raises:
        ValueError: a file cannot be read, or a setting in it is wrong.
        SystemExit: an option on the command line is wrong, or help was asked for.
    """
    if {"-h", "--help", "--help-all"} & set(given):
        parser.parse_args(given)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--output", "--model", "--preset"):
        first.add_argument(name)
    first.add_argument("--resume", nargs="?", const=True, default=False, type=lambda text: text.lower() != "false")
    look = first.parse_known_args(given)[0]
    settings = _settings(parser, look.config) if look.config else {}
    commands = [shlex.join([*parser.prog.split(), *given])]
    if look.resume:
        output = look.output or settings.get("output")
        if not output:
            raise ValueError("--resume needs --output, the folder of the run to go on with")
        record = Path(output) / folder.SETTINGS
        if not record.is_file():
            raise ValueError(f"--resume: {output} holds no run (there is no {folder.SETTINGS})")
        settings = _settings(parser, record, of_a_run=True) | settings
        commands = folder.given_commands(record) + commands
    named = look.model or settings.get("model")
    preset = look.preset or ("none" if named or look.resume else "demo")
    parser.set_defaults(**PRESETS.get(preset, {}) | settings, preset=preset)
    values = _known(parser, given)
    if preset != "none":
        chosen = set(settings) | _on_the_line(parser, given)
        # a preset's settings without an object (adapters to merge, a benign term) give way, those of the user do not
        unused: dict[str, Any] = {"attack_merge_adapters": False} if not values["lora"] or _quantised(values) else {}
        unused |= {"benign": None} if not (values["kl_coef"] or values["sft_coef"]) else {}
        values |= {name: value for name, value in unused.items() if name not in chosen}
    return values, commands


def _quantised(values: dict[str, Any]) -> bool:
    return bool(values["load_in_4bit"] or values["load_in_8bit"])


def _known(parser: Any, given: Sequence[str]) -> dict[str, Any]:
    values, unknown = parser.parse_known_args(given)
    if unknown:
        flag = unknown[0].partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if name in RENAMED:
            parser.error(f"{flag} is called --{RENAMED[name]} now")
        if ours := our_name(name):
            parser.error(f"{flag} is an option of the public LPA code; here it is --{ours}")
        parser.error(f"unknown option {flag}{nearest(flag.lstrip('-'), _options(parser))}")
    return vars(values)


def _on_the_line(parser: Any, given: Sequence[str]) -> set[str]:
    """The options that were given as words."""
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    return {flags[word.partition("=")[0]] for word in given if word.partition("=")[0] in flags}


def _options(parser: Any) -> dict[str, Any]:
    """Every option by name; of --x and --no_x the first."""
    return {action.dest: action for action in reversed(parser._actions) if action.dest != argparse.SUPPRESS}


def _settings(parser: Any, path: str | Path, of_a_run: bool = False) -> dict[str, Any]:
    """The settings in a YAML file as the parser would read them. of_a_run: names that a former release used are known.

    Raises:
        ValueError: one that is unknown, has no value, or one that its option does not take.
    """
    options = _options(parser)
    found = read_yaml(path, options, RENAMED if of_a_run else {})
    if odd := [name for name in _COMMAND_LINE_ONLY if name in found]:
        raise ValueError(f"{path} sets {odd[0]}, which belongs on the command line")
    return {name: _as_read(options[name], value, f"{path} sets {name}") for name, value in found.items()}


def read_yaml(path: str | Path, known: Iterable[str], former: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The settings in a YAML file; dashes in their names count as underscores.

    Args:
        known: the names of settings. former: names that are read as others.

    Raises:
        ValueError: no such file, not a mapping, or an unknown key (with the nearest known one).

    A lat_config.json of the public LPA code is read as well (`lpa.public_code`).
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} holds a {type(values).__name__}; it must be a mapping of settings to values")
    names = set(known)
    renamed = former or {}
    settings = {str(key).replace("-", "_"): value for key, value in values.items()}
    if is_public(settings):
        settings = translated(settings, str(path))
        ours = ", ".join(f"{name} {value}" for name, value in settings.items())
        logger.warning("%s is of the public LPA code; it is read as %s", path, ours)
    settings = {renamed.get(key, key): value for key, value in settings.items()}
    for key in settings:
        if key in RENAMED:
            raise ValueError(f"--config {path} sets {key!r}, which is called {RENAMED[key]!r} now")
        if key not in names:
            raise ValueError(f"--config {path} has the unknown key {key!r}{nearest(key, names)}")
    return settings


def _as_read(option: Any, value: Any, where: str) -> Any:
    """A value of YAML as the option would read it from words."""
    if value is None:
        raise ValueError(f"{where} to nothing; leave it out for its default")
    if isinstance(value, list) != (option.nargs == "+"):
        value = [value] if option.nargs == "+" else value
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{where} to []; name at least one")
        if option.nargs != "+":
            raise ValueError(f"{where} to {value}, a list; it takes one value")
        return [_as_read_one(option, each, where) for each in value]
    return _as_read_one(option, value, where)


def _as_read_one(option: Any, value: Any, where: str) -> Any:
    if isinstance(value, bool):  # YAML takes a plain no for false
        value = "no" if not value and "no" in (option.choices or ()) else value
    word = json.dumps(value) if isinstance(value, dict) else str(value)
    try:
        read = word if option.type is None else option.type(word)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where} to {value!r}: {error}") from error
    if option.choices is not None and read not in option.choices:
        raise ValueError(f"{where} to {value!r}; use one of {', '.join(map(str, option.choices))}")
    return read


def asked(values: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults, and those of the preset: what settings.yaml keeps."""
    defaults = vars(parser("lpa train", "").parse_args([]))
    of_preset = PRESETS[values["preset"]]
    return {k: getattr(v, "value", v) for k, v in values.items()
            if k not in _NOT_KEPT and v is not None
            and (v != defaults[k] or k in of_preset or k == "model")}  # fmt: skip
