"""What has been found out about a model: one store, one key that says when a fact still holds, one way to forget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules import module as torch_module

from .sharding import shards
from .walk import modules_of

T = TypeVar("T")
logger = logging.getLogger("lpa_kernels")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_HOOKS: dict[int, Any] = {}
_ADAPTER = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")  # of peft's layers


class NotYet(Exception):
    """Raised by what finds a fact out: `value` is the answer for now and is not to be remembered."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Facts:
    """The facts of one module.

    Attributes:
        found: by name and key, what was found out.
        said: messages that were logged.
        key: the model's key while `known` holds it still.
    """

    def __init__(self) -> None:
        self.found: dict[Hashable, Any] = {}
        self.said: set[str] = set()
        self.key: Hashable | None = None


_facts: WeakKeyDictionary[nn.Module, _Facts] = WeakKeyDictionary()


def _of(module: nn.Module) -> _Facts:
    return _facts.setdefault(module, _Facts())


def remembered(module: nn.Module, name: str, key: Hashable, find: Callable[[], T]) -> T:
    """What `find()` gave for this name and key, and gives where it is asked for the first time.

    Args:
        module: the fact's subject. It is held weakly, so a fact must not refer to it.
        key: all that the fact depends on; `model_key` for facts that depend on a whole model.
    """
    found = _of(module).found
    if (name, key) not in found:
        try:
            found[name, key] = find()
        except NotYet as now:
            return now.value
    return found[name, key]


def forget(model: nn.Module) -> None:
    """Forget all facts of a model: verdicts, captured graphs with their memory, copies, and what was said of it."""
    for module in modules_of(model):
        _facts.pop(module, None)


def say_once(model: nn.Module, message: str, level: int = logging.WARNING) -> None:
    """Log a message about a model, once for as long as the model lives."""
    said = _of(model).said
    if message not in said:
        said.add(message)
        logger.log(level, message)


def is_ours(function: Any) -> bool:
    """Whether a hook, or a forward in a module's place, was put there by this package for the time of a pass."""
    return getattr(function, "_of_lpa_kernels", False)


def ours(function: Any) -> Any:
    """`function`, marked as one of this package."""
    function._of_lpa_kernels = True
    return function


def hooks_on(module: nn.Module) -> dict[int, Any]:
    """The hooks on a module's forward and backward passes, by numbers that torch gives once, but for `is_recorder`."""
    own = module.__dict__
    first, second, third, fourth = _HOOKS  # spelt out, since a key asks thousands of modules
    if own[first] or own[second] or own[third] or own[fourth]:
        held = {**own[first], **own[second], **own[third], **own[fourth]}
        return {number: hook for number, hook in held.items() if not is_recorder(hook)}
    return _NO_HOOKS


def is_recorder(hook: Any) -> bool:
    """Whether transformers put a hook there to record outputs, which changes nothing.

    The first output_hidden_states=True leaves one on every block for good (utils/output_capturing.py, 5.23).
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody else has hooks on a module: what they do to the few tokens of a probe says nothing of others."""
    return not all(map(is_ours, hooks_on(module).values()))


def hooks_everywhere() -> tuple[int, ...]:
    """The numbers of the hooks that somebody registered for all modules at once."""
    return tuple(number for name in _HOOKS for number in getattr(torch_module, f"_global{name}"))


@contextmanager
def known(model: nn.Module) -> Iterator[None]:
    """Within it the model's key is made once: nobody else changes the model meanwhile."""
    facts = _of(model)
    before = facts.key
    facts.key = before or _key(model)
    try:
        yield
    finally:
        facts.key = before


def model_key(model: nn.Module) -> Hashable:
    """What the facts of a model depend on, beside the values of its weights.

    The classes of its modules, the dtype and device of its parameters, its configuration, the state of its adapters,
    and which hooks and exchanged forwards of others there are: each by a number that torch gives once.
    """
    return _of(model).key or _key(model)


def _key(model: nn.Module) -> Hashable:
    modules = modules_of(model)
    classes = [type(module) for module in modules]
    adapted = {kind for kind in set(classes) if isinstance(getattr(kind, "disable_adapters", None), property)}
    sharded = any(map(shards, set(classes)))
    foreign: list[Any] = [*hooks_everywhere()]
    adapters: list[Any] = []
    kinds: set[Any] = set()
    for index, module in enumerate(modules):
        state = module.__dict__
        if hooks := hooks_on(module):
            foreign += [(index, number) for number, hook in hooks.items() if not is_ours(hook)]
        if "forward" in state and not is_ours(state["forward"]):
            foreign.append((index, _held(state["forward"])))
        if state["_parameters"]:
            kinds.update([(p.dtype, p.device) for p in state["_parameters"].values() if p is not None])
        if classes[index] in adapted:
            adapters.append(tuple(str(getattr(module, name, None)) for name in _ADAPTER))
    # a save notes things in the main rank's configuration alone, and where weights are sharded all ranks must agree
    config = None if sharded else text_config(model)
    settings = None if config is None else hash(str(vars(config)))
    return tuple(classes), tuple(foreign), tuple(adapters), frozenset(kinds), settings


def _held(function: Any) -> Hashable:
    """Something that stands for `function` and for no later object at its address."""
    try:
        held = ref(function)
        hash(held)
    except TypeError:  # what cannot be referred to weakly, or has no hash
        return id(function)
    return held


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's decoder of text; None where it has none."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config
