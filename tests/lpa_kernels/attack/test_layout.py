"""Does a packed layout show every label exactly its own text, and waste as little as it says?"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpa_kernels.attack.batch import PairBatch
from lpa_kernels.attack.layout import Layout, pack, unshared
from lpa_kernels.attack.masks import visible

Text = tuple[list[int], list[bool]]


def rows_of(texts: list[Text], spare: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and masks; the padding's tokens are 9, so that reading one shows."""
    width = max(len(ids) for ids, _ in texts) + spare
    ids = torch.tensor([t + [9] * (width - len(t)) for t, _ in texts], dtype=torch.long).view(len(texts), width)
    mask = [m + [False] * (width - len(m)) for _, m in texts]
    return ids, torch.tensor(mask, dtype=torch.bool).view(len(texts), width)


def batch_of(pairs: list[tuple[Text, Text]], attack: list[list[bool]], spare: tuple[int, int] = (0, 0)) -> PairBatch:
    rejected_ids, rejected_mask = rows_of([pair[0] for pair in pairs], spare[0])
    chosen_ids, chosen_mask = rows_of([pair[1] for pair in pairs], spare[1])
    attacked = torch.tensor(attack, dtype=torch.bool).view(len(pairs), -1)
    return PairBatch(rejected_ids, rejected_mask, chosen_ids, chosen_mask, attacked)


def pair_of(prompt: list[int], rejected: list[int], chosen: list[int]) -> tuple[Text, Text]:
    texts = [(prompt + end, [False] * len(prompt) + [True] * len(end)) for end in (rejected, chosen)]
    return texts[0], texts[1]


def needed(text: Text) -> list[int]:
    """The tokens that predict something: all before the last label."""
    ids, mask = text
    last = max((p for p in range(1, len(ids)) if mask[p]), default=0)
    return ids[:last]


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check(layout: Layout, pairs: list[tuple[Text, Text]], attack: list[list[bool]]) -> None:
    """Everything about a layout that follows from what it is for, in slow and obvious Python."""
    rows, length = layout.shape
    row_of = iter(itertools.count())
    delta = [[next(row_of) if attacked else -1 for attacked in line] for line in attack]
    sees = visible(layout)
    labels = [
        (half, pair, p, text[0])
        for half in (0, 1)
        for pair, texts in enumerate(pairs)
        for text in [texts[half]]
        for p in range(1, len(text[0]))
        if text[1][p]
    ]
    assert layout.labels.tolist() == [ids[p] for _, _, p, ids in labels]
    assert layout.rejected.tolist() == [half == 0 for half, *_ in labels]
    assert layout.example.tolist() == [pair for _, pair, _, _ in labels]
    for n, (_, pair, p, ids) in enumerate(labels):
        row, index = int(layout.select_rows[n]), int(layout.select_positions[n])
        position = int(layout.position_ids[row, index])
        seen = [
            (int(layout.position_ids[row, k]), int(layout.input_ids[row, k]), int(layout.token_rows[row * length + k]))
            for k in range(length)
            if sees[row, index, k] and int(layout.position_ids[row, k]) <= position and layout.branch[row, k] >= 0
        ]
        expected = [(i, ids[i], delta[pair][i] if i < len(delta[pair]) else -1) for i in range(p)]
        assert sorted(seen) == expected
    assert layout.attention_mask.tolist() == (layout.branch >= 0).long().tolist()
    padding = layout.branch == -1
    assert layout.padding_share == pytest.approx(int(padding.sum()) / (rows * length))
    assert not layout.input_ids[padding].any()
    assert not layout.position_ids[padding].any()
    assert int(padding[:, 0].sum()) == sum(not needed(a) and not needed(b) for a, b in pairs)
    # row_tokens is token_rows the other way round
    there = {(int(r), t) for t, r in enumerate(layout.token_rows) if r >= 0}
    back = {(r, int(t)) for r, tokens in enumerate(layout.row_tokens) for t in tokens if t >= 0}
    assert there == back
    assert layout.row_tokens.shape == (sum(map(sum, attack)), 2)


def places(pairs: list[tuple[Text, Text]], apart: tuple[bool, ...]) -> int:
    """Rows x length when the pairs of `apart` stand in two rows."""
    lengths = []
    for (a, b), split in zip(pairs, apart, strict=True):
        r, c = needed(a), needed(b)
        lengths += [len(r), len(c)] if split else [len(r) + len(c) - common(r, c)]
    return len(lengths) * max(lengths)


def fewest_places(pairs: list[tuple[Text, Text]]) -> int:
    must = [bool(needed(a) and needed(b) and not common(needed(a), needed(b))) for a, b in pairs]
    choices = itertools.product(*[[True] if m else [False, True] for m in must])
    return min(places(pairs, choice) for choice in choices)


tokens = st.integers(1, 3)
# few tokens, so that prompts, completions and their beginnings often coincide
text = st.lists(st.tuples(tokens, st.booleans()), max_size=6).map(
    lambda pairs: ([t for t, _ in pairs], [m for _, m in pairs])
)
prompts = st.lists(tokens, max_size=5)


@st.composite
def pairs_and_attack(draw: st.DrawFn) -> tuple[list[tuple[Text, Text]], list[list[bool]], tuple[int, int]]:
    size = draw(st.integers(1, 4))
    pairs = []
    for _ in range(size):
        prompt = draw(prompts)
        (a, am), (b, bm) = draw(text), draw(text)
        none = [False] * len(prompt)
        pairs.append(((prompt + a, none + am), (prompt + b, none + bm)))
    width = draw(st.integers(0, 14))
    attack = [draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(size)]
    return pairs, attack, (draw(st.integers(0, 2)), draw(st.integers(0, 2)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pairs_and_attack(), st.integers(1, 20))
def test_random_batches(drawn: tuple[list[tuple[Text, Text]], list[list[bool]], tuple[int, int]], least: int) -> None:
    pairs, attack, spare = drawn
    batch = batch_of(pairs, attack, spare)
    if not any(needed(text) for pair in pairs for text in pair):
        layout = pack(batch)
        assert layout.shape == (len(pairs), 1)
        assert layout.labels.shape == (0,)
        assert bool((layout.branch == -1).all())
        assert bool((layout.row_tokens == -1).all())
        return
    layout = pack(batch)
    check(layout, pairs, attack)
    rows, length = layout.shape
    assert rows * length == fewest_places(pairs)
    plain = unshared(batch, least)
    check(plain, pairs, attack)
    assert plain.shape[1] == max(least, unshared(batch).shape[1])
    assert plain.shape[0] == sum(max(bool(needed(a)) + bool(needed(b)), 1) for a, b in pairs)
    assert set(plain.branch.flatten().tolist()) <= {0, -1}


def test_a_pair_in_full() -> None:
    layout = pack(batch_of([pair_of([4, 5, 6], [1, 2, 7], [1, 3, 8, 7])], [[False, True, True, True, True, True]]))
    # the completions share their first token, and the last label of each predicts nothing
    assert layout.input_ids.tolist() == [[4, 5, 6, 1, 2, 3, 8]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    assert layout.branch.tolist() == [[0, 0, 0, 0, 1, 2, 2]]
    assert layout.token_rows.tolist() == [-1, 0, 1, 2, 3, 3, 4]
    assert layout.row_tokens.tolist() == [[1, -1], [2, -1], [3, -1], [4, 5], [-1, 6]]
    assert layout.labels.tolist() == [1, 2, 7, 1, 3, 8, 7]
    assert layout.select_positions.tolist() == [2, 3, 4, 2, 3, 5, 6]
    assert layout.padding_share == 0


def test_one_token_completions_cost_nothing() -> None:
    layout = pack(batch_of([pair_of([4, 5, 6], [1], [2])], [[True] * 4]))
    assert layout.input_ids.tolist() == [[4, 5, 6]]
    assert layout.select_positions.tolist() == [2, 2]
    assert layout.row_tokens.tolist() == [[0, -1], [1, -1], [2, -1], [-1, -1]]


def test_unrelated_texts_stand_in_two_rows() -> None:
    layout = pack(batch_of([pair_of([], [1, 2, 3], [4, 5, 6])], [[True] * 3]))
    assert layout.input_ids.tolist() == [[1, 2], [4, 5]]
    assert layout.branch.tolist() == [[0, 0], [0, 0]]
    assert layout.row_tokens.tolist() == [[0, 2], [1, 3], [-1, -1]]


def test_a_long_pair_that_shares_little_does_not_lengthen_the_others() -> None:
    pairs = [pair_of([4], [1] * 40, [2] * 40), *[pair_of([4] * 20, [1] * 5, [2] * 5)] * 3]
    layout = pack(batch_of(pairs, [[True] * 41] * 4))
    assert layout.shape == (5, 40)


def test_explicit_labels_are_kept() -> None:
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]])
    given_labels = torch.tensor([7, 8])
    batch = PairBatch(ids, mask, ids, mask, torch.ones(1, 4, dtype=torch.bool), given_labels, given_labels + 10)
    layout = pack(batch)
    assert layout.labels.tolist() == [7, 8, 17, 18]
    assert layout.input_ids.tolist() == [[1, 2, 3]]  # the same text twice is one


def test_one_half_alone_stands_in_one_row() -> None:
    batch = batch_of([pair_of([4, 5], [1, 2], [3, 3])], [[True] * 4]).only(rejected=False, chosen=True)
    layout = pack(batch)
    assert layout.input_ids.tolist() == [[4, 5, 3]]
    assert layout.rejected.tolist() == [False, False]
