"""Every codec agrees with itself up to rounding: with drafts, padding, reordering, forks and dense reads."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from hf_kvcache.codecs import specs
from tests.choosing import chosen
from tests.generation.layers import EXACT, KINDS, Layer, States, states
from tests.running import UNPACKED, assert_packed, one_of_each_codec


def _codecs_and_kinds(test: int) -> pytest.MarkDecorator:
    """One width of every codec, in turn with full attention and a window. The next test takes the other of the two."""
    fast = [(spec, KINDS[(place + test) % 2]) for place, spec in enumerate(one_of_each_codec())]
    return chosen("spec, kind", specs(), KINDS, fast=fast)


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


@_codecs_and_kinds(0)
def test_drafts_equal_plain_decoding(kind: str, spec: str) -> None:
    """Accepted and rejected draft tokens over several pages: the cropped tokens leave no trace."""
    start = UNPACKED - 9
    tokens = states(start + 80)
    plain = Layer(kind, spec)
    expected = plain.steps(tokens, start)
    drafting = Layer(kind, spec)
    drafting.cache.activate_past_recording()
    outputs = [drafting(tokens.at(0, start))]
    drafting.cache.crop(0)
    choose, at = random.Random(spec), start
    while at < tokens.length:
        right = min(choose.randint(1, 5), tokens.length - at)
        wrong = choose.choice([0, 0, 1, 2, 3])
        drafted = tokens.at(at, at + right)
        if wrong:
            drafted = drafted.then(states(wrong, seed=at + 1))
        outputs.append(drafting(drafted)[:, :right])
        drafting.cache.crop(-wrong)
        drafting.cache.integrity()
        at += right
    assert_packed(drafting.cache)
    assert drafting.cache.memory().packed_elements == plain.cache.memory().packed_elements
    _assert_close(torch.cat(outputs, 1), expected)


@_codecs_and_kinds(1)
def test_padded_rows_equal_solo_runs(kind: str, spec: str) -> None:
    """Sequences of different lengths pack at different steps. The content of padding does not matter."""
    lengths, new = [21, 60, 90], 30
    alone = [states(length + new, seed=length) for length in lengths]
    width = max(lengths)
    padded = [states(width - length, seed=999).then(row) for length, row in zip(lengths, alone, strict=True)]
    batch = States(*(torch.cat(sides) for sides in zip(*padded, strict=True)))
    valid = torch.stack([torch.arange(width + new) >= width - length for length in lengths])
    together = Layer(kind, spec)
    outputs = [together(batch.at(0, width), valid)]
    outputs += [together(batch.at(t, t + 1), valid) for t in range(width, width + new)]
    assert_packed(together.cache)
    for row, length in enumerate(lengths):
        expected = Layer(kind, spec).steps(alone[row], length)
        _assert_close(torch.cat(outputs, 1)[row, width - length :], expected[0])


@_codecs_and_kinds(2)
def test_moved_rows(kind: str, spec: str) -> None:
    """Repeated, selected and reordered sequences keep all of their stored tokens."""
    tokens, new = states(62, 3), states(30, 3, seed=5)
    layer = Layer(kind, spec)
    layer(tokens)
    expected = layer.fork().steps(new)
    repeated, selected, reordered = (layer.fork() for _ in range(3))
    repeated.cache.batch_repeat_interleave(2)
    selected.cache.batch_select_indices(torch.tensor([2, 0]))
    reordered.cache.reorder_cache(torch.tensor([1, 1, 0]))
    for moved, rows in ((repeated, [0, 0, 1, 1, 2, 2]), (selected, [2, 0]), (reordered, [1, 1, 0])):
        outputs = moved.steps(new.rows(rows))
        assert_packed(moved.cache)
        _assert_close(outputs, expected[rows])
    for row in range(3):
        solo = Layer(kind, spec)
        solo(tokens.rows([row]))
        _assert_close(solo.steps(new.rows([row])), expected[[row]])


@_codecs_and_kinds(3)
def test_forks_are_independent(kind: str, spec: str) -> None:
    """Two forks that decode in turn give what they give one after the other."""
    prefix, ways = states(62), [states(30, seed=seed) for seed in (1, 2)]
    expected = [Layer(kind, spec).steps(prefix.then(way), 62)[:, 62:] for way in ways]
    first = Layer(kind, spec)
    first(prefix)
    forks = [first, first.fork()]
    outputs = [[fork(way.at(t, t + 1)) for fork, way in zip(forks, ways, strict=True)] for t in range(30)]
    for fork, ours, theirs in zip(forks, zip(*outputs, strict=True), expected, strict=True):
        assert_packed(fork.cache)
        assert torch.equal(torch.cat(ours, 1), theirs)


@_codecs_and_kinds(4)
def test_dense_tensors_hold_what_attention_reads(kind: str, spec: str) -> None:
    """Attention over the dense form of the handles equals attention over pages."""
    tokens = states(100)
    cuts = [0, 60, 61, 62, 79, *range(80, 101)]
    fused, dense = Layer(kind, spec), Layer(kind, spec)
    for start, stop in pairwise(cuts):
        new = tokens.at(start, stop)
        expected = fused(new)
        key, value = dense.cache.update(new.key, new.value, 0)
        scores = new.query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 16**-0.5
        first = stop - key.shape[2]
        queries, keys = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None]
        hidden = keys > queries
        if (window := fused.cache.own_layers[0].sliding_window) is not None:
            hidden = hidden | (keys <= queries - window)
        output = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
        _assert_close(output.transpose(1, 2), expected)
    assert_packed(dense.cache)
    assert dense.cache.memory().packed_elements == fused.cache.memory().packed_elements


@_codecs_and_kinds(5)
def test_crop_within_the_tail(kind: str, spec: str) -> None:
    """Tokens that were removed from the tail can be added again, with the same result."""
    tokens = states(71)
    layer = Layer(kind, spec)
    layer(tokens.at(0, 63))
    if kind == "sliding":
        layer.cache.activate_past_recording()
    before = layer.steps(tokens.at(63, 71))
    layer.cache.crop(-8)
    assert layer.cache.get_seq_length() == 63
    after = layer.steps(tokens.at(63, 71))
    assert_packed(layer.cache)
    _assert_close(after, before)


@_codecs_and_kinds(6)
def test_reset_forgets(kind: str, spec: str) -> None:
    """After a reset no earlier content has an effect, not even its key mean."""
    layer, tokens = Layer(kind, spec), states(90)
    layer(states(80, 2, seed=7))
    layer.cache.reset()
    assert torch.equal(layer.steps(tokens, 60), Layer(kind, spec).steps(tokens, 60))
    assert_packed(layer.cache)
