"""Layers whose pages hold latents, against attention by hand over tokens that went through the projection."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kvcache.codecs import resolve, specs
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.cpu import decode as native
from hf_kvcache.kernels.dispatch import reason_missing
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.lowrank.encoder import LowRankEncoder
from hf_kvcache.lowrank.projection import LayerProjection, SideProjection
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.dense_read import dense_side
from tests.choosing import chosen
from tests.generation.layers import KINDS, States, states
from tests.latent.low_rank import DIM, HEADS, ByHand, OneLayer, oblique, rotation, seen_by, turn
from tests.running import PAGE, SINKS, TAIL, one_of_each_codec
from tests.tolerances import SPLIT_IN_16_BITS, TOLERANCES, assert_near, assert_within

#: Of outputs of order 1 after a rotary embedding in float32, whose angles are of order 100.
ROTARY = 2e-4
FORMS = {
    "each head": oblique(2),
    "both heads": oblique(1),
    "no mean": oblique(2, mean=False),
    "before rope": oblique(2, before_rope=True),
    "both heads before rope": oblique(1, before_rope=True),
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 2.0},
    "sink logits": {"s_aux": torch.tensor([-1.0, 0.5, 2.0, 4.0])},
    "both": {"softcap": 3.0, "s_aux": torch.tensor([2.0, -1.0, 1.0, 0.0])},
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = ROTARY) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def compare(layer: OneLayer, by_hand: ByHand, tokens: States, cuts: list[int], real: torch.Tensor | None) -> None:
    """Both take the tokens in the same parts and give the same."""
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
    """bool ``[batch, length]``: the first sequence has no padding, the others at ends of updates (``CUTS``)."""
    real = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        real[row, : 9 * row] = False
        real[row, 57 : 59 + row] = False
        real[row, 88 - row : 90] = False
    return real


#: Ends of the updates behind a prompt: steps, a small and a large chunk, and steps again.
CUTS = [50, 51, 52, 57, 90, *range(91, 131, 3)]


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


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
    layer(tokens.at(0, 50), None if real is None else real[:, :50])  # attention of the first tokens is not ours
    compare(layer, by_hand, tokens, CUTS, real)


def test_one_sequence_token_by_token() -> None:
    """From the very first token on, one at a time, past several pages."""
    for form in ("each head", "both heads before rope"):
        layer, by_hand = OneLayer("full", FORMS[form]), ByHand("full", FORMS[form], 1)
        compare(layer, by_hand, states(80), list(range(81)), None)


def test_a_chunk_after_a_single_token() -> None:
    """Several tokens of several sequences, of which one token is held: each sees itself and what is before it."""
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
    """A layer and its derivation by hand, the padding so far, and the forks that were left behind."""

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
        if seen:  # attention of the first tokens is not ours
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
    """Updates, crops, moved rows, forks and saving in any order; forks left behind go on from where they were."""
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
    """Drafts that are cropped leave no trace, and read pages packed ahead as plain decoding would."""
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


#: Latents of each head as they are, and of both heads before their rotary embedding.
TWO_FORMS = ["each head", "both heads before rope"]


@chosen(
    "form, spec",
    TWO_FORMS,
    specs(),
    fast=[(TWO_FORMS[place % 2], spec) for place, spec in enumerate(one_of_each_codec())],
)
def test_codecs_store_latents(form: str, spec: str) -> None:
    """Pages hold what a plain storage of the same latents would hold, whatever rounds them, and are read as decoded."""
    given_form = oblique(HEADS, (8, 16)) if form == "each head" else oblique(1, (24, 8), before_rope=True)
    tokens, layer = states(100), OneLayer("full", given_form, spec)
    layer(tokens.at(0, 92))
    keys, values = (layer.layer.dense_side(side)[:, :, :92] for side in ("keys", "values"))
    for side, states_of, decoded in (("keys", tokens.key, keys), ("values", tokens.value, values)):
        assert_mostly_near(decoded, _through(given_form, spec, side, states_of[:, :, :92]))
    query = tokens.query[:, :, 92:93].double()
    all_keys, all_values = (
        torch.cat([held, new[:, :, 92:93]], 2).double().repeat_interleave(2, 1)
        for held, new in ((keys, tokens.key), (values, tokens.value))
    )
    weights = (query @ all_keys.mT * DIM**-0.5).softmax(-1)
    assert_within(layer(tokens.at(92, 93)), (weights @ all_values).transpose(1, 2), SPLIT_IN_16_BITS["output"])


def _through(projection: LayerProjection, spec: str, side: str, x: torch.Tensor) -> torch.Tensor:
    """``x [1, Hkv, T, D]`` after projecting, storing with the codec, and back: what a layer should hold of it."""
    maps: SideProjection = getattr(projection, side)
    turns = projection.before_rope and side == "keys"

    def turned(y: torch.Tensor, way: int) -> torch.Tensor:
        return torch.stack([turn(y[:, :, t].double(), way * t) for t in range(y.shape[2])], 2) if turns else y.double()

    groups = len(maps.down)
    together = turned(x, -1).unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
    mean = 0 if maps.mean is None else maps.mean[:, None].double()
    latents = ((together - mean) @ maps.down.double()).float()
    encoder = PageEncoder(resolve(spec), maps.rank, maps.rank, PAGE, torch.float32)
    storage = PagedStorage(encoder, latents, latents, SINKS, TAIL)
    storage.append_block(latents, latents, 0, None)
    back = dense_side(storage, side, 0, x.shape[2]).double() @ maps.up.double() + mean
    back = turned(back.unflatten(3, (HEADS // groups, -1)).transpose(2, 3).flatten(1, 2), 1)
    loose = [*range(SINKS), *range(SINKS + storage.table.columns * PAGE, x.shape[2])]
    back[:, :, loose] = x[:, :, loose].double()
    return back


def assert_mostly_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Near, but for the few tokens where a last bit has tipped a code or a scale to its neighbour."""
    off = (ours.double() - theirs).abs().amax((1, 3)) > ROTARY
    assert off.double().mean() <= 0.2
    assert (ours.double() - theirs).abs().mean() < 0.02 * theirs.abs().mean()


@pytest.mark.parametrize("codec", ["rotated4", "turboquant4"])
def test_centred_keys(codec: str) -> None:
    """A codec that takes out the keys' mean takes out the latents' mean, in their width, and it comes back."""
    option: dict[str, Any] = {"key_axis": "token"} if codec == "rotated4" else {"center": True}
    form = oblique(HEADS, (8, 16))
    layer = OneLayer("full", form, resolve(codec, **option))
    tokens = states(90)
    layer(tokens.at(0, 80))
    center = layer.layer.storage.key_mean if layer.layer.storage else None
    assert center is not None and center.shape == (1, HEADS, 8) and center.any()
    by_hand = ByHand("full", form, 1)
    by_hand(tokens.at(0, 80))
    for softcap in (None, 3.0):  # with the keys' own mean under soft-capping they are decoded
        ours = layer.fork()
        ours.call = {"softcap": softcap}
        # Within what 4 bits cost.
        assert (ours(tokens.at(80, 81)) - by_hand.fork()(tokens.at(80, 81), softcap=softcap)).abs().mean() < 0.1


@pytest.mark.parametrize("groups", [1, 2])
def test_states_in_the_span_are_exact(groups: int) -> None:
    """Keys and values of a subspace about a mean come through a projection onto it unharmed."""
    full = rotation(HEADS, (DIM, DIM), groups)
    rank = 8 * HEADS // groups
    cut = [SideProjection(s.down[:, :, :rank], s.up[:, :rank], s.mean) for s in (full.keys, full.values)]
    projection = LayerProjection(cut[0], cut[1], HEADS)
    draw = torch.Generator().manual_seed(3)
    sides = []
    for side in cut:
        assert side.mean is not None
        spanned = torch.randn(2, groups, 100, rank, generator=draw) @ side.up + side.mean[:, None]
        sides.append(spanned.unflatten(3, (HEADS // groups, -1)).transpose(2, 3).flatten(1, 2))
    tokens = States(torch.randn(2, 4, 100, DIM, generator=draw), *sides)
    layer, exact = OneLayer("full", projection), OneLayer("full", full)
    for a, b in pairwise([0, 80, *range(81, 101)]):
        ours = layer(tokens.at(a, b))
    keys, values = (x.double().repeat_interleave(2, 1) for x in (tokens.key, tokens.value))
    weights = (tokens.query[:, :, -1:].double() @ keys.mT * DIM**-0.5).softmax(-1)
    assert_close(ours, (weights @ values).transpose(1, 2), 1e-5)
    exact(tokens)
    assert layer.cache.memory().total < exact.cache.memory().total


def test_what_is_counted() -> None:
    """Pages are as small as their latents; what a full cache would hold is counted in the model's widths."""
    for groups, ranks in ((2, (8, 4)), (1, (24, 8))):
        layer = OneLayer("full", oblique(groups, ranks))
        layer(states(SINKS + TAIL + 5 * PAGE))
        memory = layer.cache.memory()
        assert memory.parts["codes"] == 5 * PAGE * groups * sum(ranks) * 4
        assert memory.full_same_dtype == (SINKS + TAIL + 5 * PAGE) * HEADS * 2 * DIM * 4
        assert memory.packed_elements == 5 * PAGE * HEADS * 2 * DIM
        assert memory.bits_per_element == pytest.approx(32 * groups * sum(ranks) / (HEADS * 2 * DIM))


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
    # The scores of these keys are of order 10, and what is off in them is off in the weights in proportion.
    assert_close(output, by_hand(tokens.at(80, 81)), 16 * TOLERANCES[dtype].absolute)


@pytest.mark.parametrize("form", ["both heads", "both heads before rope"])
def test_dense_fallback(form: str) -> None:
    """Handles decode to what is read: sinks and tail as they came, pages through the projection, zeros for padding."""
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
    result = own.read(query, storage.pages(), dense, visibility, Scoring(DIM**-0.5), None, sums=True)
    assert result.page_sums is not None and result.dense_sums is not None
    keys = dense_side(storage, "keys", 0, 90).double().repeat_interleave(2, 1)
    hidden = ~seen_by(90 - queries, queries, 90, None)
    weights = (query.double() @ keys.mT * DIM**-0.5).masked_fill(hidden, -math.inf).softmax(-1).sum(2)
    ours = torch.cat([result.dense_sums[..., :SINKS], result.page_sums, result.dense_sums[..., SINKS:]], 2)
    assert_close(ours, weights)


@pytest.mark.parametrize("form", ["each head", "before rope"])
def test_no_gradient(form: str) -> None:
    """Going backwards through the cache is an error, not a wrong gradient."""
    tokens, layer = states(90), OneLayer("full", FORMS[form])
    with torch.no_grad():
        layer(tokens.at(0, 89))
    last = tokens.at(89, 90)
    output = layer(last._replace(query=last.query.requires_grad_()))
    with pytest.raises(RuntimeError, match="no gradient"):
        output.sum().backward()


# -- bad input ------------------------------------------------------------------------------------------------------


def test_another_model() -> None:
    """Keys of another number of heads or width than the projection's are refused before anything is held."""
    layer = OneLayer("full", rotation(HEADS, (DIM, DIM), 2)).layer
    for heads, key_dim, value_dim in ((4, DIM, DIM), (HEADS, 8, DIM), (HEADS, DIM, 8)):
        with pytest.raises(ValueError, match="accepted by its projection: 2 of widths"):
            layer.update(torch.zeros(1, heads, 3, key_dim), torch.zeros(1, heads, 3, value_dim))
        assert layer.get_seq_length() == 0 and layer.storage is None


def test_a_rank_that_the_codec_cannot_store() -> None:
    """Ten latents of 4 bits do not fill whole bytes."""
    layer = OneLayer("full", oblique(2, (8, 10)), "int4").layer
    with pytest.raises(ValueError, match="10"):
        layer.update(torch.zeros(1, HEADS, 3, DIM), torch.zeros(1, HEADS, 3, DIM))
    assert layer.storage is None


def test_an_embedding_that_cannot_be_undone() -> None:
    """Where the layer has no rotary embedding, latents from before it are refused at the first attention."""
    layer, tokens = OneLayer("full", FORMS["before rope"]), states(60)
    module: Any = torch.nn.Identity()
    module.is_causal, module.num_key_value_groups, layer.attention = True, 2, module
    with pytest.raises(ValueError, match=r"layer 0 .*before_rope=True.*has no rotary embedding"):
        layer(tokens)
    storage = layer.layer.storage
    assert storage is not None and storage.dense.longest == 0 and storage.table.columns == 0


def test_a_module_that_is_not_known() -> None:
    """What reads dense tensors shows no module: as long as nothing is packed it need not."""
    own, tokens = OneLayer("full", FORMS["before rope"]).layer, states(60)
    room = SINKS + TAIL + PAGE - 1
    first = tokens.at(0, room)
    keys, _ = own.update(first.key, first.value)
    assert torch.equal(keys + 0, first.key)
    second = tokens.at(room, room + 1)
    own.update(second.key, second.value)
    third = tokens.at(room + 1, room + 2)
    with pytest.raises(RuntimeError, match="need the attention module"):
        own.update(third.key, third.value)
    assert own.get_seq_length() == room + 1
    assert own.storage is not None and own.storage.dense.longest == room and own.storage.table.columns == 0


# -- encoder and kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_a_page_does_not_depend_on_others(groups: int) -> None:
    """The same bytes, whether a page is encoded alone or with others."""
    projection = oblique(groups, (8, 16))
    for spec in ("none", "unbiased4", "kvarn4"):
        encoder = LowRankEncoder(resolve(spec), projection, PAGE, torch.float32)
        keys, values = (torch.randn(6 * HEADS, PAGE, DIM, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        together = encoder.encode(keys, values, None)
        pairs = zip(keys.split(HEADS), values.split(HEADS), strict=True)
        assert torch.equal(together, torch.cat([encoder.encode(k, v, None) for k, v in pairs]))


RANKS = [rank if rank in (8, 40, 512) else slow(rank) for rank in range(8, 513, 8)]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("spec", ["none", "unbiased4", "rotated3", "kvarn2", "fp8"])
def test_pages_without_full_precision_tokens(spec: str, rank: int) -> None:
    """Every kernel reads pages of any rank alone, beside no full-precision tokens at all."""
    other = max(8, rank - 8)
    encoder = PageEncoder(resolve(spec), rank, other, PAGE, torch.float32)
    draw = torch.Generator().manual_seed(rank)
    keys, values = torch.randn(1, 2, 48, rank, generator=draw), torch.randn(1, 2, 48, other, generator=draw)
    storage = PagedStorage(encoder, keys, values, 0, 0)
    storage.append_block(keys, values, 0, None)
    query = torch.randn(1, 6, 2, rank, generator=draw)
    keys, values = (dense_side(storage, side, 0, 48).double().repeat_interleave(3, 1) for side in ("keys", "values"))
    scores = query.double() @ keys.mT * rank**-0.5
    nothing = DenseTokens(query.new_empty(1, 2, 0, rank), query.new_empty(1, 2, 0, other))
    kernels = [reference] if reason_missing("native", "cpu") else [reference, native]
    for kernel in kernels:
        args = query, storage.pages(), nothing, Visibility(48, 2, None, 0, True, None)
        assert kernel is reference or native.supports(*args)
        result = kernel.attend(*args, Scoring(rank**-0.5))
        assert_within(result.output, (scores.softmax(-1) @ values).transpose(1, 2), SPLIT_IN_16_BITS["output"])
        assert_within(result.log_sum_exp, scores.logsumexp(-1), SPLIT_IN_16_BITS["log_sum_exp"])


def test_a_long_block_of_queries_over_pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the queries of a block never cuts tokens that are not there."""
    encoder = PageEncoder(resolve("none"), 8, 8, PAGE, torch.float32)
    keys = states(48).key[..., :8]
    storage = PagedStorage(encoder, keys, keys, 0, 0)
    storage.append_block(keys, keys, 0, None)
    query = states(20, seed=1).query[..., :8]
    nothing = DenseTokens(query.new_empty(1, HEADS, 0, 8), query.new_empty(1, HEADS, 0, 8))
    visibility = Visibility(48, 20, None, 0, True, None)
    whole = reference.attend(query, storage.pages(), nothing, visibility, Scoring(0.3)).output
    monkeypatch.setattr(reference, "_SCORE_ELEMENTS", 1)
    assert_near(reference.attend(query, storage.pages(), nothing, visibility, Scoring(0.3)).output, whole.double())
