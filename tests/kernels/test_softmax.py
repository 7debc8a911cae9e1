"""Attention in pieces against the softmax over everything in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.kernels.reference.softmax import OnlineSoftmax, dense_attention, merge
from tests.tolerances import assert_near

CPU = torch.device("cpu")
SIZES = [(1, 1, 1, 1), (3, 5, 7, 9), (2, 33, 127, 80), (4, 1, 513, 64)]
GROUPS = [(1, 1, 1, 1), (2, 3, 1, 37), (3, 1, 5, 64), (1, 7, 4, 129)]


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_by_hand(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one query at a time, over the visible keys only."""
    output = torch.zeros(*scores.shape[:2], values.shape[-1], dtype=torch.float64)
    log_sum_exp = torch.full(scores.shape[:2], -torch.inf, dtype=torch.float64)
    for row, query in [(r, q) for r in range(scores.shape[0]) for q in range(scores.shape[1])]:
        seen = scores[row, query] > -torch.inf
        if seen.any():
            weights = scores[row, query, seen].exp()
            output[row, query] = weights @ values[row, seen] / weights.sum()
            log_sum_exp[row, query] = weights.sum().log()
    return output, log_sum_exp


def online(scores: torch.Tensor, values: torch.Tensor, cuts: list[tuple[int, int, int]]) -> OnlineSoftmax:
    """Feed keys ``start ... stop`` as ``blocks`` blocks, for each (start, stop, blocks) of ``cuts``."""
    state = OnlineSoftmax(scores.shape[0], scores.shape[1], values.shape[-1], CPU)
    for start, stop, blocks in cuts:
        score_part = scores[:, :, start:stop].float().unflatten(2, (blocks, -1)).permute(2, 0, 1, 3).contiguous()
        value_part = values[:, start:stop].float().unflatten(1, (blocks, -1)).transpose(0, 1).contiguous()
        state.add(state.weigh(score_part) @ value_part)
    return state


@pytest.mark.parametrize(("rows", "queries", "keys", "dim"), SIZES)
def test_online_softmax(rows: int, queries: int, keys: int, dim: int) -> None:
    """One chunk of any size is softmax attention; scores far from zero do not overflow."""
    scores, values = 4 * gaussian(0, rows, queries, keys), gaussian(1, rows, keys, dim)
    expected = softmax_by_hand(scores, values)
    for offset in (0.0, 700.0, -700.0):
        output, log_sum_exp = online(scores + offset, values, [(0, keys, 1)]).result()
        # Adding 700 in float32 costs the scores 6e-5 of precision.
        torch.testing.assert_close(output.double(), expected[0], atol=4e-6 if offset == 0 else 1e-3, rtol=1e-5)
        torch.testing.assert_close(log_sum_exp.double(), expected[1] + offset, atol=2e-4, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cuts_do_not_matter(data: st.DataObject) -> None:
    """Any cut of the keys into chunks and blocks, with any keys masked, gives the result of all at once."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6))
    queries, dim = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    total = sum(size * blocks for size, blocks in sizes)
    seed = data.draw(st.integers(0, 1000))
    scores, values = 5 * gaussian(seed, 2, queries, total), gaussian(seed + 1, 2, total, dim)
    scores[gaussian(seed + 2, 2, queries, total) < data.draw(st.sampled_from([-9.0, 0.0, 1.5]))] = -torch.inf
    cuts, start = [], 0
    for size, blocks in sizes:
        cuts.append((start, start + size * blocks, blocks))
        start += size * blocks
    output, log_sum_exp = online(scores, values, cuts).result()
    expected = softmax_by_hand(scores, values)
    assert_near(output, expected[0])
    assert_near(log_sum_exp, expected[1])


def test_queries_without_a_key() -> None:
    """A query that sees nothing has output exactly 0 and log-sum-exp -inf; a late first key still counts."""
    scores, values = gaussian(3, 2, 3, 12), gaussian(4, 2, 12, 8)
    scores[0, 1] = -torch.inf
    scores[1, 2, :8] = -torch.inf
    output, log_sum_exp = online(scores, values, [(0, 4, 1), (4, 8, 2), (8, 12, 1)]).result()
    assert torch.equal(output[0, 1], torch.zeros(8)) and log_sum_exp[0, 1] == -torch.inf
    assert_near(output, softmax_by_hand(scores, values)[0])
    empty, nothing = OnlineSoftmax(2, 3, 8, CPU).result()
    assert torch.equal(empty, torch.zeros(2, 3, 8)) and (nothing == -torch.inf).all()


def attention_by_hand(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``query [B, Hq, q, D]`` over repeated heads; ``hidden [B, Hq, q, n]``."""
    ratio = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(ratio, 1), values.repeat_interleave(ratio, 1)
    scores = torch.einsum("bhqd,bhnd->bhqn", query, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores[hidden] = -torch.inf
    output, log_sum_exp = softmax_by_hand(scores.flatten(0, 1), values.flatten(0, 1))
    return output.unflatten(0, query.shape[:2]), log_sum_exp.unflatten(0, query.shape[:2])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "ratio", "length", "count"), GROUPS)
def test_dense_attention(heads: int, ratio: int, length: int, count: int, masked: bool, softcap: float | None) -> None:
    """Grouped queries, a bias per query head, soft-capping and widths that differ, against float64."""
    batch, dim, value_dim = 2, 24, 16
    query = gaussian(5, batch, heads * ratio, length, dim)
    keys, values = gaussian(6, batch, heads, count, dim), gaussian(7, batch, heads, count, value_dim)
    hidden = torch.zeros(batch, heads * ratio, length, count, dtype=torch.bool)
    bias = None
    if masked:
        hidden = gaussian(8, batch, heads * ratio, length, count) > 0.3
        hidden[1, 0, 0] = True
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).unflatten(1, (heads, ratio))
    rows = query.float().reshape(batch * heads, ratio * length, dim) / (softcap or 1.0)
    output, log_sum_exp = dense_attention(rows, keys.float(), values.float(), bias, softcap)
    expected, expected_lse = attention_by_hand(query, keys, values, hidden, softcap)
    assert_near(output.view(batch, heads * ratio, length, value_dim), expected)
    assert_near(log_sum_exp.view(batch, heads * ratio, length), expected_lse)
    if masked:
        assert not output.view(batch, heads * ratio, length, value_dim)[1, 0, 0].any()


def test_no_keys_at_all() -> None:
    """Without keys the output is 0 and the log-sum-exp -inf, which merging ignores."""
    keys, values = torch.empty(1, 2, 0, 8), torch.empty(1, 2, 0, 4)
    output, log_sum_exp = dense_attention(torch.randn(2, 3, 8), keys, values, None, None)
    assert torch.equal(output, torch.zeros(2, 3, 4)) and (log_sum_exp == -torch.inf).all()


@pytest.mark.parametrize("cut", [0, 1, 10, 20, 21])
def test_merge(cut: int) -> None:
    """Merging the attention over two parts is the attention over both, also if a part is empty or hidden."""
    scores, values = 6 * gaussian(9, 2, 4, 21), gaussian(10, 2, 21, 8)
    scores[0, 0, :cut] = -torch.inf
    scores[1, 1, cut:] = -torch.inf
    scores[1, 3] = -torch.inf
    parts = [softmax_by_hand(scores[:, :, part], values[:, part]) for part in (slice(0, cut), slice(cut, 21))]
    first, second = [(output.float(), lse.float()) for output, lse in parts]
    expected = softmax_by_hand(scores, values)
    for output, log_sum_exp in (merge(first, second), merge(second, first)):
        assert_near(output, expected[0])
        assert_near(log_sum_exp, expected[1])
