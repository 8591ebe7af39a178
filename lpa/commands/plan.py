"""`lpa plan`: what a run of `lpa train` will need, from the model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import train

# flag -> (field of PlanShape, what it is)
LENGTHS = {
    "prompt_tokens": ("prompt", "Tokens of a prompt, with its template and system prompt."),
    "completion_tokens": ("completion", "Tokens of each completion."),
    "benign_prompt_tokens": ("benign_prompt", "Tokens of a benign prompt."),
    "benign_answer_tokens": ("benign_answer", "Tokens of its answer."),
}


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from ..plan.shapes import PlanShape

    parser = train.parser("lpa plan", "Tell memory and work of a run of lpa train, which takes the same options.")
    for flag, (name, text) in LENGTHS.items():
        parser.add_argument(f"--{flag}", type=int, default=getattr(PlanShape, name), help=text)
    parser.add_argument("--ranks", type=int, default=1, help="Ranks that run it, by DDP or with --fsdp by FSDP2; batch "
                        "sizes are each rank's, as for lpa train.")  # fmt: skip
    values, _ = train.parsed(parser, arguments)
    shape = PlanShape(**{name: values.pop(flag) for flag, (name, _) in LENGTHS.items()})
    return _plan(values, shape, values.pop("ranks"))


def _plan(values: dict[str, Any], shape: Any, ranks: int) -> int:
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    from ..config import LPAConfig
    from ..models import ModelError, resolve
    from ..plan import estimate
    from ..plan.table import ASSUMPTIONS, as_text

    transformers_logging.set_verbosity_error()
    options = train.TrainOptions(**{name: values[name] for name in train.TrainOptions.__annotations__})
    own = {*train.TrainOptions.__annotations__, "config", "preset", "output_dir"}
    args = LPAConfig("plan", **{name: value for name, value in values.items() if name not in own})
    try:
        config = AutoConfig.from_pretrained(resolve(options.model), trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the configuration of {options.model!r} cannot be read ({error}); give a folder, a hub name or an asset"
        ) from error
    dtype, quantized = planned_dtype(options)
    found = estimate(
        config,
        args,
        shape,
        dtype=dtype,
        attn_implementation=options.attn_implementation,
        quantized=quantized,
        trust_remote_code=options.trust_remote_code,
        ranks=ranks,
    )
    by = f" on each of {ranks} ranks ({'FSDP2' if args.fsdp else 'DDP'})" if ranks > 1 else ""
    print(
        f"{options.model}: {args.lpa_steps} LPA steps of {args.gradient_accumulation_steps} x "
        f"{args.per_device_train_batch_size} pairs{by}, {args.attack_steps} inner steps and {args.defence_steps} "
        f"updates each; prompts of {shape.prompt} tokens, completions of {shape.completion}\n"
    )
    print(as_text(found))
    print(f"\n{ASSUMPTIONS}")
    return 0


def planned_dtype(options: Any) -> tuple[Any, str | None]:
    """(dtype of the weights or None for the configuration's, kind of quantisation) that the options ask for."""
    import torch

    from ..plan.shapes import EIGHT_BIT, FOUR_BIT, FOUR_BIT_NESTED

    kind = EIGHT_BIT if options.load_in_8bit else None
    if options.load_in_4bit:
        kind = FOUR_BIT_NESTED if options.use_bnb_nested_quant else FOUR_BIT
    if options.dtype != "auto":
        return getattr(torch, options.dtype), kind
    return (torch.bfloat16 if kind else None), kind
