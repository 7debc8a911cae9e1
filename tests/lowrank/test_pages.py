"""Pages of low-rank coefficients: every codec, bytes, pages that are read alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

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
from tests.generation.layers import States, states
from tests.lowrank.one_layer import DIM, HEADS, ROTARY, ByHand, OneLayer, assert_close, oblique, rotation, slow, turn
from tests.running import PAGE, SINKS, TAIL, one_of_each_codec
from tests.tolerances import SPLIT_IN_16_BITS, assert_near, assert_within

#: Coefficients of each head, and of both heads together before their rotary embedding.
TWO_FORMS = ["each head", "both heads before rope"]


@chosen(
    "form, spec",
    TWO_FORMS,
    specs(),
    fast=[(TWO_FORMS[place % 2], spec) for place, spec in enumerate(one_of_each_codec())],
)
def test_codecs_store_coefficients(form: str, spec: str) -> None:
    """Pages hold what a plain storage of the same coefficients holds, with any codec, and are read as they decode."""
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
    """``x [1, Hkv, T, D]`` after it was projected, stored with the codec, and projected back."""
    maps: SideProjection = getattr(projection, side)
    turns = projection.before_rope and side == "keys"

    def turned(y: torch.Tensor, way: int) -> torch.Tensor:
        return torch.stack([turn(y[:, :, t].double(), way * t) for t in range(y.shape[2])], 2) if turns else y.double()

    groups = len(maps.down)
    together = turned(x, -1).unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
    mean = 0 if maps.mean is None else maps.mean[:, None].double()
    coefficients = ((together - mean) @ maps.down.double()).float()
    encoder = PageEncoder(resolve(spec), maps.rank, maps.rank, PAGE, torch.float32)
    storage = PagedStorage(encoder, coefficients, coefficients, SINKS, TAIL)
    storage.append_block(coefficients, coefficients, 0, None)
    back = dense_side(storage, side, 0, x.shape[2]).double() @ maps.up.double() + mean
    back = turned(back.unflatten(3, (HEADS // groups, -1)).transpose(2, 3).flatten(1, 2), 1)
    loose = [*range(SINKS), *range(SINKS + storage.table.columns * PAGE, x.shape[2])]
    back[:, :, loose] = x[:, :, loose].double()
    return back


def assert_mostly_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Near, except for a few tokens in which a rounding error changed a code or a scale to the next one."""
    off = (ours.double() - theirs).abs().amax((1, 3)) > ROTARY
    assert off.double().mean() <= 0.2
    assert (ours.double() - theirs).abs().mean() < 0.02 * theirs.abs().mean()


@pytest.mark.parametrize("codec", ["rotated4", "turboquant4"])
def test_centered_keys(codec: str) -> None:
    """A codec that subtracts the keys' mean subtracts that of the coefficients, in their width, and adds it back."""
    option: dict[str, Any] = {"key_axis": "token"} if codec == "rotated4" else {"center": True}
    form = oblique(HEADS, (8, 16))
    layer = OneLayer("full", form, resolve(codec, **option))
    tokens = states(90)
    layer(tokens.at(0, 80))
    mean = layer.layer.storage.key_mean if layer.layer.storage else None
    assert mean is not None and mean.shape == (1, HEADS, 8) and mean.any()
    by_hand = ByHand("full", form, 1)
    by_hand(tokens.at(0, 80))
    for softcap in (None, 3.0):  # with the keys' own mean under soft-capping they are decoded
        ours = layer.fork()
        ours.call = {"softcap": softcap}
        # Within what 4 bits cost.
        assert (ours(tokens.at(80, 81)) - by_hand.fork()(tokens.at(80, 81), softcap=softcap)).abs().mean() < 0.1


@pytest.mark.parametrize("groups", [1, 2])
def test_states_in_the_span_are_exact(groups: int) -> None:
    """Keys and values within a subspace about a mean lose nothing by a projection onto that subspace."""
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
    """Pages are as small as their coefficients; a full cache is counted in the model's own widths."""
    for groups, ranks in ((2, (8, 4)), (1, (24, 8))):
        layer = OneLayer("full", oblique(groups, ranks))
        layer(states(SINKS + TAIL + 5 * PAGE))
        memory = layer.cache.memory()
        assert memory.parts["codes"] == 5 * PAGE * groups * sum(ranks) * 4
        assert memory.full_same_dtype == (SINKS + TAIL + 5 * PAGE) * HEADS * 2 * DIM * 4
        assert memory.packed_elements == 5 * PAGE * HEADS * 2 * DIM
        assert memory.bits_per_element == pytest.approx(32 * groups * sum(ranks) / (HEADS * 2 * DIM))


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
    """Every kernel reads pages of any rank without any full-precision tokens beside them."""
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
    """A block of queries that is cut in parts can be without full-precision tokens."""
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
