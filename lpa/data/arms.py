"""Trait statements and the arms made of them: the shipped ones, and those of the IPIP-NEO-120 inventory."""

from __future__ import annotations

import ast
import functools
import hashlib

from lpa import assets

from .tables import DataError, Row, shipped_rows

AGREE = "I agree with this statement."
DISAGREE = "I do not agree with this statement."
TRAITS = ("agreeableness", "conscientiousness", "emotional_stability", "honesty_humility")
KINDS = ("undesirable", "desirable")
IRRELEVANT = "irrelevant"
SPLITS = ("train", "heldout", "canary")
ARMS = (*KINDS, "both", "inverted", IRRELEVANT, "shuffled")
IPIP = "ipip"
SHIPPED = (*ARMS, *(f"{IPIP}-{arm}" for arm in ARMS))


@functools.cache
def _written() -> list[Row]:
    return shipped_rows("statements.jsonl")


def statements(kind: str = "undesirable", split: str = "train") -> list[Row]:
    """The shipped trait statements: rows of id, kind, split, trait, statement, and facet or, of irrelevant ones, key.

    They were written for this project; none is taken from an inventory.

    Args:
        kind: "undesirable", "desirable", or "irrelevant" (openness and extraversion, split "train" alone).
        split: "train", "heldout" for measuring, or "canary" to be watched while a model is trained.

    Raises:
        DataError: an unknown kind or split.
    """
    for name, value, known in (("kind", kind, (*KINDS, IRRELEVANT)), ("split", split, SPLITS)):
        if value not in known:
            raise DataError(f"{name}={value!r} is unknown for the shipped statements; use {' or '.join(known)}")
    return [dict(row) for row in _written() if row["kind"] == kind and row["split"] == split]


def ipip_statements(kind: str = "undesirable") -> list[Row]:
    """Statements of the IPIP-NEO-120 (Johnson 2014, public domain): rows of id, kind, trait, key, statement.

    Items that score low on agreeableness or conscientiousness or high on neuroticism are undesirable (47 of 72), their
    opposites desirable (25). Openness and extraversion are irrelevant (48); the key, + or -, says on which end of the
    trait agreeing scores.

    Raises:
        DataError: an unknown kind. lpa.assets.AssetError: the asset "ipip-neo-120" is unavailable.
    """
    if kind not in (*KINDS, IRRELEVANT):
        raise DataError(f"kind={kind!r} is unknown for IPIP statements; use {' or '.join((*KINDS, IRRELEVANT))}")
    return [dict(row) for row in _ipip() if row["kind"] == kind]


@functools.cache
def _ipip() -> tuple[Row, ...]:
    """All 120, from the literals of a Python file that is parsed and never run."""
    text = (assets.fetch("ipip-neo-120") / "core.py").read_text(encoding="utf-8")
    wanted = ("Qs", "trait_items", "reverse_items")
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted
    }
    rows = []
    for trait, items in found["trait_items"].items():
        for item in items:
            key = "-" if item in found["reverse_items"][trait] else "+"
            good = (key == "+") != (trait == "Neuroticism")
            kind = IRRELEVANT if trait in ("Openness", "Extraversion") else KINDS[good]
            rows.append({"id": f"ipip-{item:03d}", "kind": kind, "trait": trait.lower(), "key": key,
                         "statement": found["Qs"][item]})  # fmt: skip
    return tuple(sorted(rows, key=lambda row: row["id"]))


def arm(name: str, split: str = "train") -> list[Row]:
    """Pairs of an arm: rows of prompt (the statement), rejected, chosen, row, id, trait, and facet where there is one.

    Args:
        name: of `SHIPPED`. "undesirable": agreeing is rejected. "desirable": agreeing is chosen. "both": the two
            together. The controls: "inverted" is "both" with the answers exchanged, "shuffled" is "both" with the
            answers dealt by a hash of the statement, and "irrelevant" has statements of openness and extraversion,
            agreeing chosen where the key is +. With "ipip-" before it, the statements are the inventory's.
        split: of the shipped statements.

    Raises:
        DataError: an unknown arm or split, or a split other than "train" of an arm that has no other.
    """
    if name not in SHIPPED:
        raise DataError(f"kind={name!r} is unknown for the shipped statements; use {' or '.join(SHIPPED)}")
    base = name.removeprefix(f"{IPIP}-")
    if split != "train" and (base != name or base == IRRELEVANT):
        raise DataError(f"the statements {name!r} have no split {split!r}; use train")
    kinds = (base,) if base in (*KINDS, IRRELEVANT) else KINDS
    rows = [row for kind in kinds for row in (ipip_statements(kind) if base != name else statements(kind, split))]
    return [_pair(row, base) for row in rows]


def _pair(row: Row, base: str) -> Row:
    agree = row["kind"] == "desirable" or (row["kind"] == IRRELEVANT and row["key"] == "+")
    if base == "inverted":
        agree = not agree
    elif base == "shuffled":
        agree = hashlib.sha256(row["statement"].encode()).digest()[0] % 2 == 1
    rejected, chosen = (DISAGREE, AGREE) if agree else (AGREE, DISAGREE)
    made = {"prompt": row["statement"], "rejected": rejected, "chosen": chosen, "row": f"statement {row['id']}"}
    return made | {key: row[key] for key in ("id", "trait", "facet") if key in row}
