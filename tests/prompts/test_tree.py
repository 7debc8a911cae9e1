"""The radix tree and the index of digests against a list of sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.prompts.digests import BLOCK, DigestIndex, name_of, prompt_digests
from hf_kvcache.prompts.tree import RadixTree

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=14)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, st.lists(st.integers(0, 13), max_size=8), st.lists(st.integers(0, 2), max_size=9))
def test_tree(sequences: list[list[int]], removed: list[int], asked: list[int]) -> None:
    """After insertions and removals, a match is what a look at every sequence gives."""
    tree: RadixTree[tuple[int, ...]] = RadixTree()
    held = set()
    for ids in sequences:
        tree.insert(np.array(ids), tuple(ids))
        held.add(tuple(ids))
    for number in removed:
        ids = sequences[number % len(sequences)]
        tree.remove(np.array(ids))
        held.discard(tuple(ids))
    depth, path, below = tree.match(np.array(asked, dtype=np.int64))
    assert depth == max((common(list(ids), asked) for ids in held), default=0)
    assert path == [(n, tuple(asked[:n])) for n in range(len(asked), 0, -1) if tuple(asked[:n]) in held]
    assert set(below) == {ids for ids in held if list(ids[:depth]) == asked[:depth]}
    for ids in sequences:
        assert (tree.get(np.array(ids)) is not None) == (tuple(ids) in held)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_digests(data: st.DataObject) -> None:
    """Blocks of 64 tokens from two alphabets: the index finds whole prompts, and whole blocks of longer ones."""
    blocks = [np.full(BLOCK, 5), np.arange(BLOCK)]
    choice = st.tuples(st.lists(st.integers(0, 1), max_size=3), st.integers(1, BLOCK - 1))
    prompts = [
        np.concatenate([*(blocks[i] for i in which), np.full(rest, 9)]).astype(np.int64)
        for which, rest in data.draw(st.lists(choice, min_size=1, max_size=6))
    ]
    index, held = DigestIndex(), {name_of(ids): ids for ids in prompts}
    for name, ids in held.items():
        index.add(name, len(ids), prompt_digests(ids))
    for name in data.draw(st.lists(st.sampled_from(sorted(held)), max_size=2)):
        index.remove(name)
        held.pop(name, None)
    asked = data.draw(st.sampled_from(prompts))
    asked = np.concatenate([asked, blocks[data.draw(st.integers(0, 1))]])
    whole = {(len(i), name) for name, i in held.items() if len(i) <= len(asked) and (asked[: len(i)] == i).all()}
    found = index.match(asked)
    assert {(n, name) for n, name, complete in found if complete} == whole
    shared = {name: common(list(i), list(asked)) // BLOCK * BLOCK for name, i in held.items()}
    partly = max((n for name, n in shared.items() if n < len(held[name])), default=0)
    assert {(n, name) for n, name, complete in found if not complete} == {
        (partly, name) for name, n in shared.items() if n == partly > 0
    }
