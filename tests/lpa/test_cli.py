"""The command lpa: quick help, a whole run on a tiny model, stopping, resuming, and what bad use says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lpa.cli import main
from tests.lpa.tiny import tiny_model, tiny_tokenizer

SMALL = ["--lpa_steps", "2", "--steps", "2", "--defence_steps", "2", "--per_device_train_batch_size", "2",
         "--gradient_accumulation_steps", "1", "--lora_r", "4", "--use_cpu", "--measure_attacked", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(*arguments: str) -> int:
    return main(["train", *arguments])


def test_help_is_quick() -> None:
    code = (
        "import sys; from lpa.cli import main; main(['--help']); assert 'torch' not in sys.modules, 'torch is loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("train", "traits", "assets"))


def test_a_run_writes_adapter_record_and_card(model: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert train("--model", model, "--output", str(output), "--kl-coef", "0.1", *SMALL) == 0
    shown = capsys.readouterr().out
    assert "disagrees with undesirable statements" in shown
    record = json.loads((output / "metrics.json").read_text())
    assert [step["lpa_step"] for step in record["steps"]] == [1, 2]
    assert record["settings"]["kl_coef"] == 0.1
    assert record["settings"]["seed"] == 42
    assert record["data"]["rows"] == 64
    assert len(record["data"]["sha256"]) == 64
    assert record["before"].keys() == record["after"].keys()
    card = (output / "README.md").read_text()
    assert record["command"] in card
    assert record["data"]["sha256"] in card
    assert record["versions"]["transformers"] in card

    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny_model(len(tiny_tokenizer())), str(output))
    weights = load_file(output / "adapter_model.safetensors")
    trained = [w for name, w in weights.items() if "lora_B" in name]
    assert trained
    assert all(float(w.abs().max()) > 0 for w in trained)
    assert sum("lora_B" in name for name, _ in loaded.named_parameters()) == len(trained)
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == model
    assert not list(output.glob("*.bin"))


def test_an_earlier_run_is_kept_unless_told(model: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text("{}")
    assert train("--model", model, "--output", str(tmp_path), *SMALL) == 1
    assert "is not empty; use --resume" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_text() == "{}"
    assert train("--model", model, "--output", str(tmp_path), "--overwrite", "--no_measure", *SMALL) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"]


def test_yaml_settings_and_flags_over_them(model: str, tmp_path: Path) -> None:
    file, output = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(f"model: {model}\nlpa_steps: 1\nlearning_rate: 1e-3\nsites: [embedding]\nmeasure: false\n")
    small = [word for word in SMALL if word not in ("--lpa_steps",)][1:]
    assert train("--config", str(file), "--output", str(output), "--learning_rate", "2e-3", *small) == 0
    record = json.loads((output / "metrics.json").read_text())
    assert record["settings"]["learning_rate"] == 2e-3
    assert record["settings"]["lpa_steps"] == 1
    assert record["sites"] == ["embedding"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "--config none.yaml cannot be read"),
        (["--resume"], "--resume needs --output"),
        (["--resume", "--output", "nowhere"], "nowhere holds no run"),
        (["--kl", "other"], "kl='other' is unknown"),
        (["--data", "none.csv"], "none.csv cannot be read"),
    ],
)
def test_bad_use_is_told_in_a_line(
    model: str, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("--model", model, *SMALL, *arguments) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_unknown_names_are_matched(model: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        train("--lpa_stepz", "3")
    assert stop.value.code == 2
    assert "unknown option --lpa_stepz; did you mean 'lpa_steps'?" in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    file.write_text("epsilom: 3")
    assert train("--config", str(file)) == 1
    assert "unknown key 'epsilom'; did you mean 'epsilon'?" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_data_of_ones_own(model: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,rejected,chosen\nI agree,yes,no\nI do not agree,no,yes\n")
    assert train("--model", model, "--data", str(file), "--output", str(tmp_path / "out"), "--no_measure", *SMALL) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["data"]["rows"] == 2
    file.write_text("prompt,rejected\nI agree,yes\n")
    assert train("--model", model, "--data", str(file), "--output", str(tmp_path / "two"), *SMALL) == 1
    assert "no column chosen" in capsys.readouterr().err
    assert not any((tmp_path / "two").iterdir())


def test_sigterm_saves_and_resume_ends_as_if_nothing_had_been(model: str, tmp_path: Path, capsys: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [*SMALL, "--lpa_steps", "8", "--no_measure", "--save_total_limit", "1"]
    command = [sys.executable, "-m", "lpa", "train", "--model", model, "--output", str(parts), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(parts.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "go on with: lpa train --resume" in out
    assert "Traceback" not in err
    assert not (parts / "metrics.json").exists()
    assert train("--resume", "--output", str(parts)) == 0
    assert "going on from" in capsys.readouterr().out
    assert train("--model", model, "--output", str(whole), *more) == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_traits_and_assets(model: str, capsys: Any) -> None:
    assert main(["traits", "--kind", "desirable", "--split", "heldout"]) == 0
    assert "desirable" in capsys.readouterr().out
    assert main(["traits", "--preview", "--model", model, "--rows", "1"]) == 0
    assert "attacked" in capsys.readouterr().out
    assert main(["assets"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out
    assert main(["assets", "verify", "nothing"]) == 1
    assert "no asset is called 'nothing'" in capsys.readouterr().err
