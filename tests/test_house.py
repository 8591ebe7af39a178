"""How the tests are laid out: they mirror the packages, and none leans on another."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))


def imported(file: Path) -> set[str]:
    """The last parts of the names of the modules that a file imports, and of what it imports from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").rpartition(".")[2], *(name.name for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name.rpartition(".")[2] for name in node.names}
    return found


def test_no_test_file_is_imported() -> None:
    tests = {file.stem for file in FILES}
    assert tests
    leaning = {str(file.relative_to(ROOT)): imported(file) & tests for file in sorted(TESTS.rglob("*.py"))}
    assert not {name: found for name, found in leaning.items() if found}


def test_folders_of_tests_are_folders_of_the_project() -> None:
    folders = {file.parent.relative_to(TESTS) for file in FILES} - {Path()}
    assert folders
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []
