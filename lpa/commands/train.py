"""`lpa train`: measure, train, measure again, and write the adapter with its record."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .. import run_folder as folder
from ..presets import PRESETS
from . import Progress, quiet_loading
from .options import TrainOptions, asked, parsed, parser


def run(arguments: Sequence[str]) -> int:
    """The command."""
    with ExitStack() as until:
        return _train(*parsed(parser("lpa train", "Train a model by LPA."), arguments), until)


def _train(values: dict[str, Any], commands: list[str], until: ExitStack) -> int:
    from accelerate.utils import broadcast_object_list

    from ..config import LPAConfig
    from ..data import PLAIN_PROMPT, system_prompt_text

    options = TrainOptions(**{name: values[name] for name in TrainOptions.__annotations__})
    output = folder.output_folder(options.output or values.get("output_dir"), options.model)
    folder.check_output(output, options.model, resume=options.resume, overwrite=options.overwrite)
    if options.quantized and not values["lora"]:
        raise ValueError(f"lora=False trains all weights, and those of a {options.quantized} model cannot be trained")
    own = {*TrainOptions.__annotations__, "config", "preset"}
    if options.benign == "own" and values["benign_system_prompt"] is None:
        values = values | {"benign_system_prompt": PLAIN_PROMPT}  # they are asked for as they are answered
    preset = {name: values[name] for name in PRESETS[values["preset"]] if values[name] is not None}
    for name in ("system_prompt", "benign_system_prompt"):
        values[name] = system_prompt_text(values[name])  # settings.yaml keeps the text: a file may change
    config = LPAConfig(**{k: v for k, v in values.items() if k not in own} | {"output_dir": str(output)})
    config.output_dir = broadcast_object_list([str(output)])[0]  # it may hold the time, which ranks read differently
    output = Path(config.output_dir)

    import torch
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from ..data import load_benign, load_pairs
    from ..evaluation.measure import table
    from ..files import write_json, write_text, writing
    from ..models import adapter_base, load
    from ..quantization import quantized_loading
    from ..training.card import model_card
    from ..training.prepare import OWN, benign_source, check_before_loading, fix_date, trained_share
    from ..training.ranks import from_main
    from ..training.resuming import check_resumed
    from ..training.trainer import LPATrainer

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()  # its advice is on a training loop that LPA replaces
    quiet_loading()
    begun = time.time()
    main = config.process_index == 0
    say = print if main else _silent
    if preset:
        say(f"preset {values['preset']}: " + ", ".join(f"{name} {value}" for name, value in preset.items()))
    pairs = load_pairs(options.data)
    check_before_loading(config, options.model, options.benign, options.trust_remote_code)
    benign = options.benign if options.benign in (None, OWN) else load_benign(options.benign)
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
    fix_date(tokenizer, config, new=not options.resume)
    say(f"{options.model}: {trained_share(model)[1] / 1e6:.1f}M weights on {config.device}", flush=True)
    with Progress(Console()) if main else nullcontext(_silent) as tick:
        benign = benign_source(benign, model, tokenizer, config, tick)
    trainer = LPATrainer(model, config, pairs, tokenizer, benign_dataset=benign)
    from_main(trainer.accelerator, lambda: until.enter_context(folder.held(output)))
    checkpoint = trainer.last_checkpoint() if options.resume else None
    if checkpoint is not None:
        from_main(trainer.accelerator, lambda: check_resumed(checkpoint, trainer.kept_settings()))
    elif options.resume:
        from_main(trainer.accelerator, lambda: folder.check_resumable(output))
    if main:  # only now: settings, data and model have been checked
        if not options.resume:
            folder.clear(output)
        folder.keep_settings(output, asked(values | {"chat_template_date": config.chat_template_date}), commands)
    trainer.accelerator.wait_for_everyone()
    say(
        f"{trained_share(trainer.model)[0] / 1e6:.1f}M weights are trained; {len(pairs)} pairs; {config.lpa_steps} LPA "
        f"steps of {trainer.batch_size} pairs, {config.inner_steps} inner steps and {config.defence_steps} updates "
        f"each; output: {output}",
        flush=True,
    )
    before = _before(trainer, options, output)
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
    base = adapter_base(options.model)
    _save(trainer)
    after = _measure(trainer, options, "after")
    record = _record(options, trainer, pairs, before, after) | {
        "model": base or options.model,
        "adapter": options.model if base else None,
        "command": commands[0],
        "resumed": commands[1:],
        "seconds": earlier + time.time() - begun,
    }
    trainer.accelerator.end_training()
    if not main:
        return 0
    with writing("the run's record", output, "the adapter and the checkpoints are there"):
        write_json(output / folder.METRICS, record)
        write_text(output / folder.CARD, model_card(record))
    if before:
        Console().print(table(before, after))
    say(f"done in {record['seconds']:.0f} s"
        + (f", {record['peak_memory_gb']:.2f} GB" if record["peak_memory_gb"] else "") + f"; {output}")  # fmt: skip
    return 0


def _before(trainer: Any, options: TrainOptions, output: Path) -> dict[str, float]:
    """The table's first column. A resumed run takes the kept one; where weights are sharded, it is filled in later."""
    from transformers import TrainerCallback

    from ..training.ranks import from_main

    found: dict[str, float] = {}

    def fill() -> None:
        found.update(_measure(trainer, options, "before"))
        if trainer.is_world_process_zero():
            folder.keep_before(output, found, options.measure_attacked)

    class Measuring(TrainerCallback):
        """Measures once training has begun and each device has its part of the model; before that none has it."""

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


def _measure(trainer: Any, options: TrainOptions, when: str) -> dict[str, float]:
    from ..evaluation.measure import measure

    if not options.measure:
        return {}
    if trainer.is_world_process_zero():
        print(f"measuring {when} training ...", flush=True)
    return measure(
        trainer.model, trainer.processing_class, trainer.args, pgd=trainer.pgd, attacked_rows=options.measure_attacked,
        trained_on=trainer.train_dataset["prompt"],
    )  # fmt: skip


def _silent(*_: Any, **__: Any) -> None:
    pass


def _seconds_before(checkpoint: Path | None) -> float:
    """Seconds that the LPA steps in a checkpoint took."""
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
        saved = folder.checkpoint_folders(Path(trainer.args.output_dir))
        print(f"\nthe last checkpoint: {saved[0] if saved else 'none'}", file=sys.stderr)
        raise
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _save(trainer: Any) -> None:
    """The adapter (or, fully trained, the model with its tokenizer) into the output folder, as safetensors."""
    from ..files import staged, writing
    from ..models import name_base
    from ..training.ranks import agree

    model, output = trainer.accelerator.unwrap_model(trainer.model), Path(trainer.args.output_dir)
    state, error = trainer.trained_state(), None  # type: tuple[Any, Exception | None]
    if trainer.is_world_process_zero():
        try:
            with writing("the trained model", output, "make room and --resume: its checkpoint is there"), \
                    staged(output) as part:  # fmt: skip
                model.save_pretrained(part, state_dict=state)
                if not hasattr(model, "peft_config"):
                    trainer.processing_class.save_pretrained(part)
                name_base(part)
        except Exception as raised:  # of any kind: the other ranks must learn of it
            error = raised
    agree(trainer.accelerator, error)


def _record(
    options: TrainOptions, trainer: Any, pairs: Any, before: dict[str, float], after: dict[str, float]
) -> dict[str, Any]:
    """What metrics.json holds of the trainer and its data."""
    from ..environment import peak_memory_gb, versions
    from ..training.prepare import OWN

    benign = None
    if trainer.benign is not None:
        source = options.benign or "the shipped desirable statements"
        source = "its own answers to the shipped benign requests" if source == OWN else source
        benign = _data_record(source, trainer.benign, ("prompt", "response"))
    return {
        "quantized": options.quantized,
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
    from ..data import SHIPPED

    if source not in SHIPPED:
        return source
    return f"the shipped {'undesirable and desirable' if source == 'both' else source} statements"


def _data_record(source: str, dataset: Any, columns: tuple[str, ...]) -> dict[str, Any]:
    from ..training.resuming import data_hash

    return {"source": source, "rows": len(dataset), "sha256": data_hash(dataset, columns)}
