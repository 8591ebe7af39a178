"""Where a part was made: the device, its GPU, torch, the commit; and which parts belong to one measurement."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .parts import Part

ROOT = Path(__file__).resolve().parents[2]
DECIDING = ("device", "dry", "gpu", "torch")  # what a part's cases must have in common


def commit() -> str | None:
    """The commit of the code, where git is at hand."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu(device: str) -> str | None:
    """The name of the GPU that is used; None on a CPU."""
    return torch.cuda.get_device_name(0) if device == "cuda" else None


def origin(device: str, dry: bool) -> dict[str, Any]:
    """What is `DECIDING`, here and now."""
    return {"device": device, "dry": dry, "gpu": gpu(device), "torch": torch.__version__}


def deciding(part: Part) -> dict[str, Any]:
    """What is `DECIDING` of a part."""
    return {key: part.get(key) for key in DECIDING}


def mixed(found: Mapping[str, Part]) -> str:
    """In which way parts are of several machines; "" if they are of one."""
    for key in ("gpu", "torch"):
        names: dict[Any, list[str]] = {}
        for piece, part in found.items():
            names.setdefault(part.get(key), []).append(piece)
        if len(names) > 1:
            told = "; ".join(f"{name or 'unknown'}: {', '.join(pieces)}" for name, pieces in names.items())
            return f"the parts differ in their {key} ({told})"
    return ""


def commits(found: Mapping[str, Part]) -> list[str]:
    """All commits that parts are of, each once."""
    return list(dict.fromkeys(each or "unknown" for part in found.values() for each in part.get("commits", [None])))
