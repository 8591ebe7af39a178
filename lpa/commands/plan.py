"""`lpa plan`: what a run of `lpa train` will need, from the model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .options import TrainOptions, parsed, parser

# flag -> (field of PlanShape, what it is); by default as long as the longest of the data that are named
LENGTHS = {
    "prompt_tokens": ("prompt", "Tokens of a prompt, with its template and system prompt."),
    "completion_tokens": ("completion", "Tokens of each completion."),
    "benign_prompt_tokens": ("benign_prompt", "Tokens of a benign prompt."),
    "benign_answer_tokens": ("benign_answer", "Tokens of its answer."),
}
PHASES = {"weights": "loaded", "attack": "in the attack", "defence": "in an update"}
ASSUMPTIONS = """\
Assumed: every row is as long as said; one pass for both completions where attention is eager or sdpa; fused attention
for sdpa; the plain PyTorch ops (those for GPUs keep fewer copies of the logits); no part of the model run once for all
inner steps; AdamW.
Of the packed engine, or of the reference one where that is asked for; a frozen stack ("auto" takes one on a CPU where
it can) keeps less in the attack.
Of one rank; FSDP2's units are those that accelerate makes, and a block's weights come while another one is in use.
Not in it: what NCCL or gloo keep for themselves; what Python, libraries and a GPU's driver take; what an allocator
keeps beyond the tensors (with glibc's defaults much, docs/scale.md); loading; canaries; evaluations; measuring before
and after.
No GPU was measured."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from ..memory import PlanShape

    found = parser("lpa plan", "Tell memory and work of a run of lpa train, which takes the same options.")
    for flag, (name, text) in LENGTHS.items():
        text += f" By default those of the longest row of --data or --benign, else {getattr(PlanShape, name)}."
        found.add_argument(f"--{flag}", type=int, help=text)
    found.add_argument("--ranks", type=int, default=1, help="Ranks that run it, by DDP or with --fsdp by FSDP2; batch "
                        "sizes are each rank's, as for lpa train.")  # fmt: skip
    values, _ = parsed(found, arguments)
    given = {flag: tokens for flag in LENGTHS if (tokens := values.pop(flag)) is not None}
    for flag, tokens in given.items():
        if tokens < 1:
            raise ValueError(f"--{flag} {tokens} must be at least 1")
    return _plan(values, {LENGTHS[flag][0]: tokens for flag, tokens in given.items()}, values.pop("ranks"))


def _plan(values: dict[str, Any], lengths: dict[str, int], ranks: int) -> int:
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    from ..config import LPAConfig
    from ..memory import PlanShape, estimate
    from ..models import ModelError, adapter_base, resolve

    transformers_logging.set_verbosity_error()
    options = TrainOptions(**{name: values[name] for name in TrainOptions.__annotations__})
    own = {*TrainOptions.__annotations__, "config", "preset", "output_dir"}
    args = LPAConfig("plan", **{name: value for name, value in values.items() if name not in own})
    try:
        base = adapter_base(options.model) or options.model
        config = AutoConfig.from_pretrained(resolve(base), trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the configuration of {options.model!r} cannot be read ({error}); give a folder, a hub name or an asset"
        ) from error
    shape = PlanShape(**_longest(options, args, resolve(base)) | lengths)
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
        f"{args.per_device_train_batch_size} pairs{by}, {args.inner_steps} inner steps and {args.defence_steps} "
        f"updates each; prompts of {shape.prompt} tokens, completions of {shape.completion}\n"
    )
    print(as_text(found))
    print(f"\n{ASSUMPTIONS}")
    return 0


def _longest(options: TrainOptions, args: Any, base: str) -> dict[str, int]:
    """The most tokens of prompts and completions in the run's data; nothing where neither data nor their system prompt
    is named, which takes the tokenizer of the model `base`.

    Raises:
        ValueError: data that cannot be read or that no term takes, or there is no tokenizer.
    """
    from transformers import AutoTokenizer

    from ..data import PLAIN_PROMPT, benign_requests, encode_benign, encode_pairs, load_benign, load_pairs
    from ..training.prepare import OWN, OWN_TOKENS, check_benign

    if not (options.data or options.benign) and args.system_prompt == type(args).system_prompt:
        return {}
    check_benign(args, options.benign)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=options.trust_remote_code)
    chat = {"max_length": args.max_length, **args.chat_options}
    pairs = encode_pairs(load_pairs(options.data), tokenizer, system_prompt=args.system_prompt or None, **chat)
    found = {"prompt": _most(pairs, "prompt"), "completion": max(_most(pairs, "rejected"), _most(pairs, "chosen"))}
    if not {"sft", "kl"} & set(args.coefs):
        return found
    own, system = options.benign == OWN, args.benign_system_prompt
    if system is None:
        system = PLAIN_PROMPT if own else None if options.benign else args.system_prompt
    rows = load_benign([{"prompt": text, "response": "-"} for text in benign_requests()] if own else options.benign)
    benign = encode_benign(rows, tokenizer, system_prompt=system or None, eos=args.benign_eos, **chat)
    answer = OWN_TOKENS + args.benign_eos if own else _most(benign, "response")
    return found | {"benign_prompt": _most(benign, "prompt"), "benign_answer": answer}


def _most(rows: Any, part: str) -> int:
    return max(map(len, rows[f"{part}_tokens"]))


def planned_dtype(options: Any) -> tuple[Any, str | None]:
    """(dtype of the weights or None for the configuration's, kind of quantisation) that the options ask for."""
    import torch

    from ..memory import EIGHT_BIT, FOUR_BIT, FOUR_BIT_NESTED

    kind = EIGHT_BIT if options.load_in_8bit else None
    if options.load_in_4bit:
        kind = FOUR_BIT_NESTED if options.use_bnb_nested_quant else FOUR_BIT
    if options.dtype != "auto":
        return getattr(torch, options.dtype), kind
    return (torch.bfloat16 if kind else None), kind


def as_text(found: Any) -> str:
    """An `Estimate` for a terminal: memory by part and phase, and the work."""
    from ..memory import PARTS

    phases = list(found.phases.values())
    rows = [(part, [phase[part] for phase in phases]) for part in PARTS if any(phase[part] for phase in phases)]
    rows.append(("all", [phase.total() for phase in phases]))
    lines = [f"{'GB (10^9 bytes)':16}" + "".join(f"{PHASES[name]:>15}" for name in found.phases)]
    lines += [f"{part:16}" + "".join(f"{gigabytes(size):>15}" for size in sizes) for part, sizes in rows]
    total = found.attack_flops + found.defence_flops
    share = found.attack_flops / total if total else 0.0
    lines += [
        "",
        f"expected peak: {gigabytes(found.peak.total())} GB, {PHASES[found.peak_phase]}",
        f"floating-point work: {total:.2e} operations, {share:.0%} of them in attacks",
        f"weights: {found.total / 1e6:,.1f}M, trained: {found.trained / 1e6:,.1f}M; "
        f"a pass: {found.rows} rows, {found.tokens} tokens",
    ]
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    """GB (10^9 bytes) with three digits after the point below 10, else one.

    >>> gigabytes(21_300_000_000)
    '21.3'
    """
    return f"{size / 1e9:.3f}" if size < 1e10 else f"{size / 1e9:.1f}"
