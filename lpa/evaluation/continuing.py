"""run.json: what an evaluation is of, and whether an earlier one in the same folder can be continued as this one."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..environment import versions
from ..run_folder import RUN
from .sets import PromptSet
from .subjects import EvaluationError, Subjects
from .suites import SUITES, Settings

logger = logging.getLogger(__name__)

# Settings that only add records: a stopped run may continue with other values of these.
_ADDED = ("sets", "benign_sets", "attacks", "epsilons", "steps", "utility_sets", "tasks", "ladder")
_FREE = (*_ADDED, "set_column", "set_filter", "set_split", "set_config", "judge", "judge_prompt")


def description(
    name: str, subjects: Subjects, suites: list[str], settings: Settings, sets: Sequence[PromptSet], command: str | None
) -> dict[str, Any]:
    """What run.json holds of a new evaluation.

    Args:
        name: the model's. sets: all that are asked. command: what made it; by default the process's own.
    """
    data = {prompts.name: prompts.described() for prompts in sets}
    for suite in suites:
        data |= SUITES[suite].data(settings)
    return {
        "model": name,
        "dtype": subjects.dtype,
        "device": str(subjects.device),
        "subjects": {
            subject: {"path": subjects.paths.get(subject, ""), "fingerprint": subjects.fingerprint(subject)}
            for subject in subjects.names
        },
        "suites": suites,
        "settings": settings.as_dict(),
        "data": data,
        "versions": versions() | {"platform": f"{platform.system()} {platform.machine()}"},
        "commands": [command or " ".join(map(str, sys.argv))],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def date_in(folder: Path | None) -> str | None:
    """The date in the prompts of an earlier run in this folder."""
    old = _earlier(folder)
    return None if old is None else old["settings"].get("chat_template_date")


def continued(folder: Path | None, new: dict[str, Any]) -> dict[str, Any]:
    """A new run's description, joined with that of an earlier run in this folder.

    Raises:
        EvaluationError: the folder holds an evaluation of something else, or under other settings.
    """
    old = _earlier(folder)
    if old is None:
        return new
    changed = [
        f"{name} was {old['settings'].get(name)!r} and is now {value!r}"
        for name, value in new["settings"].items()
        if name not in _FREE and name in old["settings"] and old["settings"][name] != value
    ]
    for name, subject in new["subjects"].items():
        if name in old["subjects"] and old["subjects"][name]["fingerprint"] != subject["fingerprint"]:
            changed.append(f"the weights of {name} have changed")
    for name, data in new["data"].items():
        if (was := old["data"].get(name, {}).get("sha256")) and data["sha256"] and was != data["sha256"]:
            changed.append(f"the texts of the set {name} have changed")
    if old["settings"].get("judge") and new["settings"]["judge"]:
        changed += [
            f"{name} was {old['settings'].get(name)!r}"
            for name in ("judge", "judge_prompt")
            if old["settings"].get(name) != new["settings"][name]
        ]
    if old.get("dtype", new["dtype"]) != new["dtype"]:
        changed.append(f"dtype was {old['dtype']} and is now {new['dtype']}")
    if changed:
        raise EvaluationError(f"{folder} holds another evaluation: {'; '.join(changed)}; use another output folder")
    logger.info("continuing the evaluation in %s", folder)
    merged = {**new, "started": old["started"], "commands": [*old["commands"], *new["commands"]]}
    merged["subjects"] = old["subjects"] | new["subjects"]
    merged["data"] = old["data"] | new["data"]
    held = old["settings"]
    merged["settings"] = new["settings"] | {  # the table is of all that the folder holds
        **{name: list(dict.fromkeys([*held.get(name, ()), *new["settings"][name]])) for name in _ADDED},
        **{name: new["settings"][name] or held.get(name) for name in ("judge", "judge_prompt")},
    }
    merged["suites"] = list(dict.fromkeys([*old["suites"], *new["suites"]]))
    return merged


def _earlier(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / RUN).is_file():
        return None
    found: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return found
