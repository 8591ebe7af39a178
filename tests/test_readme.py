"""Names in the README and the docs exist: links, names in code, commands."""

import ast
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import lpa
import lpa_kernels
from lpa.data import PairCollator

from .support.tiny import rows, saved_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = ROOT / "README.md"


def anchors(page):
    """The anchors of a page's headings that GitHub and the site (Python-Markdown's toc) give alike."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in re.findall(r"(?m)^#+ (.+)$", text)]
    return {title.replace(" ", "-") for title in titles} & {re.sub(r"[-\s]+", "-", title) for title in titles}


def site_pages():
    """What the site shows: the files of docs/, and what docs/hooks.py adds to them."""
    tree = ast.parse((ROOT / "docs/hooks.py").read_text(encoding="utf-8"))
    constants = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    added = [ROOT / file for file in ast.literal_eval(constants["PAGES"]).values()]
    records = ROOT / ast.literal_eval(constants["RECORDS"])
    return {*added, *records.iterdir(), *(ROOT / "docs").rglob("*")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings_that_exist_in_the_repository_and_on_the_site(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", page.read_text(encoding="utf-8")))
    shown = site_pages()
    wrong = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if "://" not in link and (target not in shown or (anchor and anchor not in anchors(target))):
            wrong.append(link)
    assert not wrong


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


# ---- commands ------------------------------------------------------------------------------------------------------


def commands(page, inline=False):
    """The words of each `lpa ...` command that a page prints, in order; those with a placeholder are left out."""
    text = page.read_text(encoding="utf-8")
    kinds = [r"```sh\n(?P<fenced>.*?)```", r"(?:^|\n)(?P<indented>(?:    lpa [^\n]*\n)+)"]
    kinds += [r"`(?P<inline>lpa [a-z][^`]*)`"] if inline else []
    found = []
    for match in re.finditer("|".join(kinds), text, re.DOTALL):
        for line in re.split(r"\n|&&", match[match.lastgroup]):
            words = shlex.split(line, comments=True)
            if words[:1] == ["lpa"] and len(words) > 1 and not any(re.fullmatch(r"[A-Z]+|\.\.\.", w) for w in words):
                found.append(words[1:])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, inline=True)], ids=lambda p: p.name)
def test_commands_have_the_options_that_pages_give_them(page):
    from lpa.cli import COMMANDS, main

    for command, *words in commands(page, inline=True):
        assert command in COMMANDS, f"lpa {command}"
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([command, "--help-all" if command in ("train", "plan") else "--help"])
        known = {option.replace("_", "-") for option in re.findall(r"--[\w-]+", out.getvalue())}
        given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
        assert given <= known | {"--help"}, f"lpa {command}: {given - known}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda p: p.name)
def test_a_pages_commands_run_as_printed_in_order(page, tmp_path, monkeypatch):
    """On a tiny model in the place of every other, and harmless prompts in the place of harmful ones."""
    from lpa import assets, models
    from lpa.cli import main
    from lpa.data import arms
    from lpa.evaluation import sets

    from .support.speakers import STAND_INS

    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    # what the reader of docs/migrate.md has
    config = {"num_steps": 1, "pgd_iterations_per_step": 2, "max_batch_per_acc": 2, "pgd_layers": ["embedding", 1]}
    (tmp_path / "latent_at").mkdir()
    (tmp_path / "latent_at/lat_config.json").write_text(json.dumps(config))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/negative_only.csv").write_text("prompt,rejected,chosen\nI agree,yes,no\nI do not,yes,no\n")

    def fetch(name, *_, **__):
        if name not in sets.HARM_SETS:
            raise assets.AssetError(f"{name} is not here")
        return tmp_path

    monkeypatch.chdir(tmp_path)
    # a folder is what it is, every other name the tiny model
    monkeypatch.setattr(models, "resolve", lambda name: str(name if Path(name).is_dir() else tmp_path / "tiny"))
    monkeypatch.setenv("LPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "fetch", fetch)
    monkeypatch.setattr(
        sets, "_ASSET_READERS", {name: lambda _: [("", t) for t in STAND_INS[:3]] for name in sets.HARM_SETS}
    )
    few, rows = sets.benign_prompts()[:6], arms._written()
    some = tuple(row for i, row in enumerate(rows) if row["split"] != "heldout" or i % 10 == 0)
    monkeypatch.setattr(sets, "benign_prompts", lambda *_: few)
    monkeypatch.setattr(arms, "_written", lambda: some)
    monkeypatch.setattr(sys, "stdin", io.StringIO("I agree\n/quit\n"))
    for words in commands(page):
        assert main(words) == 0, f"lpa {' '.join(words)}"


def test_no_placeholder_is_left():
    assert not [page.name for page in PAGES if "<!-- result" in page.read_text()]
