"""What several ranks add to a plan and take off it: DDP's buckets, FSDP2's shards, and what its passes gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lpa_kernels.model.sites import decoder_layers

from .ledger import Ledger


class Shards:
    """A model on the meta device that gathers its weights as FSDP2 does, in the units that accelerate makes.

    Every block is one, the embedding one, the head one that stays whole until its backward pass (together with the
    embedding, where they are tied), and what is left one that always does. A unit in use takes its weights twice:
    whole, and in the buffer that they came in or in which the next ones come. At its backward pass's end its gradients
    are scattered.

    Args:
        ranks: how many share the weights.
    """

    def __init__(self, model: Any, ledger: Ledger, ranks: int) -> None:
        self.ledger, self.ranks = ledger, ranks
        self.buffer: Tensor | None = None  # of the unit that was gathered last
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        ends = [[embedding, head]] if head.weight is embedding.weight else [[embedding], [head]]
        self.units: list[_Unit] = []
        taken: set[int] = set()
        for modules in [*([block] for block in decoder_layers(model)), *ends, [model]]:
            own = {id(p): p for m in modules for p in m.parameters() if id(p) not in taken and shared(p)}
            taken |= own.keys()
            if own:
                stays = modules[-1] is head or modules[-1] is model
                self.units.append(_Unit(self, modules, list(own.values()), stays))

    def settle(self) -> None:
        """The end of a backward pass: every unit is shards again."""
        for unit in self.units:
            unit.end()
        self.buffer = None


def shared(p: Tensor) -> bool:
    """Whether ranks share a weight; accelerate leaves those of few bits whole."""
    return p.is_floating_point()


class _Unit:
    def __init__(self, shards: Shards, modules: list[nn.Module], parameters: list[nn.Parameter], stays: bool) -> None:
        self.shards, self.parameters, self.stays, self.several = shards, parameters, stays, len(modules) > 1
        self.whole: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.backward = False
        for module in modules:
            module.register_forward_pre_hook(self._before, with_kwargs=True)
            module.register_forward_hook(self._after)

    def _gather(self) -> None:
        if not self.whole:
            with self.shards.ledger.kind("gathered"):
                self.shards.buffer = torch.empty(
                    sum(p.nbytes for p in self.parameters), dtype=torch.uint8, device="meta"
                )
                self.whole = [torch.empty_like(p, requires_grad=False) for p in self.parameters]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._gather()
        hidden = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        if hidden and not self.several:
            hidden[0].register_hook(lambda _: self.end())

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else [getattr(output, "logits", output)]:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self._begin())
        if not self.stays and not self.backward:  # a checkpointed block is run again in its backward pass
            self.whole = []

    def _begin(self) -> None:
        self.backward = True
        self._gather()

    def end(self) -> None:
        """The end of the unit's backward pass: its weights go, and its gradients are scattered."""
        held = [p for p in self.parameters if p.grad is not None and p.requires_grad]  # an attack's pass makes none
        if self.backward and held:
            with self.shards.ledger.kind("gathered"):
                sent = torch.empty(sum(p.numel() for p in held), dtype=held[0].dtype, device="meta")
            with self.shards.ledger.kind("gradients", self.shards.ranks):
                self.gradients = [torch.empty_like(p, requires_grad=False) for p in held]
            del sent
            for p in held:
                p.grad = None
        self.whole, self.backward = [], False
