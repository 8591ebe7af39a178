"""What the site needs beyond docs/: the root's pages, the records that pages link to, and docstrings in its form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# page of the site -> file of the repository
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "license.md": "LICENSE",
}
RECORDS = "benchmarks/results"
# a target of the repository, as pages of the root and of docs/ name it -> the site's
TARGETS = {f"{up}{file}": page for page, file in PAGES.items() for up in ("", "../")}
FOLDERS = {"docs/": "", f"../{RECORDS}/": "records/", f"{RECORDS}/": "records/"}


def on_files(files: Any, config: Any) -> Any:
    """Add the root's pages and the records."""
    for page, file in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    for record in sorted((ROOT / RECORDS).iterdir()):
        files.append(File.generated(config, f"records/{record.name}", abs_src_path=str(record)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of the repository become links of the site."""
    return re.sub(r"\]\(([^)#\s]+)", lambda link: f"]({_target(link[1])}", markdown)


def _target(link: str) -> str:
    if link in TARGETS:
        return TARGETS[link]
    for folder, place in FOLDERS.items():
        if link.startswith(folder):
            return place + link.removeprefix(folder)
    return link


class OurDocstrings(Extension):
    """Docstrings as griffe reads them: examples as code, and an entry of its own for each name of `a, b: text`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(
                r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n {8}.*)*)", _each, obj.docstring.value, flags=re.M
            )
            # as plain Markdown, `>>>` is a quotation in a quotation
            obj.docstring.value = re.sub(r"^>>> .*(?:\n(?=.*\S).*)*", r"```pycon\n\g<0>\n```", text, flags=re.M)


def _each(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))
