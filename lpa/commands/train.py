"""`lpa train`: measure, train, measure again, and write the adapter with its record."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models import DEFAULT_MODEL

# What fits two CPU cores and a few minutes; for the embedded model alone.
DEMO = {
    "lpa_steps": 6,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "merge_adapters": True,
    "measure_attacked": 4,
}
_OURS = ("adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.json", "settings.yaml")


@dataclass
class TrainOptions:
    """What `lpa train` takes beside the fields of `LPAConfig`."""

    model: str = field(default=DEFAULT_MODEL, metadata={
        "help": "Asset, hub name or folder. For the default, a small model that needs no hub, "
                + ", ".join(f"{key} is {value}" for key, value in DEMO.items()) + "."})  # fmt: skip
    data: str | None = field(default=None, metadata={
        "help": "Pairs with columns prompt, rejected, chosen: .csv, .jsonl, a folder or a data set's name. By default "
                "the shipped undesirable statements."})  # fmt: skip
    benign: str | None = field(default=None, metadata={
        "help": "Benign examples with columns prompt, response, for sft_coef and kl_coef. By default the shipped "
                "desirable statements."})  # fmt: skip
    output: str | None = field(
        default=None, metadata={"help": "Folder for the result. By default runs/MODEL-DATE-TIME."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in the output folder."})
    resume: bool = field(default=False, metadata={
        "help": "Go on with the run in --output from its last checkpoint; its settings are the defaults."})  # fmt: skip
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ...; auto by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    measure: bool = field(default=True, metadata={"help": "Measure before and after, on held-out statements."})
    measure_attacked: int = field(default=12, metadata={
        "help": "How many of the 12 held-out statements of each kind are also measured under attack."})  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """The command."""
    given = [argument for argument in arguments if argument not in ("-h", "--help")]
    first = _first_look(given)
    from ..config import read_yaml

    parser = _parser()
    if len(given) < len(arguments):
        parser.print_help()
        return 0
    known = [action.dest for action in parser._actions if action.dest != "help"]
    settings: dict[str, Any] = {}
    if first.resume:
        if not first.output:
            raise ValueError("--resume needs --output, the folder of the run to go on with")
        record = Path(first.output) / "settings.yaml"
        if not record.is_file():
            raise ValueError(f"--resume: {first.output} holds no run (there is no settings.yaml)")
        settings |= read_yaml(record, known)
    if first.config:
        settings |= read_yaml(first.config, known)
    if (first.model or settings.get("model", DEFAULT_MODEL)) == DEFAULT_MODEL:
        settings = DEMO | settings
    parser.set_defaults(**settings)
    values, unknown = parser.parse_known_args(given)
    if unknown:
        from ..config import nearest

        flag = unknown[0].partition("=")[0]
        parser.error(f"unknown option {flag}{nearest(flag.lstrip('-'), known)}")
    return _train(vars(values), settings)


def _first_look(arguments: Sequence[str]) -> argparse.Namespace:
    """The few options that decide where the defaults of the others come from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--output", "--model"):
        parser.add_argument(name)
    parser.add_argument("--resume", nargs="?", const=True, default=False, type=lambda text: text.lower() != "false")
    return parser.parse_known_args(arguments)[0]


def _parser() -> Any:
    from transformers import HfArgumentParser

    from ..config import LPAConfig

    parser = HfArgumentParser(
        [TrainOptions, LPAConfig],
        prog="lpa train",
        usage="lpa train [OPTIONS]",
        description="Train a model by LPA. Every field of LPAConfig is an option; LPA's own come first.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of these options; those on the command line go first.")
    own = {"config", *TrainOptions.__annotations__, *LPAConfig.__annotations__}
    for group in parser._action_groups:
        group._group_actions.sort(key=lambda action: action.dest not in own)
    return parser


def _train(values: dict[str, Any], settings: dict[str, Any]) -> int:
    from ..config import LPAConfig

    options = TrainOptions(**{name: values[name] for name in TrainOptions.__annotations__})
    names = [f.name for f in dataclasses.fields(LPAConfig) if f.init]
    output = _output_folder(options, values)
    config = LPAConfig(**{name: values[name] for name in names} | {"output_dir": str(output)})
    _claim(output, options)

    import torch
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging as transformers_logging

    from ..card import write_json
    from ..data import load_benign, load_pairs
    from ..losses import BENIGN_TERMS
    from ..measure import table
    from ..models import load
    from ..prepare import trained_share
    from ..trainer import LPATrainer

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()  # what it says is about a loop that here is only a part
    begun = time.time()
    pairs = load_pairs(options.data)
    benign = load_benign(options.benign) if any(name in config.coefs for name in BENIGN_TERMS) else None
    model, tokenizer = load(
        options.model,
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    trainer = LPATrainer(model, config, pairs, tokenizer, benign_dataset=benign if options.benign else None)
    main = trainer.is_world_process_zero()
    say = print if main else _silent
    if main and not options.resume:
        _keep_settings(output, options, values)
    trained, total = trained_share(trainer.model)
    say(
        f"{options.model}: {total / 1e6:.1f}M weights on {config.device}, {trained / 1e6:.1f}M of them trained; "
        f"{len(pairs)} pairs; {config.lpa_steps} LPA steps of {trainer.batch_size} pairs, {config.steps} inner steps "
        f"and {config.defence_steps} updates each; output: {output}"
    )
    before = _measure(trainer, options)
    checkpoint = get_last_checkpoint(str(output)) if options.resume else None
    if options.resume:
        say(f"going on from {checkpoint or 'the beginning: there is no checkpoint yet'}")
    with _stopping(trainer) as stopped_by:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        saved = get_last_checkpoint(str(output))
        again = f"saved as {saved}; go on with: lpa train --resume --output {shlex.quote(str(output))}"
        say(f"stopped after {trainer.lpa_step} LPA steps; {again if saved else 'there was nothing to save'}")
        return 128 + stopped_by[0]
    after = _measure(trainer, options)
    trainer.accelerator.wait_for_everyone()
    _save(trainer, options)
    if not main:
        return 0
    record = _record(options, trainer, pairs, before, after, time.time() - begun)
    write_json(output / "metrics.json", record)
    from ..card import model_card

    (output / "README.md").write_text(model_card(record), encoding="utf-8")
    if before:
        from rich.console import Console

        Console().print(table(before, after))
    say(f"done in {record['seconds']:.0f} s"
        + (f", {record['peak_memory_gb']:.2f} GB" if record["peak_memory_gb"] else "") + f"; {output}")  # fmt: skip
    return 0


def _measure(trainer: Any, options: TrainOptions) -> dict[str, float]:
    from ..measure import measure

    if not options.measure:
        return {}
    return measure(
        trainer.model, trainer.processing_class, trainer.args, pgd=trainer.pgd, attacked_rows=options.measure_attacked
    )


def _silent(*_: Any) -> None:
    pass


def _output_folder(options: TrainOptions, values: dict[str, Any]) -> Path:
    chosen = options.output or values.get("output_dir")
    if chosen:
        return Path(chosen).expanduser()
    name = re.sub(r"[^\w.-]+", "-", Path(options.model).name) or "model"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _claim(output: Path, options: TrainOptions) -> None:
    """Make the output folder; an earlier run in it is only touched when told.

    Raises:
        ValueError: it is not empty.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; give a folder")
    if not options.resume and output.is_dir() and any(output.iterdir()):
        if not options.overwrite:
            raise ValueError(
                f"the output folder {output} is not empty; use --resume to go on with its run, --overwrite to replace "
                "it, or another --output"
            )
        for name in _OURS:
            (output / name).unlink(missing_ok=True)
        for folder in output.glob("checkpoint-*"):
            shutil.rmtree(folder)
    output.mkdir(parents=True, exist_ok=True)


def _keep_settings(output: Path, options: TrainOptions, values: dict[str, Any]) -> None:
    """settings.yaml: what this run was asked for, for `--resume` and `--config`."""
    import yaml

    defaults = vars(_parser().parse_args([]))
    leave = {"config", "output", "output_dir", "overwrite", "resume"}
    asked = {k: getattr(v, "value", v) for k, v in values.items() if k not in leave and v != defaults[k]}
    asked |= {"model": options.model}
    text = yaml.safe_dump(asked, sort_keys=True, allow_unicode=True)
    (output / "settings.yaml").write_text(text, encoding="utf-8")


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
        from transformers.trainer_utils import get_last_checkpoint

        saved = get_last_checkpoint(trainer.args.output_dir)
        print(f"\nthe last checkpoint: {saved or 'none'}", file=sys.stderr)
        raise
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _save(trainer: Any, options: TrainOptions) -> None:
    """The adapter (or, fully trained, the model with its tokenizer) into the output folder, as safetensors."""
    from ..card import write_json

    model, output = trainer.accelerator.unwrap_model(trainer.model), trainer.args.output_dir
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        model.save_pretrained(output, state_dict=state)
        if not hasattr(model, "peft_config"):
            trainer.processing_class.save_pretrained(output)
        for file in Path(output).glob("adapter_config.json"):
            # what the user called the model, since an asset's folder is a path of this machine
            write_json(file, json.loads(file.read_text()) | {"base_model_name_or_path": options.model})


def _record(
    options: TrainOptions, trainer: Any, pairs: Any, before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, Any]:
    from ..card import data_hash, peak_memory_gb, versions

    return {
        "model": options.model,
        "command": shlex.join(["lpa", *sys.argv[1:]]),
        "versions": versions(),
        "settings": {k: getattr(v, "value", v) for k, v in trainer.args.own_settings.items()},
        "sites": trainer.pgd.sites and [site.name for site in trainer.pgd.sites],
        "data": {
            "source": options.data or "the shipped undesirable statements",
            "rows": len(pairs),
            "sha256": data_hash(pairs, ("prompt", "rejected", "chosen")),
        },
        "device": str(trainer.args.device),
        "lpa_steps": trainer.lpa_step,
        "before": before,
        "after": after,
        "steps": [entry for entry in trainer.state.log_history if "lpa_step" in entry],
        "seconds": seconds,
        "peak_memory_gb": peak_memory_gb(),
    }
