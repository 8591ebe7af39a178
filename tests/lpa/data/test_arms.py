"""The arms of the shipped statements and of the IPIP inventory: who agrees with what."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from lpa import assets
from lpa.data import AGREE, DISAGREE, DataError, ipip_statements, load_pairs, statements
from lpa.data.arms import ARMS, SHIPPED, arm

needs_ipip = pytest.mark.skipif(not assets.is_cached("ipip-neo-120"), reason="the inventory is not in the cache")


def chosen(name: str) -> dict[str, str]:
    return {row["prompt"]: row["chosen"] for row in arm(name)}


def check_arms(prefix: str) -> None:
    bad, good, both = (chosen(f"{prefix}{name}") for name in ("undesirable", "desirable", "both"))
    assert set(bad.values()) == {DISAGREE}
    assert set(good.values()) == {AGREE}
    assert both == bad | good
    swapped, dealt = chosen(f"{prefix}inverted"), chosen(f"{prefix}shuffled")
    assert all(swapped[text] != answer for text, answer in both.items())
    assert dealt.keys() == both.keys()
    agreement = sum(dealt[text] == answer for text, answer in both.items()) / len(both)
    assert 0.3 < agreement < 0.7, "the answers say nothing about the statements"
    other = chosen(f"{prefix}irrelevant")
    assert not other.keys() & both.keys()
    assert set(other.values()) == {AGREE, DISAGREE}
    for row in arm(f"{prefix}shuffled"):
        assert {row["rejected"], row["chosen"]} == {AGREE, DISAGREE}


def test_the_arms_of_the_shipped_statements() -> None:
    check_arms("")
    assert len(load_pairs(kind="both")) == len(statements()) + len(statements("desirable"))


@needs_ipip
def test_the_arms_of_the_inventory() -> None:
    check_arms("ipip-")
    assert len(SHIPPED) == 2 * len(ARMS)


@needs_ipip
def test_the_inventory_has_its_traits_and_keys() -> None:
    rows = [row for kind in ("undesirable", "desirable", "irrelevant") for row in ipip_statements(kind)]
    assert Counter(row["trait"] for row in rows) == dict.fromkeys(
        ("agreeableness", "conscientiousness", "neuroticism", "openness", "extraversion"), 24
    )
    assert len({row["statement"] for row in rows}) == 120
    kinds = {row["statement"]: row["kind"] for row in rows}
    assert kinds["I trust others."] == "desirable"
    assert kinds["I cheat to get ahead."] == "undesirable"
    assert kinds["I panic easily."] == "undesirable"
    assert kinds["I remain calm under pressure."] == "desirable"
    assert kinds["I love to daydream."] == "irrelevant"


@needs_ipip
def test_no_shipped_statement_is_an_item_of_the_inventory_or_close_to_one() -> None:
    def words(text: str) -> set[str]:
        return {word[:5] for word in re.findall(r"[a-z']+", text.lower()) if len(word) > 3}

    shipped = [row["statement"] for kind in ("undesirable", "desirable") for split in ("train", "heldout", "canary")
               for row in statements(kind, split)]  # fmt: skip
    items = [row["statement"] for kind in ("undesirable", "desirable", "irrelevant") for row in ipip_statements(kind)]
    for one in [*shipped, *(row["statement"] for row in statements("irrelevant"))]:
        for other in items:
            both = words(one) | words(other)
            assert len(words(one) & words(other)) / len(both) < 0.5, (one, other)


def test_an_unknown_arm_and_a_split_that_an_arm_lacks_are_named() -> None:
    with pytest.raises(DataError, match=r"kind='bad' is unknown.*ipip-shuffled"):
        arm("bad")
    for name in ("irrelevant", "ipip-both"):
        with pytest.raises(DataError, match=f"the statements '{name}' have no split 'heldout'; use train"):
            load_pairs(kind=name, split="heldout")
    with pytest.raises(DataError, match=r"kind='both' is unknown for IPIP statements"):
        ipip_statements("both")
