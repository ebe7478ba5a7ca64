"""The examples in docstrings show what they print."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import diffusers_searched_solver


ROOT = Path(__file__).parent.parent
MODULES = [
    module.name
    for module in pkgutil.walk_packages(diffusers_searched_solver.__path__, "diffusers_searched_solver.")
    if not module.name.endswith("__main__")
] + ["search.fit.find"]
WITH_EXAMPLES = {"diffusers_searched_solver.solver", "diffusers_searched_solver.tabulate", "search.fit.find"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_show(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted or name not in WITH_EXAMPLES
