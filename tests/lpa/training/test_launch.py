"""`torchrun` and `accelerate launch` with `-m lpa train`: SIGTERM to the launcher saves, and one process can go on."""

from __future__ import annotations

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
from lpa.run_folder import LOCK, checkpoint_folders
from lpa.training.checkpoint import damage, last_good
from tests.support.tiny import saved_tiny

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip
RUN = ["--attack_steps", "2", "--defence_steps", "1", "--per_device_train_batch_size", "1", "--lora_r", "4",
       "--no_measure", "--disable_tqdm", "true"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> str:
    return saved_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.ranks
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher_saves_and_one_process_goes_on(model: str, tmp_path: Path, launcher: str) -> None:
    output = tmp_path / "run"
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "lpa", "train", "--model", model, "--output", str(output)]
    command += [*RUN, "--lpa_steps", "2000", "--gradient_accumulation_steps", "1", "--save_steps", "2"]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while len(checkpoint_folders(output)) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    told = (tmp_path / "printed").read_text()
    assert "stopped after" in told, told[-3000:]
    assert told.count("stopped after") == 1  # rank 0 alone speaks
    last = last_good(output)
    assert last is not None
    assert [path.name for path in checkpoint_folders(output) if damage(path)] == []
    assert f"saved as {last}" in told
    assert {path.name for path in output.glob(".*")} <= {LOCK}
    steps = int(last.name.rpartition("-")[2])
    whole = tmp_path / "whole"
    more = ["--lpa_steps", str(steps + 1), "--gradient_accumulation_steps", "2"]
    assert main(["train", "--resume", "--output", str(output), *more]) == 0
    assert main(["train", "--model", model, "--output", str(whole), *RUN, *more]) == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (output, whole))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-4, rtol=0) for name in one)
