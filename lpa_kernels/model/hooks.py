"""What is put on a model for the time of a pass, and taken off whatever happens: hooks, and attributes exchanged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .facts import is_recorder, ours
from .walk import modules_of

Hook = Callable[..., Any]


@contextmanager
def hooked(
    after: Iterable[tuple[nn.Module, Hook]] = (),
    before: Iterable[tuple[nn.Module, Hook]] = (),
    *,
    foreign: bool = False,
    with_kwargs: bool = False,
) -> Iterator[None]:
    """Within it, forward hooks `after` and forward pre-hooks `before` are on their modules.

    Args:
        foreign: they count as a user's, which are part of the model's key: an attack within is of the changed model.
        with_kwargs: `before` are called with keyword arguments too.
    """
    handles, mark = [], (lambda hook: hook) if foreign else ours
    try:
        for module, hook in before:
            handles.append(module.register_forward_pre_hook(mark(hook), with_kwargs=with_kwargs))
        for module, hook in after:
            handles.append(module.register_forward_hook(mark(hook)))
            record_last(module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_last(module: nn.Module) -> None:
    """Have transformers record a module's output as it leaves it: `hidden_states` has what hooks set later do too."""
    held = module._forward_hooks
    for number in [number for number, hook in held.items() if is_recorder(hook)]:
        held[number] = held.pop(number)


def not_compiled() -> AbstractContextManager[Any]:
    """Within it what `torch.compile` has compiled runs as it was written: compiled code does not see later hooks."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():  # else nothing is compiled, or all of this
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def forwards(replaced: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within it, modules run other forwards. One that somebody exchanges meanwhile is left to them."""
    held = []
    try:
        for module, forward in replaced:
            held.append((module, forward, module.__dict__.get("forward")))
            module.__dict__["forward"] = ours(forward)
        yield
    finally:
        for module, forward, own in reversed(held):
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own


# What modules call to checkpoint their activations: transformers' layers, and torch's CheckpointWrapper.
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


@contextmanager
def checkpoints(model: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, every function by which a module checkpoints its activations is what `change` makes of it."""
    held = [(m, name, m.__dict__[name]) for m in modules_of(model) for name in _CHECKPOINTS if name in m.__dict__]
    try:
        for module, name, function in held:
            module.__dict__[name] = change(function)
        yield
    finally:
        for module, name, function in held:
            module.__dict__[name] = function
