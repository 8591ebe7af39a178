"""Replace functions and classes of foreign code in every loaded module that holds them, and put them back."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any


def foreign_module(package_or_module: str | ModuleType) -> ModuleType:
    """The module itself, or the module of this name, imported.

    Raises:
        ImportError: it cannot be imported; the message says what is missing.
        TypeError: neither a module nor a name.
    """
    if isinstance(package_or_module, ModuleType):
        return package_or_module
    if not isinstance(package_or_module, str):
        raise TypeError(f"expected a module or its name, not {package_or_module!r}")
    try:
        return importlib.import_module(package_or_module)
    except ImportError as error:
        raise ImportError(
            f"cannot patch {package_or_module!r}: {error}; put the clone's folder on sys.path and install what it "
            "imports, or pass the module that has the functions"
        ) from error


def imports(package: ModuleType, submodule: str) -> bool:
    """Import a submodule, and return True; return False where `package` is no package or has no such submodule.

    Raises:
        ImportError: the submodule exists and cannot be imported.
    """
    name = f"{package.__name__}.{submodule}"
    importable = hasattr(package, "__path__") and sys.modules.get(package.__name__) is package
    if not importable or importlib.util.find_spec(name) is None:
        return False
    foreign_module(name)
    return True


def _loaded(also: ModuleType) -> Iterator[ModuleType]:
    """`also`, which need not be in sys.modules, and every loaded module outside lpa_kernels."""
    others = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] != "lpa_kernels" and m is not also]
    yield from (m for m in [also, *others] if isinstance(m, ModuleType))


def find_in(module: ModuleType, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """The objects of these names in a module, its loaded submodules, and the modules that define them."""
    inside = [m for m in _loaded(module) if m is module or m.__name__.startswith(module.__name__ + ".")]
    homes = [sys.modules.get(getattr(vars(m).get(n), "__module__", "")) for m in inside for n in names]
    found: dict[str, list[Any]] = {name: [] for name in names}
    for place in inside + [m for m in homes if m is not None]:
        for name in names:
            value = vars(place).get(name)
            if value is not None and all(value is not other for other in found[name]):
                found[name].append(value)
    return found


def same_parameters(name: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> inspect.Signature:
    """Their signature, if ours takes every parameter of it.

    Raises:
        ValueError: ours does not, or needs one more; the message lists them.
    """
    signature = inspect.signature(theirs)
    known = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    foreign = [str(p) for p in signature.parameters.values() if p.kind is not p.POSITIONAL_OR_KEYWORD]
    foreign += [p for p in signature.parameters if p not in known and p not in foreign]
    missing = [
        p.name
        for p in inspect.signature(ours).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name not in signature.parameters
    ]
    if foreign or missing:
        raise ValueError(
            f"{getattr(theirs, '__module__', '?')}.{name} is of a version that this replacement does not know: "
            f"unknown parameters {foreign}, missing {missing}; known are {known}. Nothing was patched"
        )
    return signature


class Patch:
    """Replacements in force, until `undo`; also a context manager.

    Args:
        module: the foreign module that was named.
        pairs: their object and ours, one pair each.
        on_undo: called once at the end.
    """

    def __init__(self, module: ModuleType, pairs: list[tuple[Any, Any]], on_undo: Callable[[], None]) -> None:
        self._module = module
        self._on_undo: Callable[[], None] | None = on_undo
        self._pairs = pairs
        self._places: list[tuple[ModuleType, str, Any, Any]] = []
        try:
            self._replace(pairs)
        except BaseException:
            self.undo()
            raise

    def _replace(self, pairs: list[tuple[Any, Any]]) -> None:
        # wherever an object is bound: after `from package import *` a trainer holds its own reference
        exchange = {id(old): (old, new) for old, new in pairs}
        for module in _loaded(self._module):
            for name, value in list(vars(module).items()):
                if id(value) in exchange:
                    old, new = exchange[id(value)]
                    setattr(module, name, new)
                    self._places.append((module, name, old, new))

    @property
    def places(self) -> Mapping[str, Any]:
        """The originals of all replaced names, by "module.name"."""
        return {f"{module.__name__}.{name}": old for module, name, old, _ in self._places}

    def undo(self) -> None:
        """Put everything back. A second call does nothing."""
        for module, name, old, new in reversed(self._places):
            if vars(module).get(name) is new:
                setattr(module, name, old)
        # also in modules that imported ours meanwhile; not our classes, which may be in use outside this patch
        self._replace([(ours, theirs) for theirs, ours in self._pairs if not inspect.isclass(ours)])
        self._places = []
        done, self._on_undo = self._on_undo, None
        if done is not None:
            done()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
