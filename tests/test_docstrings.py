"""Public docstrings are what tools and readers take them for: their arguments exist, and their examples work."""

import dataclasses
import doctest
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOMS = sorted(
    f"diffmem.{path.parent.name}"
    for path in (Path(__file__).parents[1] / "diffmem").glob("*/__init__.py")
    if "__all__ = [" in path.read_text() and path.parent.name not in ("demo", "cli")
)
# Their docstrings may still describe arguments in running text.
PLAIN = ("diffmem.sampling.",)
SECTION = re.compile(r"^(Args|Attributes):\n((?:    .*\n|\n)+)", re.MULTILINE)


MODULES = {room: importlib.import_module(room) for room in ROOMS}


def public_names() -> dict[str, object]:
    """Functions and classes in the `__all__` of each room."""
    found = {f"{name}.{each}": getattr(room, each) for name, room in MODULES.items() for each in room.__all__}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


PUBLIC = public_names()


def documented(value: object) -> dict[str, list[str]]:
    """The names that the sections of a docstring describe."""
    sections = SECTION.findall(inspect.getdoc(value) + "\n")
    return {section: re.findall(r"^    \*{0,2}(\w+)[^:\n]*:", body, re.MULTILINE) for section, body in sections}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_docstring_describes_is_there(name):
    value = PUBLIC[name]
    assert inspect.getdoc(value), f"{name} has no docstring"
    sections = documented(value)
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    if not name.startswith(PLAIN) and not is_error and inspect.signature(value).parameters:
        assert sections, f"{name} describes none of its arguments"
    if "Args" in sections:
        assert sections["Args"] == [p for p in inspect.signature(value).parameters if p in sections["Args"]]
        missing = set(inspect.signature(value).parameters) - set(sections["Args"])
        assert not missing, f"{name} does not describe {sorted(missing)}"
    if "Attributes" in sections and dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        assert [each for each in sections["Attributes"] if each in fields] == fields
        assert all(hasattr(value, each) or each in fields for each in sections["Attributes"])


def test_examples_of_docstrings_work(one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    seen, count = set(), 0
    for public_name, value in PUBLIC.items():
        module = importlib.import_module(value.__module__)
        # An example may use the names of its module and its room, numpy and torch.
        names = {**vars(MODULES[public_name.rpartition(".")[0]]), **vars(module), "np": np, "torch": torch}
        for test in finder.find(value, module=module, globs=names):
            if test.examples and (test.filename, test.lineno) not in seen:
                seen.add((test.filename, test.lineno))
                count += len(test.examples)
                assert runner.run(test).failed == 0, test.name
    assert count > 15
