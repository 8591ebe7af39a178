"""Adapters that people bring: their training goes on, and errors before step 1 name untrainable or unsavable parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpa import LPATrainer
from lpa.cli import main
from lpa.models import ModelError, adapter_base, base_and_adapters, load
from tests.support.tiny import rows, saved_tiny, tiny_config, tiny_model
from tests.support.trainers import TOKENIZER, trainer_of, weights

SMALL = ["--lpa_steps", "1", "--defence_steps", "1", "--attack_steps", "1", "--per_device_train_batch_size", "2",
         "--gradient_accumulation_steps", "1", "--attack_engine", "reference", "--use_cpu", "--no_measure"]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> str:
    return saved_tiny(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: str) -> str:
    """A trained adapter: its B matrices are not 0."""
    torch.manual_seed(1)
    model = get_peft_model(load(base)[0], LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def saved(folder: str | Path) -> dict[str, Any]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_training_of_an_adapters_folder_goes_on(tmp_path: Path, base: str, adapter: str) -> None:
    trainer = LPATrainer(adapter, tiny_config(tmp_path / "run", learning_rate=1e-6), rows(8))
    assert isinstance(trainer.model, PeftModel)
    assert set(trainer.model.peft_config) == {"default"}
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    before, after = saved(adapter), saved(tmp_path / "saved")
    assert before.keys() == after.keys()
    change = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < change < 1e-3
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_lpa_train_goes_on_with_an_adapter(tmp_path: Path, base: str, adapter: str) -> None:
    output = tmp_path / "out"
    assert main(["train", "--model", adapter, "--output", str(output), "--learning_rate", "1e-6", *SMALL]) == 0
    before, after = saved(adapter), saved(output)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-3
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    record = json.loads((output / "metrics.json").read_text())
    assert (record["model"], record["adapter"]) == (base, adapter)
    assert f"went on with the adapter {adapter}" in (output / "README.md").read_text()


def test_a_preview_takes_the_tokenizer_of_an_adapter_or_of_its_base(
    tmp_path: Path, base: str, adapter: str, capsys: Any
) -> None:
    assert main(["traits", "--preview", "--rows", "1", "--model", adapter]) == 0, "it has no tokenizer of its own"
    of_base = capsys.readouterr().out
    assert "attacked" in of_base
    shutil.copytree(adapter, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ strftime_now('%d.%m.%Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "own")
    date = ["--chat-template-date", "2024-02-29"]
    assert main(["traits", "--preview", "--rows", "1", "--model", str(tmp_path / "own"), *date]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(of_base.splitlines()), "the date has tokens"


def test_export_chat_evaluate_and_plan_take_the_base_that_an_adapter_names(
    tmp_path: Path, base: str, adapter: str, capsys: Any
) -> None:
    for number, words in enumerate((["--adapter", adapter], ["--model", adapter])):
        output = tmp_path / f"merged-{number}"
        assert main(["export", "--merge", *words, "--output", str(output)]) == 0, capsys.readouterr().err
        assert (output / "config.json").is_file()
        assert main(["chat", *words, "--prompt", "I agree", "--max-new-tokens", "2"]) == 0
        assert "adapter" in capsys.readouterr().out
    assert main(["plan", "--model", adapter]) == 0
    assert base_and_adapters(None, [f"mine={adapter}"]) == (base, [f"mine={adapter}"])
    assert base_and_adapters(adapter, []) == (base, [adapter])
    assert base_and_adapters(base, [adapter]) == (base, [adapter])
    assert base_and_adapters(None, []) == ("smollm2-135m-instruct", [])


def test_adapters_of_several_bases_need_a_model(tmp_path: Path, adapter: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ModelError, match="of several base models"):
        base_and_adapters(None, [adapter, str(other)])
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match=r"does not say which model it is for .*give that model as --model"):
        adapter_base(other)


def test_adapters_that_would_not_be_trained_raise(tmp_path: Path, base: str, adapter: str) -> None:
    frozen = PeftModel.from_pretrained(load(base)[0], adapter)
    with pytest.raises(ValueError, match=r"not to be trained; load them with PeftModel.from_pretrained.*is_trainable"):
        trainer_of(tmp_path / "a", model=frozen)
    injected = AutoModelForCausalLM.from_pretrained(adapter)
    with pytest.raises(ValueError, match="transformers has put an adapter into the model"):
        trainer_of(tmp_path / "b", model=injected)
    model = PeftModel.from_pretrained(load(base)[0], adapter, is_trainable=True)
    for settings, message in (
        ({"lora": False}, "lora=False trains all weights"),
        ({"lora_r": 7}, "lora_r=7 is of new"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path / "c", model=model, **settings)


@pytest.mark.parametrize("start", ["pissa_niter_2", "lora_ga"])
def test_adapters_that_peft_loads_as_others_are_not_trained(tmp_path: Path, base: str, start: str) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    config.init_lora_weights = start  # as a file gives it
    if start != "lora_ga":  # which needs gradients when it is put on
        model = get_peft_model(load(base)[0], config)
        with torch.no_grad():
            trained = model(torch.arange(8)[None]).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(base)[0], tmp_path / "adapter")
        with torch.no_grad():
            assert not torch.allclose(again(torch.arange(8)[None]).logits, trained, atol=1e-3), "peft loads it now"
        with pytest.raises(ModelError, match=f"has init_lora_weights='{start}', and peft makes another start"):
            load(tmp_path / "adapter")
        with pytest.raises(ValueError, match=f"adapters with init_lora_weights='{start}' cannot be trained here"):
            trainer_of(tmp_path / "b", model=model)
    with pytest.raises(ValueError, match=f"adapters with init_lora_weights='{start}' cannot be trained here"):
        trainer_of(tmp_path / "a", model=load(base)[0], peft_config=config)
    trainer_of(tmp_path / "c", model=load(base)[0],
               peft_config=LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))  # fmt: skip


def test_a_configuration_that_cannot_be_saved_raises_before_step_1(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER))
    model.generation_config.temperature = 0.5  # without sampling: saving refuses it
    trainer = trainer_of(tmp_path / "a", model=model, lora=False, sft_coef=0.5)
    before = weights(trainer)
    with pytest.raises(ValueError, match="the model's generation_config cannot be saved"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert not list((tmp_path / "a").iterdir())


def test_a_disk_too_small_for_a_checkpoint_raises_before_step_1(tmp_path: Path, monkeypatch: Any) -> None:
    import shutil

    trainer = trainer_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("lpa.training.rehearsal.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0.0 GB are free, and a checkpoint takes"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_weights_on_no_device_raise(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENIZER))
    model.model.embed_tokens.to("meta")
    with pytest.raises(ValueError, match=r"offloaded or were never loaded \(such as model.embed_tokens.weight"):
        trainer_of(tmp_path, model=model)
