"""The profile pieces: where the time of a packed inner step goes on the device, by kind of kernel and by kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loop_cases import Shape, conventional, ours
from benchmarks.profile_step import KERNELS, group_of

from .inner import fresh, synchronized
from .shapes import shape
from .worker import Cases, Setting

MOST = 40  # kernels by name


def kernels(run: Any, own: Shape, steps: int) -> dict[str, Any]:
    """Milliseconds of an inner step by kind and by kernel, the device's idle time among them, under the profiler."""
    with fresh(own):
        run()
        cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        with profile(activities=activities) as found:
            begin = synchronized()
            run()
            wall = (synchronized() - begin) / steps * 1e3
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        names: dict[str, tuple[float, int]] = {}
        for event in found.key_averages():
            micro = event.self_device_time_total if cuda else event.self_cpu_time_total
            if event.device_type == kind and micro and not getattr(event, "is_user_annotation", False):
                spent, count = names.get(event.key, (0.0, 0))
                names[event.key] = spent + micro / 1e3 / steps, count + event.count
    groups: dict[str, dict[str, Any]] = {}
    for name, (ms, count) in names.items():
        row = groups.setdefault(group_of(name.lower(), KERNELS if cuda else None), {"ms": 0.0, "calls": 0})
        row["ms"] += ms
        row["calls"] += count / steps
    busy = sum(row["ms"] for row in groups.values())
    for row in groups.values():
        row |= {"share": row["ms"] / busy, "calls": round(row["calls"])}
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:MOST]
    return {
        "wall ms": wall,
        "busy ms": busy,
        "kernels": sum(count for _, count in names.values()) // steps,
        **dict(sorted(groups.items(), key=lambda item: -item[1]["ms"])),
        "longest": {name[:120]: {"ms": ms, "calls": count // steps} for name, (ms, count) in longest},
    }


def profiles(setting: Setting) -> Cases:
    """The piece; argument: FAMILY-PAIRS."""
    family, pairs = setting.argument.split("-")
    own = shape(family, int(pairs), setting.dry)
    steps = 2
    yield "packed", lambda: kernels(ours(own, steps, engine="packed", capture_graph=False), own, steps)
    merged = {"engine": "packed", "capture_graph": False, "merge_adapters": True}
    yield "packed, merged", lambda: kernels(ours(own, steps, **merged), own, steps)
    if setting.device == "cuda":
        captured = {"engine": "packed", "capture_graph": True}
        yield "packed, captured", lambda: kernels(ours(own, 16, **captured), own, 16)
    half = torch.bfloat16 if setting.device == "cpu" else torch.float16
    yield "conventional", lambda: kernels(conventional(own, steps, half), own, steps)
