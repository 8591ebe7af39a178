"""`lpa train`: measure, train, measure again, and write the adapter with its record."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import run_folder as folder
from ..models import DEFAULT_MODEL
from ..names import nearest
from ..presets import PRESETS
from . import Dtype

_COMMAND_LINE_ONLY = ("config", "output", "output_dir", "overwrite", "preset", "resume")


@dataclass
class TrainOptions:
    """What `lpa train` takes beside the fields of `LPAConfig`."""

    model: str = field(default=DEFAULT_MODEL, metadata={
        "help": "Asset, hub name or folder. By default a small model that needs no hub."})  # fmt: skip
    data: str | None = field(default=None, metadata={
        "help": "Pairs with columns prompt, rejected, chosen: .csv, .jsonl, a folder or a data set's name; or of the "
                "shipped statements undesirable (the default), desirable, or both."})  # fmt: skip
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
        "help": "How many of the 12 held-out statements of each kind are also measured under attack."})  # fmt: skip

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


def run(arguments: Sequence[str]) -> int:
    """The command."""
    return _train(*parsed(parser("lpa train", "Train a model by LPA."), arguments))


# ---- options: YAML and presets set the parser's defaults, so that one parser checks everything -----------------------


def parser(command: str, text: str) -> Any:
    """The options of a run, for a command that takes them, in groups; those of `TrainingArguments` come last."""
    from transformers import HfArgumentParser

    from ..config import GROUPS, LPAConfig

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


def parsed(parser: Any, given: Sequence[str]) -> tuple[dict[str, Any], str]:
    """(the options by name, the command that the run was begun with).

    Of a preset, the YAML files and the command line, each goes over the one before.

    Raises:
        ValueError: a file or a setting in it is not as it should be.
        SystemExit: an option on the command line is not; or help was asked for.
    """
    if {"-h", "--help", "--help-all"} & set(given):
        parser.parse_args(given)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--output", "--model", "--preset"):
        first.add_argument(name)
    first.add_argument("--resume", nargs="?", const=True, default=False, type=lambda text: text.lower() != "false")
    look = first.parse_known_args(given)[0]
    settings: dict[str, Any] = {}
    command = shlex.join([*parser.prog.split(), *given])
    if look.resume:
        if not look.output:
            raise ValueError("--resume needs --output, the folder of the run to go on with")
        record = Path(look.output) / folder.SETTINGS
        if not record.is_file():
            raise ValueError(f"--resume: {look.output} holds no run (there is no {folder.SETTINGS})")
        settings = _settings(parser, record, of_a_run=True)
        command = folder.first_command(record) or command
    if look.config:
        settings |= _settings(parser, look.config)
    named = look.model or settings.get("model")
    preset = look.preset or ("none" if named or look.resume else "demo")
    parser.set_defaults(**PRESETS.get(preset, {}) | settings, preset=preset)
    values = _known(parser, given)
    if preset != "none":
        chosen = set(settings) | _on_the_line(parser, given)
        # nothing to merge (or to merge into), and no term that takes benign text; unless it was asked for all the same
        unused: dict[str, Any] = {"attack_merge_adapters": False} if not values["lora"] or _quantised(values) else {}
        unused |= {"benign": None} if not (values["kl_coef"] or values["sft_coef"]) else {}
        values |= {name: value for name, value in unused.items() if name not in chosen}
    return values, command


def _quantised(values: dict[str, Any]) -> bool:
    return bool(values["load_in_4bit"] or values["load_in_8bit"])


def _known(parser: Any, given: Sequence[str]) -> dict[str, Any]:
    from ..config import RENAMED

    values, unknown = parser.parse_known_args(given)
    if unknown:
        flag = unknown[0].partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if name in RENAMED:
            parser.error(f"{flag} is called --{RENAMED[name]} now")
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
    from ..config import RENAMED, read_yaml

    options = _options(parser)
    found = read_yaml(path, options, RENAMED if of_a_run else {})
    if odd := [name for name in _COMMAND_LINE_ONLY if name in found]:
        raise ValueError(f"{path} sets {odd[0]}, which belongs on the command line")
    return {name: _as_read(options[name], value, f"{path} sets {name}") for name, value in found.items()}


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


def _asked(values: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults, and those of the preset: what settings.yaml keeps."""
    defaults = vars(parser("lpa train", "").parse_args([]))
    of_preset = PRESETS[values["preset"]]
    return {k: getattr(v, "value", v) for k, v in values.items()
            if k not in _COMMAND_LINE_ONLY and v is not None
            and (v != defaults[k] or k in of_preset or k == "model")}  # fmt: skip


def _train(values: dict[str, Any], command: str) -> int:
    from accelerate.utils import broadcast_object_list

    from ..config import LPAConfig
    from ..data import PLAIN_PROMPT

    options = TrainOptions(**{name: values[name] for name in TrainOptions.__annotations__})
    output = folder.output_folder(options.output or values.get("output_dir"), options.model)
    folder.check_output(output, options.model, resume=options.resume, overwrite=options.overwrite)
    if options.quantized and not values["lora"]:
        raise ValueError(f"lora=False trains all weights, and those of a {options.quantized} model cannot be trained")
    own = {*TrainOptions.__annotations__, "config", "preset"}
    if options.benign == "own" and values["benign_system_prompt"] is None:
        values = values | {"benign_system_prompt": PLAIN_PROMPT}  # they are asked for as they are answered
    config = LPAConfig(**{k: v for k, v in values.items() if k not in own} | {"output_dir": str(output)})
    config.output_dir = broadcast_object_list([str(output)])[0]  # it may hold the time, which ranks read differently
    output = Path(config.output_dir)

    import torch
    from transformers.utils import logging as transformers_logging

    from ..data import load_pairs
    from ..data.loading import SHIPPED
    from ..evaluation.measure import table
    from ..files import write_json, write_text, writing
    from ..models import load
    from ..quantization import quantized_loading
    from ..training.card import model_card
    from ..training.prepare import OWN, benign_source, trained_share
    from ..training.trainer import LPATrainer

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()  # what it says is about a loop that here is only a part
    begun = time.time()
    pairs = load_pairs(kind=options.data) if options.data in SHIPPED else load_pairs(options.data)
    loading: dict[str, Any] = {
        "dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        "attn_implementation": options.attn_implementation,
        "trust_remote_code": options.trust_remote_code,
    }
    loading |= quantized_loading(
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        quant_type=options.bnb_4bit_quant_type,
        nested=options.use_bnb_nested_quant,
        dtype=loading["dtype"],
    )
    model, tokenizer = load(options.model, **loading)
    if options.benign == OWN and not (config.fsdp or getattr(model, "is_quantized", False)):
        model.to(config.device)
    benign = benign_source(options.benign, model, tokenizer, config)
    trainer = LPATrainer(model, config, pairs, tokenizer, benign_dataset=benign)
    main = trainer.is_world_process_zero()
    say = print if main else _silent
    if main and not options.resume:
        folder.clear(output)  # only now: what was wrong with the settings, the data or the model has been told
        folder.keep_settings(output, _asked(values), command)
    trainer.accelerator.wait_for_everyone()
    trained, total = trained_share(trainer.model)
    if values["preset"] != "none":
        say(f"preset {values['preset']}: " + ", ".join(f"{k} {v}" for k, v in PRESETS[values["preset"]].items()))
    say(
        f"{options.model}: {total / 1e6:.1f}M weights on {config.device}, {trained / 1e6:.1f}M of them trained; "
        f"{len(pairs)} pairs; {config.lpa_steps} LPA steps of {trainer.batch_size} pairs, {config.attack_steps} inner "
        f"steps and {config.defence_steps} updates each; output: {output}"
    )
    before = _before(trainer, options, output)
    checkpoint = trainer.last_checkpoint() if options.resume else None
    if options.resume:
        say(f"going on from {checkpoint or 'the beginning: there is no checkpoint yet'}")
    earlier = _seconds_before(checkpoint)
    with _stopping(trainer) as stopped_by:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        saved = trainer.checkpoint_folder(trainer.state.global_step) if trainer.state.global_step else None
        again = f"saved as {saved}; go on with: lpa train --resume --output {shlex.quote(str(output))}"
        say(f"stopped after {trainer.lpa_step} LPA steps; {again if saved else 'there was nothing to save'}")
        trainer.accelerator.end_training()
        return 128 + (stopped_by[0] if stopped_by else signal.SIGTERM)  # the signal may have been another rank's
    _save(trainer, options)
    after = _measure(trainer, options)
    record = _record(options, trainer, pairs, before, after, command) | {"seconds": earlier + time.time() - begun}
    trainer.accelerator.end_training()
    if not main:
        return 0
    with writing("the run's record", output, "the adapter and the checkpoints are there"):
        write_json(output / folder.METRICS, record)
        write_text(output / folder.CARD, model_card(record))
    if before:
        from rich.console import Console

        Console().print(table(before, after))
    say(f"done in {record['seconds']:.0f} s"
        + (f", {record['peak_memory_gb']:.2f} GB" if record["peak_memory_gb"] else "") + f"; {output}")  # fmt: skip
    return 0


def _before(trainer: Any, options: TrainOptions, output: Path) -> dict[str, float]:
    """The table's first column: measured, or in a resumed run as it was; filled in later where weights are sharded."""
    from transformers import TrainerCallback

    from ..training.ranks import from_main

    found: dict[str, float] = {}

    def fill() -> None:
        found.update(_measure(trainer, options))
        if trainer.is_world_process_zero():
            folder.keep_before(output, found, options.measure_attacked)

    class Measuring(TrainerCallback):
        """No device holds the model before training begins, and each then has a part of it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            fill()

    if not options.measure:
        return found
    if options.resume:
        kept = from_main(trainer.accelerator, lambda: folder.kept_before(output, options.measure_attacked))
        if kept is not None or trainer.is_fsdp_enabled:  # else the trained weights would be measured
            return kept or found
    if trainer.is_fsdp_enabled:
        trainer.add_callback(Measuring())
    else:
        fill()
    return found


def _measure(trainer: Any, options: TrainOptions) -> dict[str, float]:
    from ..evaluation.measure import measure

    if not options.measure:
        return {}
    return measure(
        trainer.model, trainer.processing_class, trainer.args, pgd=trainer.pgd, attacked_rows=options.measure_attacked
    )


def _silent(*_: Any) -> None:
    pass


def _seconds_before(checkpoint: Path | None) -> float:
    """How long the LPA steps took that a checkpoint brings along."""
    if checkpoint is None:
        return 0.0
    log = json.loads((checkpoint / folder.STATE).read_text(encoding="utf-8"))["log_history"]
    phases = ("seconds_attack", "seconds_defence", "seconds_other")
    return sum(entry[phase] for entry in log if "lpa_step" in entry for phase in phases)


@contextmanager
def _stopping(trainer: Any) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM save the last whole LPA step; a second one stops at once."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        trainer.request_stop()
        if trainer.is_world_process_zero():
            print("\nstopping: an attack is broken off, updates are finished, then the state is saved "
                  "(once more to stop at once)", file=sys.stderr)  # fmt: skip

    held = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    except KeyboardInterrupt:
        from ..training.checkpoint import checkpoints

        saved = checkpoints(Path(trainer.args.output_dir))
        print(f"\nthe last checkpoint: {saved[0] if saved else 'none'}", file=sys.stderr)
        raise
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _save(trainer: Any, options: TrainOptions) -> None:
    """The adapter (or, fully trained, the model with its tokenizer) into the output folder, as safetensors."""
    from ..files import staged, write_json, writing
    from ..training.ranks import agree

    model, output = trainer.accelerator.unwrap_model(trainer.model), Path(trainer.args.output_dir)
    state, error = trainer.trained_state(), None
    if trainer.is_world_process_zero():
        try:
            with writing("the trained model", output, "make room and --resume: its checkpoint is there"), \
                    staged(output) as part:  # fmt: skip
                model.save_pretrained(part, state_dict=state)
                if not hasattr(model, "peft_config"):
                    trainer.processing_class.save_pretrained(part)
                for file in part.glob(folder.ADAPTER):
                    # what the user called the model, since an asset's folder is a path of this machine
                    write_json(file, json.loads(file.read_text()) | {"base_model_name_or_path": options.model})
        except OSError as raised:
            error = raised
    agree(trainer.accelerator, error)


def _record(
    options: TrainOptions, trainer: Any, pairs: Any, before: dict[str, float], after: dict[str, float], command: str
) -> dict[str, Any]:
    """What metrics.json holds, without "seconds": this process's, and those of LPA steps before an interruption."""
    from ..environment import peak_memory_gb, versions
    from ..training.prepare import OWN

    benign = None
    if trainer.benign is not None:
        source = options.benign or "the shipped desirable statements"
        source = "its own answers to the shipped benign requests" if source == OWN else source
        benign = _data_record(source, trainer.benign, ("prompt", "response"))
    return {
        "model": options.model,
        "quantized": options.quantized,
        "command": command,
        "versions": versions(),
        "settings": trainer.args.own_settings,
        "sites": [site.name for site in trainer.pgd.sites],
        "data": _data_record(_shipped_or(options.data or "undesirable"), pairs, ("prompt", "rejected", "chosen")),
        "benign": benign,
        "device": str(trainer.args.device),
        "lpa_steps": trainer.lpa_step,
        "before": before,
        "after": after,
        "steps": [entry for entry in trainer.state.log_history if "lpa_step" in entry],
        "canaries": None if trainer.canaries is None else trainer.canaries.record(),
        "peak_memory_gb": peak_memory_gb(),
    }


def _shipped_or(source: str) -> str:
    """What a record calls the source of pairs."""
    from ..data.loading import SHIPPED

    if source not in SHIPPED:
        return source
    return f"the shipped {'undesirable and desirable' if source == 'both' else source} statements"


def _data_record(source: str, dataset: Any, columns: tuple[str, ...]) -> dict[str, Any]:
    from ..training.card import data_hash

    return {"source": source, "rows": len(dataset), "sha256": data_hash(dataset, columns)}
