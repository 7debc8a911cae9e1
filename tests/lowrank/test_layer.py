"""Layers whose pages hold low-rank coefficients, against attention by hand over projected tokens."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage.dense_read import dense_side
from tests.generation.layers import KINDS, States, states
from tests.lowrank.one_layer import DIM, FORMS, HEADS, ByHand, OneLayer, assert_close, seen_by, slow
from tests.running import SINKS
from tests.tolerances import TOLERANCES

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 2.0},
    "sink logits": {"s_aux": torch.tensor([-1.0, 0.5, 2.0, 4.0])},
    "both": {"softcap": 3.0, "s_aux": torch.tensor([2.0, -1.0, 1.0, 0.0])},
}


def compare(layer: OneLayer, by_hand: ByHand, tokens: States, cuts: list[int], real: torch.Tensor | None) -> None:
    """Both get the tokens in the same parts and give the same outputs."""
    for a, b in pairwise(cuts):
        so_far = None if real is None else real[:, :b]
        ours, theirs = layer(tokens.at(a, b), so_far), by_hand(tokens.at(a, b), so_far, **layer.call)
        if real is not None:
            ours, theirs = ours[real[:, a:b]], theirs[real[:, a:b]]
        assert_close(ours, theirs)
    layer.cache.integrity()
    assert by_hand.packed > 0, "nothing was packed: the test is vacuous"
    assert layer.cache.memory().packed_elements > 0


def padding(batch: int, length: int) -> torch.Tensor:
    """bool ``[batch, length]``: the first sequence has no padding, others have some at ends of updates (``CUTS``)."""
    real = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        real[row, : 9 * row] = False
        real[row, 57 : 59 + row] = False
        real[row, 88 - row : 90] = False
    return real


#: Ends of the updates after a prompt: steps, a small and a large chunk, and steps again.
CUTS = [50, 51, 52, 57, 90, *range(91, 131, 3)]


@pytest.mark.parametrize("masks", [False, slow(True)])
@pytest.mark.parametrize("padded", [slow(False), True])
@pytest.mark.parametrize("call", ["plain", "both", slow("capped"), slow("sink logits")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_attention_by_hand(kind: str, form: str, call: str, padded: bool, masks: bool) -> None:
    """A prefill, steps and chunks."""
    tokens = states(130, 3, seed=5)
    real = padding(3, 130) if padded else None
    layer = OneLayer(kind, FORMS[form], masks=masks, **CALLS[call])
    by_hand = ByHand(kind, FORMS[form], 3)
    by_hand(tokens.at(0, 50), real, **CALLS[call])
    layer(tokens.at(0, 50), None if real is None else real[:, :50])  # the first tokens have transformers' attention
    compare(layer, by_hand, tokens, CUTS, real)


def test_one_sequence_token_by_token() -> None:
    """From the very first token on, one at a time, past several pages."""
    for form in ("each head", "both heads before rope"):
        layer, by_hand = OneLayer("full", FORMS[form]), ByHand("full", FORMS[form], 1)
        compare(layer, by_hand, states(80), list(range(81)), None)


def test_a_chunk_after_a_single_token() -> None:
    """Several tokens of several sequences, after a single token: each sees itself and the tokens before it."""
    for chunk in (2, 3, 7):
        tokens = states(1 + chunk, 2)
        layer, by_hand = OneLayer("full", FORMS["each head"]), ByHand("full", FORMS["each head"], 2)
        layer(tokens.at(0, 1))
        by_hand(tokens.at(0, 1))
        assert_close(layer(tokens.at(1, 1 + chunk)), by_hand(tokens.at(1, 1 + chunk)))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("block"), st.integers(2, 40), st.booleans()),
        st.tuples(st.just("ones"), st.integers(1, 6), st.booleans()),
        st.tuples(st.just("crop"), st.integers(1, 50), st.none()),
        st.tuples(st.just("select"), st.integers(0, 999), st.none()),
        st.tuples(st.just("fork"), st.booleans(), st.none()),
        st.tuples(st.just("save"), st.none(), st.none()),
    ),
    min_size=3,
    max_size=12,
)


class Run:
    """A layer and the same layer by hand, the padding so far, and forks that are continued later."""

    def __init__(self, form: str) -> None:
        self.pair = OneLayer("full", FORMS[form]), ByHand("full", FORMS[form], 2)
        self.real = torch.ones(2, 0, dtype=torch.bool)
        self.draw = np.random.default_rng(0)
        self.left: list[tuple[tuple[OneLayer, ByHand], torch.Tensor]] = []
        self.block(30, padded=False)

    def block(self, length: int, padded: bool) -> None:
        layer, by_hand = self.pair
        batch, seen = len(by_hand.rows), by_hand.seen
        new = torch.ones(batch, length, dtype=torch.bool)
        for row in new if padded else ():  # padding stands at the ends of an update
            left, right = self.draw.integers(0, 1 + (length + 1) // 2, 2)
            row[:left] = row[length - right :] = False
        self.real = torch.cat([self.real, new], 1)
        real = None if self.real.all() else self.real
        tokens = states(length, batch, seed=seen)
        ours, theirs = layer(tokens, real), by_hand(tokens, real)
        if seen:  # the first tokens have transformers' attention
            assert_close(ours[new], theirs[new])
        layer.cache.integrity()

    def ones(self, count: int, padded: bool) -> None:
        for _ in range(count):
            self.block(1, padded)

    def crop(self, count: int, _: None) -> None:
        layer, by_hand = self.pair
        count = min(count, by_hand.seen - 1)
        layer.cache.crop(-count)
        by_hand.crop(count)
        self.real = self.real[:, : by_hand.seen]

    def select(self, seed: int, _: None) -> None:
        layer, by_hand = self.pair
        rows = np.random.default_rng(seed).integers(0, len(by_hand.rows), 1 + seed % 3).tolist()
        layer.cache.batch_select_indices(torch.tensor(rows))
        by_hand.select(rows)
        self.real = self.real[rows]

    def fork(self, stay: bool, _: None) -> None:
        layer, by_hand = self.pair
        other = layer.fork(), by_hand.fork()
        if not stay:
            other, self.pair = self.pair, other
        self.left.append((other, self.real))

    def save(self, *_: None) -> None:
        layer, _by_hand = self.pair
        state = layer.cache.state_dict()
        layer.cache.reset()
        layer.cache.load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_operations(form: str, steps: list[tuple[str, Any, Any]]) -> None:
    """Updates, crops, moved rows, forks and saving in any order; forks continue from where they were made."""
    run = Run(form)
    for name, first, second in steps:
        getattr(run, name)(first, second)
    run.ones(2, False)
    for pair, real in run.left[:2]:
        run.pair, run.real = pair, real
        run.block(17, False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_equal_plain_decoding(kind: str, form: str) -> None:
    """Drafts that are cropped change nothing, and read pages packed ahead as plain decoding does."""
    tokens = states(110)
    layer, by_hand = OneLayer(kind, FORMS[form]), ByHand(kind, FORMS[form], 1)
    layer(tokens.at(0, 40))
    by_hand(tokens.at(0, 40))
    layer.cache.activate_past_recording()
    layer.cache.crop(0)
    for at in range(40, 110, 5):
        wrong = at % 4
        drafted = tokens.at(at, at + 5).then(states(wrong, seed=at)) if wrong else tokens.at(at, at + 5)
        ours = layer(drafted)[:, :5]
        layer.cache.crop(-wrong)
        assert_close(ours, torch.cat([by_hand(tokens.at(t, t + 1)) for t in range(at, at + 5)], 1))
        layer.cache.integrity()
    assert by_hand.packed > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form: str, dtype: torch.dtype) -> None:
    """The output has the dtype of the query, and the error of that rounding."""
    tokens = States(*(x.to(dtype) for x in states(90)))
    layer, by_hand = OneLayer("full", FORMS[form]), ByHand("full", FORMS[form], 1)
    layer(tokens.at(0, 80))
    by_hand(tokens.at(0, 80))
    output = layer(tokens.at(80, 81))
    assert output.dtype == dtype
    # The scores of these keys are of order 10, and their errors are relative errors of the weights.
    assert_close(output, by_hand(tokens.at(80, 81)), 16 * TOLERANCES[dtype].absolute)


@pytest.mark.parametrize("form", ["both heads", "both heads before rope"])
def test_dense_fallback(form: str) -> None:
    """Handles decode to full-precision sinks and tail, pages projected back, and zeros for padding."""
    tokens, real = states(90, 2), padding(2, 90)
    layer, by_hand = OneLayer("full", FORMS[form]), ByHand("full", FORMS[form], 2)
    for start, stop in pairwise([0, *CUTS[:4], 89]):
        layer(tokens.at(start, stop), real[:, :stop])
        by_hand(tokens.at(start, stop), real)
    key, value = layer.cache.update(tokens.key[:, :, 89:], tokens.value[:, :, 89:], 0)
    assert key.shape == (2, HEADS, 90, DIM)
    for side, handle in (("key", key), ("value", value)):
        expected = torch.zeros(2, HEADS, 90, DIM, dtype=torch.float64)
        for b, row in enumerate(by_hand.rows):
            for token in row:
                expected[b, :, token.position] = getattr(token, side)
        expected[:, :, 89] = getattr(tokens, side)[:, :, 89].double()
        assert_close(handle + 0, expected)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_probabilities(form: str, queries: int) -> None:
    """On request, the probability of each key, summed over the queries, adds up and is that of attention by hand."""
    tokens = states(90, 2)
    layer = OneLayer("full", FORMS[form])
    layer(tokens.at(0, 90))
    own, storage = layer.layer, layer.layer.storage
    assert storage is not None
    held = storage.dense.longest
    dense = DenseTokens(
        storage.dense.keys[:, :, :held],
        storage.dense.values[:, :, :held],
        torch.from_numpy(storage.dense.positions[:, :held].copy()),
    )
    query = tokens.query[:, :, -queries:]
    visibility = Visibility(90 - queries, queries, None, 0, True, None)
    call = AttentionCall(query, None, Scoring(DIM**-0.5))
    result = own.read(call, query, storage.pages(), dense, visibility, sums=True)
    assert result.page_sums is not None and result.dense_sums is not None
    keys = dense_side(storage, "keys", 0, 90).double().repeat_interleave(2, 1)
    hidden = ~seen_by(90 - queries, queries, 90, None)
    weights = (query.double() @ keys.mT * DIM**-0.5).masked_fill(hidden, -math.inf).softmax(-1).sum(2)
    ours = torch.cat([result.dense_sums[..., :SINKS], result.page_sums, result.dense_sums[..., SINKS:]], 2)
    assert_close(ours, weights)


@pytest.mark.parametrize("form", ["each head", "before rope"])
def test_no_gradient(form: str) -> None:
    """A backward pass through the cache is an error, not a wrong gradient."""
    tokens, layer = states(90), OneLayer("full", FORMS[form])
    with torch.no_grad():
        layer(tokens.at(0, 89))
    last = tokens.at(89, 90)
    output = layer(last._replace(query=last.query.requires_grad_()))
    with pytest.raises(RuntimeError, match="no gradient"):
        output.sum().backward()
