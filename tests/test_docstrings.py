"""The examples in docstrings give what they print."""

import doctest
import importlib
import pkgutil

import pytest

import lpa
import lpa_kernels


def with_examples():
    """The names of all modules whose source holds an example."""
    for package in (lpa_kernels, lpa):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = module.module_finder.find_spec(module.name).loader.get_source(module.name)
            if source and ">>> " in source:
                yield module.name


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_docstrings(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed
