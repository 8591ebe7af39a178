"""Runs on a quantised base model: the settings, what they exclude, and a run on a stand-in and on the real thing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa import models, quantization
from lpa.commands.options import TrainOptions
from lpa.quantization import quantized_loading
from lpa.training.trainer import LPATrainer
from tests.support.quantized import quantised
from tests.support.tiny import rows, tiny_config, tiny_model
from tests.support.trainers import TOKENIZER, logged, trainer_of, weights


def test_a_run_on_integer_weights_trains_the_adapters_alone(tmp_path: Path) -> None:
    model = quantised(tiny_model(len(TOKENIZER)))
    trainer = trainer_of(tmp_path, model=model, attack_engine="packed", kl_coef=0.1, gradient_checkpointing=True)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    start = weights(trainer)
    trainer.train()
    assert sum(p.dtype == torch.int8 for p in frozen.values()) == 14
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else not torch.equal(p, start[name]), name
    assert logged(trainer)[1]["attack_toward_last"] < logged(trainer)[1]["attack_toward_first"]


def test_adapters_are_not_merged_into_quantised_weights(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER))
    model.is_quantized = True  # as transformers marks it
    with pytest.raises(ValueError, match="attack_merge_adapters=True, but the model is quantised"):
        trainer_of(tmp_path, model=model, attack_merge_adapters=True)


def test_bad_settings(monkeypatch: Any) -> None:
    assert quantized_loading() == {}
    with pytest.raises(ValueError, match="exclude each other"):
        quantized_loading(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="exclude each other"):
        TrainOptions(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='int4' is unknown; use nf4 or fp4"):
        quantized_loading(load_in_4bit=True, quant_type="int4")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="load_in_8bit=True needs the package bitsandbytes"):
        quantized_loading(load_in_8bit=True)


def test_the_record_says_how() -> None:
    assert TrainOptions().quantized is None
    assert TrainOptions(load_in_8bit=True).quantized == "8-bit (bitsandbytes)"
    nested = TrainOptions(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    assert nested.quantized == "4-bit fp4, nested (bitsandbytes)"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which also runs on the CPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path: Path, bits: int) -> None:
    folder = tmp_path / "model"
    model = tiny_model(len(TOKENIZER), hidden_size=64, intermediate_size=128)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    loading = quantized_loading(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    few, tokenizer = models.load(folder, **loading)
    assert quantization.is_quantized(few)
    config = tiny_config(tmp_path / "run", attack_engine="auto", per_device_train_batch_size=4, offload_attacks=True)
    trainer = LPATrainer(few, config, rows(8), tokenizer)
    start = weights(trainer)
    trainer.train()
    entry = logged(trainer)[-1]
    assert entry["attack_toward_last"] < entry["attack_toward_first"]
    assert max(float((p - start[n]).abs().max()) for n, p in weights(trainer).items()) > 1e-4
    trainer.save_model()
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(ValueError, match="is quantised"):
        LPATrainer(few, tiny_config(tmp_path / "merged", attack_merge_adapters=True), rows(8), tokenizer)
