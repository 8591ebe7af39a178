"""Models whose head or embedding is tied, resized or padded, and tokenizers without padding, BOS or EOS, end to end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa import LPATrainer, models
from lpa.evaluation.measure import measure
from lpa.quantization import is_quantized
from lpa_kernels.model.head import plain_head
from tests.support.tiny import rows, tiny_config, tiny_model
from tests.support.trainers import TOKENIZER, logged, weights


def without(*names: str) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    for name in names:
        setattr(tokenizer, f"{name}_token", None)
    return tokenizer


def resized(to: int, **settings: Any) -> Any:
    model = tiny_model(len(TOKENIZER) - 7, **settings)
    model.resize_token_embeddings(to, mean_resizing=False)
    return model


def with_bos() -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.chat_template = "{{ bos_token }} " + tokenizer.chat_template
    return tokenizer


MODELS: dict[str, tuple[Any, Any]] = {
    "tied": (lambda: tiny_model(len(TOKENIZER), tie_word_embeddings=True), lambda: TOKENIZER),
    "padded": (lambda: tiny_model(-(-len(TOKENIZER) // 128) * 128), without),
    "padded and tied": (lambda: tiny_model(len(TOKENIZER) + 61, tie_word_embeddings=True), without),
    "resized": (lambda: resized(len(TOKENIZER)), lambda: TOKENIZER),
    "resized, padded and tied": (lambda: resized(len(TOKENIZER) + 9, tie_word_embeddings=True), without),
    "no padding token": (lambda: tiny_model(len(TOKENIZER)), lambda: without("pad")),
    "no padding, BOS or EOS": (lambda: tiny_model(len(TOKENIZER)), lambda: without("pad", "bos", "eos")),
    "a BOS added later": (lambda: tiny_model(len(TOKENIZER) + 1), with_bos),
}


@pytest.mark.parametrize("engine", ["packed", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_end_to_end(tmp_path: Path, name: str, engine: str) -> None:
    model, tokenizer = (make() for make in MODELS[name])
    tied = model.config.tie_word_embeddings
    before = model.get_input_embeddings().weight.clone()
    assert plain_head(model)
    config = tiny_config(
        tmp_path, attack_engine=engine, lpa_steps=1, defence_steps=1, attack_steps=2, lora_targets="all-linear"
    )
    trainer = LPATrainer(model, config, rows(4), tokenizer)
    start = weights(trainer)
    trainer.train()
    assert all(not torch.equal(start[n], w) for n, w in weights(trainer).items() if "lora_B" in n)
    entry = logged(trainer)[0]
    assert entry["attack_toward_last"] < entry["attack_toward_first"]
    base = trainer.model.get_base_model()
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) == tied
    if engine == "packed":
        found = measure(trainer.model, tokenizer, config, pgd=trainer.pgd, attacked_rows=2)
        assert found["disagree_undesirable_attacked_margin"] < found["disagree_undesirable_margin"]


def test_both_engines_agree_on_a_padded_tied_head(tmp_path: Path) -> None:
    runs = []
    for engine in ("packed", "reference"):
        model = resized(len(TOKENIZER) + 9, tie_word_embeddings=True)
        trainer = LPATrainer(model, tiny_config(tmp_path, attack_engine=engine, lpa_steps=1), rows(4), without("pad"))
        trainer.train()
        runs.append(weights(trainer))
    for name, value in runs[0].items():
        assert torch.allclose(value, runs[1][name], atol=1e-4), name


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives token \d+ and the model has embeddings for \d+; use the model's own"):
        LPATrainer(tiny_model(len(TOKENIZER) - 40), tiny_config(tmp_path), rows(8), TOKENIZER)


def test_a_padded_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER) + 61, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    without("pad").save_pretrained(tmp_path)
    again, tokenizer = models.load(tmp_path)
    assert tokenizer.pad_token is None
    assert again.get_input_embeddings().weight.shape[0] == len(TOKENIZER) + 61
    assert not is_quantized(again)
