"""What the README and the docs name is there: links, names in code, commands."""

import re
from pathlib import Path

import pytest

import lpa
import lpa_kernels
from lpa.data import PairCollator

from .support.tiny import rows, saved_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_modules_are_there(page):
    text = page.read_text()
    files = re.findall(r"`([\w./]+/\w+\.(?:py|cpp|cu|h|inl))`", text)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text)]
    places = [ROOT, ROOT / "lpa_kernels", ROOT / "lpa"]
    missing = [file for file in files if not any((place / file).exists() for place in places)]
    missing += [m for m in modules if not ((ROOT / f"{m}.py").exists() or (ROOT / m / "__main__.py").exists())]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_exist(page):
    text = page.read_text()
    for package in (lpa, lpa_kernels):
        imports = re.findall(rf"from {package.__name__} import ([\w, ]+)", text)
        names = [name.split(" as ")[0].strip() for line in imports for name in line.split(",")]
        names += re.findall(rf"\b{package.__name__}\.(\w+)\(", text)
        assert [name for name in names if not hasattr(package, name)] == []


def test_the_readme_names_commands_that_exist():
    from lpa.cli import COMMANDS

    named = set(re.findall(r"\blpa (train|traits|assets|evaluate|report|chat|export|plan)\b", README.read_text()))
    assert named <= set(COMMANDS)
    assert "train" in named


def test_the_readmes_python_runs_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    names = {"model": tiny_model(len(tokenizer), depth=17), "batch": PairCollator(tokenizer)(rows(2))}
    smaller = {"Qwen/Qwen3-8B": saved_tiny(tmp_path / "tiny"), "lpa_steps=30": "lpa_steps=1, use_cpu=True"}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for block in blocks:
        for full, small in smaller.items():
            block = block.replace(full, small)
        exec(block, names)
    assert len(names["attack"].losses) == 16
    assert (tmp_path / "runs/qwen3/adapter_model.safetensors").is_file()


def test_no_placeholder_is_left():
    assert not [page.name for page in PAGES if "<!-- result" in page.read_text()]
