"""Several ranks are the same run as one: DDP and FSDP2 over gloo, with unequal data, failures and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lpa import LPATrainer
from lpa.cli import main
from lpa.training.ranks import check_engine, reduce_gradients
from tests.support import jobs, ranks
from tests.support.jobs import RAGGED, difference, moved
from tests.support.tiny import tiny_config

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package"),
]


CASES = {
    "packed, merged, ragged": {"data": RAGGED, "attack_merge_adapters": True},
    "frozen blocks, benign terms, dropout": {
        "attack_sites": "mlp:1", "kl_coef": 0.3, "sft_coef": 0.2, "lora_dropout": 0.2, "attack_random_start": True},
    "two passes, checkpointed": {"attack_engine": "reference", "gradient_checkpointing": True, "dpo_coef": 1.0,
                                 "toward_coef": 0.0, "away_coef": 0.0},
    "every weight": {"lora": False, "sft_coef": 0.3, "reset_optimizer": False},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_weights_that_one_trains(tmp_path: Path, case: str) -> None:
    settings = CASES[case] | {"save_strategy": "steps"}  # saving shards must leave the optimiser as it is
    jobs.train(tmp_path / "one", settings)
    assert moved(tmp_path / "one", settings) > 1e-3
    for name in ("ddp", "fsdp"):
        ranks.run(jobs.train, tmp_path / name, settings | {"fsdp": name == "fsdp"}, folder=tmp_path / name, world=2)
        assert difference(tmp_path / "one", tmp_path / name) < 1e-4, name
        logs = [torch.load(tmp_path / folder / "log.pt") for folder in ("one", name)]
        for first, second in zip(*logs, strict=True):
            for key in first.keys() - {"tokens_per_second", "epoch", "step"}:
                if not key.startswith("seconds_"):
                    assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("fsdp", [False, True])
def test_one_rank_that_fails_stops_all_with_its_message(tmp_path: Path, fsdp: bool) -> None:
    settings = {"fsdp": fsdp, "save_strategy": "steps", "kl_coef": 0.3}  # the base model's passes are collective too
    running = ranks.Ranks(jobs.fail, tmp_path, settings, folder=tmp_path, world=2)
    assert running.finish() == [1, 1]  # and not None: nobody waits
    assert "FloatingPointError: LPA step 2: the adversary's loss is nan" in running.text(1)
    assert "RankError: rank 1: LPA step 2: the adversary's loss is nan" in running.text(0)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_engines_under_which_ranks_train_apart_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match=r"accelerate is to compile the model \(EAGER\).*dynamo_backend to no"):
        jobs.trainer_of(tmp_path)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    with pytest.raises(ValueError, match="among several processes, and this is one"):
        LPATrainer("none", tiny_config(tmp_path, fsdp=True))
    trainer = jobs.trainer_of(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but this process would train by itself"):
        check_engine(trainer)
    module = torch.nn.Linear(1, 1)
    reduce_gradients(module, module)
    with pytest.raises(RuntimeError, match="cannot be averaged through Sequential"):
        reduce_gradients(torch.nn.Sequential(module), module)


def test_a_stop_of_one_rank_stops_and_saves_all(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 100, "fsdp": True, "lora_dropout": 0.1}
    ranks.run(jobs.stop, tmp_path / "parts", settings, folder=tmp_path, world=2)
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-2"]
    ranks.run(jobs.train, tmp_path / "parts", settings, True, folder=tmp_path, world=2)
    jobs.train(tmp_path / "whole", settings | {"fsdp": False})
    assert difference(tmp_path / "whole", tmp_path / "parts") < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("lora", [True, False])
def test_canaries_choose_the_same_step_on_two_ranks(tmp_path: Path, lora: bool) -> None:
    settings = {"lora": lora, "canary_steps": 1, "canary_max_new_tokens": 4, "canary_prompts": 4, "lpa_steps": 3,
                "canary_max_perplexity": 0.0, "learning_rate": 1e-3 if lora else 3e-2,
                "save_strategy": "steps"}  # fmt: skip
    jobs.train(tmp_path / "one", settings)
    for name in ("ddp", "fsdp"):
        ranks.run(jobs.train, tmp_path / name, settings | {"fsdp": name == "fsdp"}, folder=tmp_path / name, world=2)
        assert difference(tmp_path / "one", tmp_path / name) < 1e-4, name
        one, two = (json.loads((tmp_path / run / "canaries.json").read_text()) for run in ("one", name))
        assert one["kept_lpa_step"] == two["kept_lpa_step"] < 3, name  # not the last, whose weights were there already
        for first, second in zip(one["measured"], two["measured"], strict=True):
            assert {k: v for k, v in second.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in first.items() if k != "seconds"}, rel=1e-3, abs=1e-4), name  # fmt: skip


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    """Settings and ragged rows, more or fewer than a batch takes."""
    words = st.integers(1, 6).map(lambda n: " ".join(["I", "agree", "not", "with", "this", "statement"][:n]))
    pair = st.fixed_dictionaries({"prompt": words, "rejected": words, "chosen": words})
    rows = draw(st.lists(pair.filter(lambda row: row["rejected"] != row["chosen"]), min_size=1, max_size=9))
    return {
        "data": rows,
        "micro_batches": draw(st.sampled_from([2, 4, 6])),
        "per_device_train_batch_size": draw(st.integers(1, 3)),
        "defence_steps": draw(st.integers(1, 3)),
        "attack_steps": draw(st.integers(0, 2)),
        "attack_sites": draw(st.sampled_from([["embedding"], ["mlp:1"], ["block:0", "attn:1"]])),
        "attack_engine": draw(st.sampled_from(["packed", "reference"])),
        "sft_coef": draw(st.sampled_from([0.0, 0.5])),
        "seed": draw(st.integers(0, 99)),
        # of Adam, rounding alone would decide where a gradient is all but zero
        "optim": "sgd",
        "learning_rate": 0.1,
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(setting=runs(), fsdp=st.booleans())
def test_any_run_is_the_same_on_two_ranks(tmp_path_factory: Any, setting: dict[str, Any], fsdp: bool) -> None:
    folder: Path = tmp_path_factory.mktemp("runs")
    jobs.train(folder / "one", setting)
    ranks.run(jobs.train, folder / "two", setting | {"fsdp": fsdp}, folder=folder / "two", world=2)
    assert difference(folder / "one", folder / "two") < 1e-5


def test_the_command_with_sharded_weights(tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    tokenizer = jobs.tiny_tokenizer()
    jobs.tiny_model(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    settings = ["--model", model, "--lpa_steps", "2", "--attack_steps", "2", "--defence_steps", "2", "--lora_r", "4",
                "--per_device_train_batch_size", "1", "--use_cpu", "--measure_attacked", "1"]  # fmt: skip
    one, two = ([*settings, "--output", str(tmp_path / name)] for name in ("one", "two"))
    assert main(["train", *one, "--gradient_accumulation_steps", "2"]) == 0
    ranks.run(jobs.command, [*two, "--gradient_accumulation_steps", "1"], folder=tmp_path, world=2)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-4, rtol=0) for name in first)
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for time in ("before", "after"):
        assert found[1][time] == pytest.approx(found[0][time], rel=1e-3, abs=1e-3), time
