"""The perturbations of latent_at as hooks on a model, which can be toggled and leave it with their last reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..attack import AttackResult
from ..model import hidden_of, record_last, rows_by_length, say_once, with_hidden
from ..ops import perturb, project_


class GDAdversary(nn.Module):
    """A perturbation by position, with the attributes of the public class of this name.

    The public class adds in place and in the model's dtype. This one adds out of place and in float32, and takes
    modules that return tuples.

    Args:
        dim: width of the hidden states.
        epsilon: radius of the ball, by position.
        attack_mask: [B, S] bool, True where the perturbation is added.
        device: of the perturbation.
        dtype: of the perturbation, float32 by default.

    Attributes:
        attack: [B, S, dim], zero at the start.
    """

    def __init__(
        self, dim: int, epsilon: float, attack_mask: Tensor, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.device = device
        self.epsilon = epsilon
        self.attack_mask = attack_mask.bool().to(device)
        self.attack = nn.Parameter(torch.zeros(*attack_mask.shape, dim, device=device, dtype=dtype or torch.float32))

    def forward(self, output: Any) -> Any:
        """`output` with the perturbation added at the attacked positions.

        Positions beyond S pass untouched. So does a call of one position: it is a step of generation, and the
        perturbation is in the cached states already.

        Args:
            output: hidden states [B, L, dim] or [B * L, dim], or a tuple that begins with them.

        Raises:
            ValueError: a batch of another size than B.
        """
        hidden = hidden_of(output, "the hooked module")
        size, attacked = self.attack_mask.shape
        length = hidden.numel() // hidden.shape[-1] // (hidden.shape[0] if hidden.dim() > 2 else size)
        if length == 1:
            return output
        if hidden.dim() > 2 and hidden.shape[0] != size:
            raise ValueError(
                f"the attack is on a batch of {size}; the model was called with a batch of {hidden.shape[0]}"
            )
        if self.attack.device != hidden.device:
            self.to(hidden.device)
            self.attack_mask = self.attack_mask.to(hidden.device)
            self.device = hidden.device
        cells = torch.arange(size * attacked, device=hidden.device).view(size, attacked)
        rows = rows_by_length(torch.where(self.attack_mask, cells, -1), length)
        flat = perturb(hidden.reshape(-1, hidden.shape[-1]), self.attack.flatten(0, 1).float(), rows)
        return with_hidden(output, flat.view(hidden.shape))

    def clip_attack(self) -> None:
        """Bring every position's perturbation back inside the ball."""
        project_(self.attack.data, self.epsilon)


class _Call:
    """The callable that a module holds: it applies its hook while that lives.

    A deep copy of the model shares it. A pickled model holds one without a hook.
    """

    def __init__(self, hook: CustomHook | None = None) -> None:
        self.hook: Callable[[], CustomHook | None] = (lambda: None) if hook is None else ref(hook)

    @property
    def _of_lpa_kernels(self) -> bool:
        """Whether what is known of the model holds all the same (`facts.is_ours`): while it adds nothing."""
        hook = self.hook()
        return hook is None or hook._removed or not hook.enabled

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hook = self.hook()
        return output if hook is None else hook._apply(output)

    def __deepcopy__(self, memo: Any) -> _Call:
        return self

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return _Call, ()


class CustomHook:
    """One perturbed module, with the attributes of the public class of this name.

    The perturbation is in force as long as this object lives. So a trainer whose own function clears no hooks of
    this kind still ends with a clean model, and the attacks of past micro-batches do not pile up.

    Attributes:
        module: the perturbed module, of a model that a warning about an unused attack belongs to.
        hook_fn: its `GDAdversary`.
        enabled: whether the perturbation is added; may be set at any time.
    """

    def __init__(self, module: nn.Module, hook_fn: nn.Module, model: nn.Module | None = None) -> None:
        self.module = module
        self.hook_fn = hook_fn
        self.enabled = True
        self._model = ref(module if model is None else model)
        self._removed = self._used = False
        self._handle = module.register_forward_hook(_Call(self))
        record_last(module)

    def _apply(self, output: Any) -> Any:
        if self._removed or not self.enabled:  # a deep copy of the model calls a removed hook
            return output
        self._used = True
        return self.hook_fn(output)

    def remove(self) -> None:
        """Take the hook off its module for good."""
        self._removed = True
        self._handle.remove()

    def __del__(self) -> None:
        if self._removed or sys.is_finalizing():
            return
        if not self._used and (model := self._model()) is not None:
            say_once(
                model,
                "an attack left the model unused, because nothing holds its wrappers: keep the second value that "
                "fused_latent_pgd returns for as long as the attack is to be in force",
            )
        self.remove()


def _hooks_on(model: nn.Module) -> list[CustomHook]:
    calls = [(m, call) for m in model.modules() for call in m._forward_hooks.values() if isinstance(call, _Call)]
    hooks = [(module, call.hook()) for module, call in calls]
    return [hook for module, hook in hooks if hook is not None and hook.module is module]  # a deep copy's is another's


def clear_hooks(model: nn.Module) -> None:
    """Take every hook of `fused_latent_pgd` off the model, enabled or not."""
    for hook in _hooks_on(model):
        hook.remove()


def make_room(model: nn.Module, accumulation: str) -> None:
    """Take the attacks in force off the model before a new one.

    Args:
        accumulation: "each" lets disabled hooks stay, so that every micro-batch keeps its own; "upstream" removes all.
    """
    for hook in _hooks_on(model):
        if hook.enabled or accumulation == "upstream":
            hook.remove()


def install(model: nn.Module, attack: AttackResult, epsilon: float) -> list[CustomHook]:
    """Put an attack in force: one `CustomHook` a site, until it is removed or dropped.

    The perturbations require no gradient: the defence would compute one that nobody reads.
    """
    wrappers = []
    for site in attack.sites:
        delta = attack.delta(site.name)
        adversary = GDAdversary(delta.shape[-1], epsilon, attack.grid >= 0, device=delta.device)
        adversary.attack.data = delta
        adversary.attack.requires_grad_(False)
        wrappers.append(CustomHook(site.module, adversary, model))
    return wrappers
