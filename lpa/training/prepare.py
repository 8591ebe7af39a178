"""What a run needs before its first step: the model with its adapters, and its data as tokens."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from lpa_kernels.attack import left_in_base

from ..config import BENIGN_TERMS, LORA_TARGETS, LPAConfig
from ..data import (
    PLAIN_PROMPT,
    BenignCollator,
    PairCollator,
    benign_requests,
    encode_benign,
    encode_pairs,
    load_benign,
    load_pairs,
    rendering,
)
from ..data.collate import BENIGN_TOKENS
from ..data.templates import PAIR_TOKENS
from ..evaluation.directions import check_direction
from ..models import check_head, check_sites, context_length, made_once, outline
from ..quantization import is_quantized
from .canaries import watched
from .resuming import kept_setting

logger = logging.getLogger(__name__)

OWN = "own"  # the benign data set that is the model's own answers
OWN_TOKENS = 32  # of such an answer, at most


def check_model(model: Any, config: LPAConfig) -> None:
    """Refuse a model that cannot be trained here, before anything is made of it.

    Raises:
        ValueError: no LM head, weights on no device, or Liger's kernels without a GPU.
    """
    check_head(model)
    away = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if away:
        raise ValueError(
            f"{len(away)} of the model's weights are offloaded or were never loaded (such as {away[0]}, on the meta "
            "device); load all of it onto devices, smaller with load_in_4bit=True or shared among ranks with fsdp=True"
        )
    if config.use_liger_kernel and config.device.type == "cpu":
        raise ValueError("use_liger_kernel=True needs a GPU, and this run is on the CPU; leave it out")


def add_adapters(model: Any, config: LPAConfig, peft_config: Any = None) -> Any:
    """The model to train: with LoRA of the config, with any `peft_config`, as it is (adapters there), or in full.

    Raises:
        ValueError: a `peft_config` or settings of LoRA for a model that has adapters already, adapters that are not to
            be trained or could not be loaded again, LoRA targets that the model has not, or attack_merge_adapters on a
            quantised model.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.attack_merge_adapters and is_quantized(model):
        raise ValueError(
            "attack_merge_adapters=True, but the model is quantised, and merging would round the adapters away; "
            "use attack_merge_adapters=False"
        )
    for adapter in model.peft_config.values() if isinstance(model, PeftModel) else [peft_config]:
        if start := made_once(adapter):
            raise ValueError(
                f"adapters with {start} cannot be trained here: peft makes another start when it loads what was saved, "
                "so neither a resumed run nor the saved adapter would be this one; use init_lora_weights='pissa'"
            )
    if isinstance(model, PeftModel):
        _check_adapters(model, config, peft_config)
        return model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "transformers has put an adapter into the model, and new ones would take its place; give LPATrainer the "
            "adapter's folder, or PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )
    if peft_config is None:
        if not config.lora:
            return model
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type, unused-ignore]
            lora_dropout=config.lora_dropout,
            target_modules=_targets(model, config.lora_targets),
        )
    return get_peft_model(model, peft_config)


def _check_adapters(model: Any, config: LPAConfig, peft_config: Any) -> None:
    """Refuse what a model with adapters in it cannot be given."""
    if peft_config is not None:
        raise ValueError("the model has adapters already; give either those or a peft_config")
    if not config.lora:
        raise ValueError("lora=False trains all weights, and the model has adapters; give the model without them")
    if not trained_share(model)[0]:
        raise ValueError(
            "the model's adapters are not to be trained; load them with PeftModel.from_pretrained(model, folder, "
            "is_trainable=True), or give LPATrainer the folder"
        )
    held = model.peft_config[model.active_adapters[0]]
    for name, own in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        wanted, has = getattr(config, name), getattr(held, own, None)
        if wanted not in (has, LPAConfig.__dataclass_fields__[name].default):
            raise ValueError(f"{name}={wanted} is of new adapters, and those of the model have {has}; leave it out")
    logger.warning("training goes on with the model's adapters; the settings lora_* are of new ones")


def check_base(model: Any, config: LPAConfig, term: str) -> None:
    """Refuse a model that is not the base model with its adapters off.

    Raises:
        ValueError: it has no adapters, or one that leaves something in the base model when it is off.
    """
    needed = f"{term}={getattr(config, term)} needs the base model, and "
    if not hasattr(model, "disable_adapter"):
        raise ValueError(f"{needed}without adapters there is none; give ref_model, train adapters, or set {term} to 0")
    if left := left_in_base(model):
        raise ValueError(
            f"{needed}adapters with {left.setting} change it: {left.adapter!r} {left.what}; give ref_model, "
            f"use {left.instead}, or set {term} to 0"
        )


def _targets(model: Any, wanted: Sequence[str]) -> str | list[str]:
    if list(wanted) == ["all-linear"]:
        return "all-linear"
    have = [f".{name}" for name, _ in model.named_modules()]
    if absent := [name for name in wanted if not any(path.endswith(f".{name}") for path in have)]:
        if tuple(wanted) != LORA_TARGETS:
            raise ValueError(
                f"lora_targets={list(wanted)}: {type(model).__name__} has no modules {', '.join(absent)}; use names of "
                "its linear modules, or 'all-linear'"
            )
        # half of the blocks' weights without an adapter would be another method, so all of them get one
        logger.warning("%s has no modules %s; every linear layer gets an adapter", type(model).__name__, absent)
        return "all-linear"
    return list(wanted)


def trained_share(model: Any) -> tuple[int, int]:
    """(weights that are trained, all weights)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)


def _limit(model: Any, config: LPAConfig) -> int | None:
    """The longest row in tokens.

    Raises:
        ValueError: max_length is above the model's context.
    """
    context = context_length(model)
    if context is not None and config.max_length is not None and config.max_length > context:
        raise ValueError(f"max_length={config.max_length} is above the model's context of {context} tokens")
    return config.max_length or context


Prepared = tuple[Any, Callable[..., Any], list[int]]  # a data set, its collator, and the length of each row in tokens


def pairs_as_tokens(
    dataset: Any, model: Any, tokenizer: Any, config: LPAConfig, collator: Callable[..., Any] | None
) -> Prepared:
    """Pairs, encoded unless a user's own collator is given, which gets the data set as it is.

    Raises:
        ValueError: no rows, no tokenizer, missing columns, or a row longer than the context.
    """
    if collator is None:
        if tokenizer is None:
            raise ValueError("give processing_class (a tokenizer), or a data_collator that needs none")
        dataset = encode_pairs(
            load_pairs(dataset), tokenizer, system_prompt=config.system_prompt or None,
            max_length=_limit(model, config), **config.chat_options,
        )  # fmt: skip
        collator = PairCollator(tokenizer, attack_on=config.attack_on)
    empty = "the data set of pairs is empty; give at least one row"
    return dataset, collator, _checked_lengths(dataset, PAIR_TOKENS, model, empty)


def benign_as_tokens(
    dataset: Any, model: Any, tokenizer: Any, config: LPAConfig, collator: Callable[..., Any] | None
) -> Prepared:
    """The same for benign examples (columns prompt and response)."""
    if collator is None:
        if tokenizer is None:
            raise ValueError("give processing_class (a tokenizer), or a benign_collator that needs none")
        system = config.benign_system_prompt
        if system is None and dataset is None:
            system = config.system_prompt
        dataset = encode_benign(
            load_benign(dataset), tokenizer, system_prompt=system or None, max_length=_limit(model, config),
            eos=config.benign_eos, **config.chat_options,
        )  # fmt: skip
        collator = BenignCollator(tokenizer)
    empty = "the benign data set is empty; give at least one row, or set sft_coef and kl_coef to 0"
    return dataset, collator, _checked_lengths(dataset, BENIGN_TOKENS, model, empty)


def _checked_lengths(dataset: Any, columns: Sequence[str], model: Any, empty: str) -> list[int]:
    """Tokens of each row: its prompt (the first column) and its longest completion; 0 where the rows hold no tokens.

    Raises:
        ValueError: no rows, with the message `empty`, or a token without an embedding. (The model may have more
            embeddings than the tokenizer has tokens.)
    """
    if dataset is None or len(dataset) == 0:
        raise ValueError(empty)
    if not set(columns) <= set(getattr(dataset, "column_names", ())):
        return [0] * len(dataset)
    prompts, *completions = (dataset[name] for name in columns)
    largest = max(max(tokens, default=0) for texts in (prompts, *completions) for tokens in texts)
    have = model.get_input_embeddings().weight.shape[0]
    if largest >= have:
        raise ValueError(
            f"the tokenizer gives token {largest} and the model has embeddings for {have}; use the model's own "
            "tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        )
    return [len(prompt) + max(map(len, texts)) for prompt, *texts in zip(prompts, *completions, strict=True)]


def check_before_loading(config: LPAConfig, model: str, benign: Any, trust_remote_code: bool = False) -> None:
    """Refuse what can be seen to be wrong without the model's weights.

    Raises:
        ValueError: benign data that no term takes, a set or a direction that cannot be read, or sites, LoRA targets or
            a max_length that the model does not have.
    """
    check_benign(config, benign)
    check_direction(config)
    if config.canary_steps:
        watched(config)
    targets = config.lora and config.lora_targets != list(LORA_TARGETS)
    if not (config.attack_sites or config.max_length or targets):
        return
    if (shape := outline(model, trust_remote_code)) is not None:
        check_sites(shape, config.attack_sites or ())
        _limit(shape, config)
        if targets:
            _targets(shape, config.lora_targets)


def check_benign(config: LPAConfig, benign: Any) -> None:
    """Refuse benign data that no term of the loss takes.

    Raises:
        ValueError: there is such data.
    """
    if benign is not None and not any(name in config.coefs for name in BENIGN_TERMS):
        raise ValueError("the benign data set is not used: sft_coef and kl_coef are 0; give one of them a weight")


def benign_source(
    given: Any, model: Any, tokenizer: Any, config: LPAConfig, tick: Callable[[str, int, int], None] | None = None
) -> Any:
    """The benign data set for `LPATrainer`: for `OWN` the model's own answers under the config's benign system prompt,
    made where the model lies; anything else as it is given. tick: called with (what, done, total).

    Raises:
        ValueError: `OWN`, and the config leaves the benign system prompt open; the trainer would then ask under none.
    """
    if not isinstance(given, str) or given != OWN:
        return given
    if config.benign_system_prompt is None:
        raise ValueError(f"benign={OWN!r} needs benign_system_prompt: what the model is asked under; '' for none")
    return own_answers(
        model, tokenizer, system_prompt=config.benign_system_prompt or None, tick=tick, **config.chat_options
    )


def fix_date(tokenizer: Any, config: LPAConfig, *, new: bool = False) -> None:
    """Set the config's date where the chat template prints one, so that the run has one and its record says which: that
    of the checkpoints in its output folder, else today's.

    Args:
        new: the run begins anew, whatever its folder holds.
    """
    if config.chat_template_date is None and rendering.prints_date(tokenizer):
        kept = None if new else kept_setting(Path(str(config.output_dir)), "chat_template_date")
        config.chat_template_date = broadcast_object_list([kept or rendering.today()])[0]  # rank 0's


def own_answers(
    model: Any,
    tokenizer: Any,
    *,
    system_prompt: str | None = PLAIN_PROMPT,
    tick: Callable[[str, int, int], None] | None = None,
    **chat: Any,
) -> list[dict[str, str]]:
    """The model's own greedy answers to the shipped benign requests, rows of prompt and response: what a kl term holds
    it to. Made where the model lies; requests that get an empty answer are left out.

    Args:
        system_prompt: of the conversations; the trainer's benign_system_prompt must be the same.
        tick: called with (what, done, total).
        chat: as in `ChatEncoder`.
    """
    from ..evaluation.bench import Bench, batches, quiet_generation

    bench = Bench(model, tokenizer, system_prompt=system_prompt, max_new_tokens=OWN_TOKENS, **chat)
    rows = []
    with quiet_generation():
        for number, prompts in enumerate(batches(requests := benign_requests(), bench.batch_size)):
            if tick is not None:
                tick("the model answers benign requests:", number * bench.batch_size, len(requests))
            texts = bench.answers([bench.prompt_tokens(prompt) for prompt in prompts])
            rows += [{"prompt": p, "response": text} for p, text in zip(prompts, texts, strict=True) if text]
    return rows


def warn_if_small(rows: int, batch: int) -> None:
    """Warn where a batch holds some rows more than once."""
    if rows < batch:
        warnings.warn(
            f"the data set has {rows} row{'s' * (rows > 1)} and a batch {batch}: each batch holds rows more than once",
            stacklevel=3,
        )
