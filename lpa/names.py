"""Help with a mistyped name. Imports nothing heavy: `lpa --help` must be quick."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for a name that is close to a known one, else nothing."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
