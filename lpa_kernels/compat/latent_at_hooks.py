"""The perturbations of latent_at as they sit on a model: hooks that can be toggled, and that leave it by themselves."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from ..attack import LatentAttack
from ..model.hooks import rows_by_length
from ..model.sites import hidden_of, with_hidden
from ..ops import perturb, project_

logger = logging.getLogger(__name__)


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, the first time."""
    logger.warning(message)


class GDAdversary(nn.Module):
    """A perturbation by position, with the attributes of the public class of this name.

    Unlike there it is added out of place, in float32, and reads the outputs of modules that return tuples.

    Args:
        dim: width.
        epsilon: radius.
        attack_mask: [B, S] bool.
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

        Positions beyond the perturbation's are left alone, and so is a call of one position (generation with a
        cache: the perturbation is in the cached states).

        Raises:
            ValueError: a batch of another size.
        """
        hidden = hidden_of(output, "the hooked module")
        size, attacked = self.attack_mask.shape
        length = hidden.numel() // hidden.shape[-1] // (hidden.shape[0] if hidden.dim() > 2 else size)
        if length == 1 and attacked != 1:
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
    """What the module calls: the hook, while it lives. A deep copy of the model shares it; a saved model is clean."""

    def __init__(self, hook: CustomHook | None = None) -> None:
        self._hook = (lambda: None) if hook is None else ref(hook)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hook = self._hook()
        return output if hook is None else hook._apply(output)

    def __deepcopy__(self, memo: Any) -> _Call:
        return self

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return _Call, ()


class CustomHook:
    """One perturbed module: `.module`, `.hook_fn` (its `GDAdversary`), and `.enabled`, which may be toggled.

    It is in force as long as this object lives: where the caller lets go of it, it leaves the module. So a trainer
    that clears hooks with a function of its own, which does not know these, still ends with a clean model, and the
    attacks of past micro-batches do not pile up.
    """

    def __init__(self, module: nn.Module, hook_fn: nn.Module) -> None:
        self.module = module
        self.hook_fn = hook_fn
        self.enabled = True
        self._removed = self._used = False
        self._handle = module.register_forward_hook(_Call(self))
        _in_place.setdefault(module, WeakSet()).add(self)

    def _apply(self, output: Any) -> Any:
        if self._removed or not self.enabled:  # removed, and still called: on a deep copy of the model
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
        if not self._used:
            say_once(
                "an attack was taken off the model before any use, because nothing holds its wrappers: keep the second "
                "value that fused_latent_pgd returns for as long as the attack is to be in force"
            )
        self.remove()


_in_place: WeakKeyDictionary[nn.Module, WeakSet[CustomHook]] = WeakKeyDictionary()  # by perturbed module


def _hooks_on(model: nn.Module) -> Iterator[CustomHook]:
    for module in model.modules():
        yield from list(_in_place.get(module, ()))


def clear_hooks(model: nn.Module) -> None:
    """Take every hook of `fused_latent_pgd` off the model, enabled or not."""
    for hook in _hooks_on(model):
        hook.remove()
        _in_place[hook.module].discard(hook)


def make_room(model: nn.Module, accumulation: str) -> None:
    """A new attack takes the place of those in force; disabled ones stay, so that every micro-batch keeps its own."""
    for hook in _hooks_on(model):
        if hook.enabled or accumulation == "upstream":
            hook.remove()
            _in_place[hook.module].discard(hook)


def install(attack: LatentAttack, epsilon: float) -> list[CustomHook]:
    """Put an attack in force, one `CustomHook` a site, until `clear_hooks`, the next attack, or the hooks are dropped.

    The perturbations want no gradient: the defence would compute and keep one that nobody reads.
    """
    wrappers = []
    for site in attack.sites:
        delta = attack.delta(site.name)
        adversary = GDAdversary(delta.shape[-1], epsilon, attack.grid >= 0, device=delta.device)
        adversary.attack.data = delta
        adversary.attack.requires_grad_(False)
        wrappers.append(CustomHook(site.module, adversary))
    return wrappers
