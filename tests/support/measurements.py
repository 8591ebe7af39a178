"""Measurements of canaries as a trainer logs them."""

from __future__ import annotations


def entry(
    step: int = 0, done: float = 0.8, right: float = 0.5, perplexity: float = 30.0, **more: float
) -> dict[str, float]:
    """A measurement with these shares."""
    return {"lpa_step": float(step), "benign_done": done, "disagrees_undesirable": right, "agrees_desirable": right,
            "margin_undesirable": 0.0, "margin_desirable": 0.0, "perplexity": perplexity, "collapsed": 0.0,
            "distinct": 1.0, "trained": 0.0, "entropy": 7.0, "words": 20.0, "seconds": 0.0, **more}  # fmt: skip
