"""What a run survives: kills, stops, damaged checkpoints, full disks and folders that cannot be written to."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpa.files import WriteError, staged, write_text, writing
from lpa.run_folder import checkpoint_folders
from lpa.training import checkpoint
from lpa.training.checkpoint import CheckpointError, damage, last_good, publish, remove_old
from tests.soak import survive
from tests.support import jobs, ranks
from tests.support.jobs import difference

RUN: dict[str, Any] = jobs.STATEFUL | {"lpa_steps": 3, "attack_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Path:
    """An uninterrupted run, in this process."""
    folder: Path = tmp_path_factory.mktemp("whole")
    jobs.train(folder, RUN)
    return folder


# ---- kills and stops -------------------------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("place", jobs.PLACES)
def test_a_killed_and_resumed_run_ends_like_an_uninterrupted_one(whole: Path, tmp_path: Path, place: str) -> None:
    killed = ranks.Ranks(jobs.die, tmp_path, RUN, place, folder=tmp_path)
    assert killed.finish() == [-signal.SIGKILL], killed.text()
    # no more than the step in flight is lost: the first one's checkpoint is there, and a second one whole or not at all
    last = last_good(tmp_path)
    assert last is not None
    assert last.name == ("checkpoint-4" if place == "rename" else "checkpoint-2")
    assert [path.name for path in checkpoint_folders(tmp_path) if damage(path)] == []
    ranks.run(jobs.train, tmp_path, RUN, True, folder=tmp_path)
    assert difference(whole, tmp_path) == 0
    assert not list(tmp_path.glob(".*"))  # the unfinished files of the killed run are gone


def test_one_seed_is_one_result(whole: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    jobs.train(one, RUN)
    assert difference(whole, one) == 0
    jobs.train(other, RUN | {"seed": 43})
    assert difference(whole, other) > 0


@pytest.mark.ranks
def test_a_checkpoint_of_two_ranks_goes_on_on_one(whole: Path, tmp_path: Path) -> None:
    ranks.run(jobs.stop, tmp_path, RUN, folder=tmp_path, world=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2"]
    ranks.run(jobs.train, tmp_path, RUN, True, folder=tmp_path)
    assert difference(whole, tmp_path) < 1e-4


@pytest.mark.ranks
def test_the_campaign_of_survival_knows_what_a_run_is_doing(tmp_path: Path) -> None:
    ranks.run(survive.watched, tmp_path / "run", tmp_path / "diary", False, folder=tmp_path)
    lines = (tmp_path / "diary").read_text().splitlines()
    micro = survive.RUN["micro_batches"]
    a_step = ["attack"] * micro + ["update"] * (micro * survive.UPDATES) + ["write"]
    assert lines == [f"{doing} {step}" for step in range(1, survive.STEPS + 1) for doing in a_step]


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    whole: Path, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    trainer = jobs.trainer_of(tmp_path, **RUN)
    trainer.train()
    four, six = tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"
    with (six / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    trainer = jobs.trainer_of(tmp_path, **RUN)
    with pytest.raises(
        CheckpointError, match=rf"checkpoint-6 cannot be used: adapter_model.* 100 bytes .*good.*{four}"
    ):
        trainer.train(resume_from_checkpoint=str(six))
    jobs.train(tmp_path, RUN, resume=True)
    assert f"{six} is damaged and left out: adapter_model.safetensors has 100 bytes instead of" in caplog.text
    assert difference(whole, tmp_path) == 0
    assert damage(six) == ""  # made again
    for path in checkpoint_folders(tmp_path):
        (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(ValueError, match="there is no good checkpoint"):
        jobs.trainer_of(tmp_path, **RUN).train(resume_from_checkpoint=True)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found(tmp_path_factory: Any, data: Any) -> None:
    run: Path = tmp_path_factory.mktemp("run")
    written = run / checkpoint.UNFINISHED / "checkpoint-3"
    (written / "shards").mkdir(parents=True)
    names = ["trainer_state.json", "model.safetensors", "shards/0.distcp"]
    for name in names:
        (written / name).write_bytes(data.draw(st.binary(min_size=1, max_size=20)))
    target = run / "checkpoint-3"
    publish(written, target)
    assert damage(target) == ""
    assert json.loads((target / checkpoint.MANIFEST).read_text()).keys() == set(names)
    name = data.draw(st.sampled_from([*names, checkpoint.MANIFEST]))
    content = (target / name).read_bytes()
    listing = name == checkpoint.MANIFEST
    place = data.draw(st.integers(0, len(content) - 1 - listing))  # a list without its last line's end is whole
    kind = data.draw(st.sampled_from(["gone", "cut", "zeros" if listing else "flip"]))
    if kind == "gone":
        (target / name).unlink()
    elif kind == "zeros":  # what a file system may leave of a file that was not synced
        (target / name).write_bytes(bytes(len(content)))
    else:
        new = content[:place] if kind == "cut" else content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        (target / name).write_bytes(new)
    assert name in damage(target)
    assert last_good(run) is None


def test_rotation_spares_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (0, 4, 8, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    names = lambda: [path.name for path in checkpoint_folders(tmp_path)]  # noqa: E731
    remove_old(tmp_path, None)
    assert names() == [f"checkpoint-{step}" for step in (100, 12, 8, 4, 0)]
    remove_old(tmp_path, 3, str(tmp_path / "checkpoint-0"))
    assert names() == ["checkpoint-100", "checkpoint-12", "checkpoint-0"]
    remove_old(tmp_path, 1, str(tmp_path / "checkpoint-0"))
    assert names() == ["checkpoint-100", "checkpoint-0"]
    remove_old(tmp_path, 1)
    assert names() == ["checkpoint-100"]


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_costs_no_checkpoint(whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A limit on the size of files fails in the middle of one, as a full disk does, without needing one."""
    resource = pytest.importorskip("resource")
    trainer = jobs.trainer_of(tmp_path, **RUN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = trainer._save_checkpoint

    def full(*args: Any) -> None:
        if trainer.lpa_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        save(*args)

    trainer._save_checkpoint = full  # type: ignore[method-assign]
    try:
        with pytest.raises(WriteError, match=r"cannot write checkpoint-4 in .*larger.*checkpoint-2 is there"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".*"))  # its space is given back
    jobs.train(tmp_path, RUN, resume=True)
    assert difference(whole, tmp_path) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"no space is left \([\d.]+ MB free\); put that right"),
        (Exception("No space left on device (os error 28)"), r"no space is left \([\d.]+ MB free\)"),  # tokenizers
        (Exception("Read-only file system (os error 30)"), r"it cannot be written to \(Read-only"),
        (Exception("I/O error: Input/output error (os error 5)"), ".*Input/output error"),
        (OSError(errno.EROFS, "Read-only file system"), "it cannot be written to .*Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied"), "it cannot be written to"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), ".*failed writing file"),
    ],
)
def test_what_is_said_of_a_folder(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(WriteError, match=f"cannot write it in {tmp_path}: {message}"):  # noqa: SIM117
        with writing("it", tmp_path, "put that right"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), writing("it", tmp_path):
        raise RuntimeError("shapes do not match")


def test_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("old")

    def break_off() -> None:
        with staged(tmp_path) as part:
            (part / "adapter_model.safetensors").write_text("ne")
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        break_off()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").read_text() == "old"
    with staged(tmp_path) as part:
        (part / "adapter_model.safetensors").write_text("new")
        (part / "other").mkdir()
        (part / "other" / "adapter_config.json").write_text("{}")
    assert (tmp_path / "adapter_model.safetensors").read_text() == "new"
    assert (tmp_path / "other" / "adapter_config.json").read_text() == "{}"
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "adapter_model.safetensors", "other"]


@pytest.mark.parametrize("error", [TypeError("no array"), OSError("gone")])
def test_ranks_learn_of_every_failure_to_save(tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    from lpa.commands import train
    from lpa.training import durable
    from lpa.training import ranks as together

    def fail(*_: Any, **__: Any) -> None:
        raise error

    def agree(accelerator: Any, error: Exception | None = None, stop: bool = False) -> bool:
        heard.append(error)
        return False

    heard: list[Exception | None] = []
    trainer = jobs.trainer_of(tmp_path, lpa_steps=1)
    monkeypatch.setattr(trainer.model, "save_pretrained", fail)
    monkeypatch.setattr(durable, "agree", agree)
    monkeypatch.setattr(together, "agree", agree)
    trainer.save_model()
    train._save(trainer)
    assert [str(error) in str(each) for each in heard if each] == [True, True]


def test_save_model_leaves_an_adapter_that_loads(tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = jobs.trainer_of(tmp_path, lpa_steps=1)
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.glob(".*"))
    loaded = PeftModel.from_pretrained(jobs.tiny_model(len(jobs.tiny_tokenizer())), tmp_path)
    trained = {name: p for name, p in trainer.model.named_parameters() if "lora" in name}
    assert trained
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters() if "lora" in name)
