"""What is logged of an LPA step: losses, norms, seconds by phase and tokens a second, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpa_kernels.attack import AttackResult, PairBatch

from ..config import PAIR_TERMS

if TYPE_CHECKING:
    from ..config import LPAConfig
    from .losses import BenignBatch


def text_tokens(ids_mask: Tensor) -> int:
    """Tokens of right-padded texts up to their last label; mask [B, L] is True at labels."""
    return int((ids_mask.flip(1).cumsum(1) > 0).sum())


class StepRecord:
    """Collects the numbers of one LPA step on one rank; nothing is read from the device before its end."""

    def __init__(
        self,
        args: LPAConfig,
        pairs: Sequence[PairBatch],
        benign: Sequence[BenignBatch | None],
        device: torch.device,
        number: int,
    ) -> None:
        self.args, self.device = args, device
        self.start = time.perf_counter()
        self.spans: dict[str, list[Any]] = {"attack": [], "defence": []}
        self.sums: dict[str, Any] = {}
        self.defence: dict[int, dict[str, Any]] = {}
        self.attacks: list[tuple[AttackResult, float]] = []
        self.micro = len(pairs)
        both = sum(text_tokens(p.rejected_mask) + text_tokens(p.chosen_mask) for p in pairs)
        self.tokens = both * (args.inner_steps + args.defence_steps)
        self.tokens += args.benign_updates(number) * sum(text_tokens(b.mask) for b in benign if b is not None)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a phase: by the clock, or on a GPU by events, which need no waiting."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.spans[phase].append((start, end))
            return
        begin = time.perf_counter()
        yield
        self.spans[phase].append(time.perf_counter() - begin)

    def _seconds(self, phase: str) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return sum(start.elapsed_time(end) for start, end in self.spans[phase]) / 1000
        return float(sum(self.spans[phase]))

    def _add(self, name: str, value: Any) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def add_attack(self, attack: AttackResult, share: float = 1.0) -> None:
        """Keep an inner loop, on `share` of a micro-batch, for the step's end."""
        self.attacks.append((attack, share))

    def _read(self, attack: AttackResult, share: float) -> None:
        """Losses at both ends of an inner loop, norms, rows at the boundary, places of its passes without a token."""
        for end, losses in (("first", attack.losses[:1]), ("last", attack.losses[-1:])):
            for name in PAIR_TERMS:
                for found in losses:  # none of an adversary without inner steps
                    if name in found:
                        self._add(f"attack_{name}_{end}", found[name] * (share if name in ("dpo", "ipo") else 1.0))
        for site, norms in attack.norms.items():
            self._add(f"norm/{site}", norms.sum().to(self.device))
            self._add(f"rows/{site}", norms.numel())
        self._add("boundary_fraction", attack.boundary_fraction * attack.row_norms.numel())
        self._add("rows", attack.row_norms.numel())
        if attack.layout is not None:
            places = attack.layout.input_ids.numel()
            self._add("padding", attack.layout.padding_share * places)
            self._add("places", places)

    def add_defence(self, update: int, terms: dict[str, Tensor]) -> None:
        """The losses of one micro-batch in an update. Of each term the last update that has it is logged."""
        own = self.defence.setdefault(update, {})
        for name, value in terms.items():
            own[name] = own.get(name, 0.0) + value

    def forget_defence(self, update: int) -> None:
        """Drop the update's losses: it starts again."""
        self.defence.pop(update, None)

    def metrics(self, accelerator: Any, lpa_step: int) -> dict[str, float]:
        """The numbers to log, over all ranks. Losses are sums of the micro-batches' shares, or means of their means.

        A preference loss is always a micro-batch's mean.
        """
        for attack, share in self.attacks:
            self._read(attack, share)
        for update in sorted(self.defence):
            self.sums |= {f"defence_{name}": value for name, value in self.defence[update].items()}
        names = sorted(self.sums)
        values = torch.stack([torch.as_tensor(self.sums[n], dtype=torch.float32, device=self.device) for n in names])
        total = dict(zip(names, accelerator.reduce(values).tolist(), strict=True))
        tokens = int(accelerator.reduce(torch.tensor(self.tokens, device=self.device)))
        seconds = {phase: self._seconds(phase) for phase in self.spans}
        wall = time.perf_counter() - self.start
        metrics = {n: v for n, v in total.items() if n.startswith(("attack_", "defence_"))}
        for name in metrics:
            if self.args.normaliser == "micro" or name.split("_")[1] in ("dpo", "ipo"):
                metrics[name] /= self.micro * accelerator.num_processes
        metrics["defence_total"] = sum(v for n, v in metrics.items() if n.startswith("defence_"))
        for name, value in total.items():
            if name.startswith("norm/"):
                metrics[name] = value / total[name.replace("norm/", "rows/")]
        if "rows" in total:
            metrics["boundary_fraction"] = total["boundary_fraction"] / total["rows"]
        if "places" in total:
            metrics["padding_share"] = total["padding"] / total["places"]
        metrics |= {f"seconds_{phase}": value for phase, value in seconds.items()}
        metrics["seconds_other"] = max(0.0, wall - sum(seconds.values()))
        metrics["tokens_per_second"] = tokens / wall
        metrics["lpa_step"] = lpa_step
        return metrics
