"""Bias and values of kept tokens: never worse on what was observed, exact where they can be, and within bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.eviction.compensation import fit_values, output_error
from hf_kvcache.eviction.matching import LARGEST_BIAS, fit_bias
from hf_kvcache.eviction.observed import Observed
from hf_kvcache.kernels.inputs import Scoring

DIM, VALUE_DIM = 8, 6
#: Of float64 sums that are returned in float32.
ROUNDING = 1e-5


def problem(
    seed: int = 0, tokens: int = 40, kept: int = 16, queries: int = 6, group: int = 2, capped: bool = False
) -> Observed:
    """Random attention with heads that keep different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    heads, batch = 2, 2
    keep = torch.rand(batch, heads, tokens, generator=generator).argsort(-1) < kept
    keep[0, 0] &= torch.arange(tokens) < max(tokens // 2, int(keep[0, 0].nonzero()[0]) + 1)
    logits = torch.randn(heads * group, generator=generator) if capped else None
    return Observed(
        keys=torch.randn(batch, heads, tokens, DIM, generator=generator),
        values=torch.randn(batch, heads, tokens, VALUE_DIM, generator=generator),
        keep=keep,
        queries=2 * torch.randn(batch, heads * group, queries, DIM, generator=generator),
        scoring=Scoring(DIM**-0.5, 3.0 if capped else None, logits),
    )


PROBLEMS = {
    "few queries": problem(),
    "more queries than kept keys": problem(queries=30, seed=1),
    "one query": problem(queries=1, group=1, seed=2),
    "one kept key": problem(kept=1, seed=3),
    "nearly all kept": problem(kept=39, seed=4),
    "capped, with sinks": problem(capped=True, seed=5),
    "causal": replace(
        problem(seed=6), visible=torch.rand(1, 1, 6, 40, generator=torch.Generator().manual_seed(9)) < 0.5
    ),
    "biased before": replace(problem(seed=8), bias=torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(3))),
}


@pytest.fixture(params=PROBLEMS)
def observed(request: pytest.FixtureRequest) -> Observed:
    return PROBLEMS[request.param]


def test_errors_equal_the_definition(observed: Observed) -> None:
    bias = torch.randn(observed.keep.shape, generator=torch.Generator().manual_seed(0))
    values = observed.values + 1
    assert_close(output_error(observed), by_hand(observed, torch.zeros_like(bias), observed.values))
    assert_close(output_error(observed, bias, values), by_hand(observed, bias, values))


def test_new_values_are_never_worse(observed: Observed) -> None:
    before = output_error(observed)
    assert (output_error(observed, None, fit_values(observed)) <= before * (1 + ROUNDING)).all()
    bias = fit_bias(observed)
    with_bias = output_error(observed, bias, fit_values(observed, bias))
    assert (with_bias <= output_error(observed, bias) * (1 + ROUNDING)).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 30), st.integers(1, 12), st.sampled_from([1, 2, 3]))
def test_values_are_never_worse_on_any_problem(seed: int, kept: int, queries: int, group: int) -> None:
    observed = problem(seed, 30, kept, queries, group)
    for bias in (None, fit_bias(observed)):
        before, after = (output_error(observed, bias, v) for v in (None, fit_values(observed, bias)))
        assert (after <= before * (1 + ROUNDING) + 1e-9).all()
        assert bias is None or bias.abs().max() <= LARGEST_BIAS


@pytest.mark.parametrize("with_bias", [False, True])
def test_values_are_exact_where_there_are_enough_of_them(with_bias: bool) -> None:
    observed = problem(tokens=60, kept=25, queries=4, group=2, seed=7)
    observed = replace(observed, keep=observed.keep | (torch.arange(60) < 12))
    bias = fit_bias(observed) if with_bias else None
    values = fit_values(observed, bias, ridge=1e-12)
    scale = output_error(observed)
    assert (output_error(observed, bias, values) < 1e-6 * scale).all()
    assert (values[~observed.keep] == observed.values[~observed.keep]).all()


def test_values_solve_the_ridge_problem(observed: Observed) -> None:
    """Against the normal equations of one head, by numpy."""
    ridge = 0.1
    values = fit_values(observed, ridge=ridge).double()
    for index in range(2):
        for kv_head in range(2):
            kept = observed.keep[index, kv_head].numpy()
            full, part = outputs(observed, index, kv_head, np.zeros(kept.sum()))
            own = observed.values[index, kv_head].double().numpy()
            matrix = part.T @ part
            matrix += np.eye(len(matrix)) * ridge * np.trace(matrix) / len(matrix)
            change = np.linalg.solve(matrix, part.T @ (full @ own - part @ own[kept]))
            assert_close(values[index, kv_head][kept], torch.from_numpy(own[kept] + change), 1e-4)


def test_fixed_tokens_keep_their_values(observed: Observed) -> None:
    fixed = torch.rand(observed.keep.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    values = fit_values(observed, fixed=fixed)
    assert torch.equal(values[fixed], observed.values[fixed])
    assert (output_error(observed, None, values) <= output_error(observed) * (1 + ROUNDING)).all()
    assert torch.equal(fit_values(observed, fixed=observed.keep), observed.values)


def test_the_bias_is_in_its_bounds_and_only_on_kept_keys(observed: Observed) -> None:
    bias = fit_bias(observed)
    assert bias.abs().max() <= LARGEST_BIAS and bias.dtype == torch.float32
    assert not bias[~observed.keep].any()


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_bias_is_the_bounded_least_squares_solution(observed: Observed, ridge: float) -> None:
    """Against coordinate descent, which needs no step size and ends at the same, only, minimum."""
    bias = fit_bias(observed, ridge=ridge).double()
    for index, kv_head in ((0, 0), (1, 1)):
        kept = observed.keep[index, kv_head].numpy()
        shares = shares_of_kept(observed, index, kv_head)
        gram = shares.T @ shares
        penalty = ridge * np.trace(gram) / len(gram)

        def loss(w: np.ndarray, s: np.ndarray = shares, p: float = penalty) -> float:
            return float(((s @ w - 1) ** 2).sum() + p * ((w - 1) ** 2).sum())

        best = loss(coordinate_descent(gram + penalty * np.eye(len(gram)), shares.sum(0) + penalty))
        assert loss(bias[index, kv_head][kept].exp().numpy()) <= best * (1 + 1e-3) + 1e-6


def test_fixed_tokens_keep_their_weight(observed: Observed) -> None:
    """The others make up for what is missing beside them: the bounded least squares solution, once more."""
    fixed = torch.rand(observed.keep.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    bias = fit_bias(observed, fixed).double()
    assert not bias[fixed].any()
    for index, kv_head in ((0, 0), (1, 1)):
        kept = observed.keep[index, kv_head].numpy()
        still = fixed[index, kv_head].numpy()[kept]
        shares = shares_of_kept(observed, index, kv_head)
        if still.all():
            continue
        own, missing = shares[:, ~still], 1 - shares[:, still].sum(1)
        gram = own.T @ own
        penalty = 1e-3 * np.trace(gram) / len(gram)
        best = coordinate_descent(gram + penalty * np.eye(len(gram)), own.T @ missing + penalty)
        found = bias[index, kv_head][kept].exp().numpy()[~still]
        losses = [((own @ w - missing) ** 2).sum() + penalty * ((w - 1) ** 2).sum() for w in (found, best)]
        assert losses[0] <= losses[1] * (1 + 1e-3) + 1e-5


def test_the_bias_restores_the_attention(observed: Observed) -> None:
    bias = fit_bias(observed)
    for index in range(2):
        for kv_head in range(2):
            kept = observed.keep[index, kv_head].numpy()
            shares = shares_of_kept(observed, index, kv_head)
            restored = shares @ bias[index, kv_head][kept].double().exp().numpy()
            assert ((restored - 1) ** 2).sum() <= ((shares.sum(1) - 1) ** 2).sum() * (1 + ROUNDING)


def test_keeping_everything_changes_nothing() -> None:
    observed = replace(problem(), keep=torch.ones(2, 2, 40, dtype=torch.bool))
    assert fit_bias(observed).abs().max() < 1e-6
    assert_close(fit_values(observed), observed.values)
    assert output_error(observed).max() < 1e-20


def test_queries_are_read_in_strips(monkeypatch: pytest.MonkeyPatch, observed: Observed) -> None:
    whole = fit_bias(observed), fit_values(observed)
    monkeypatch.setattr("hf_kvcache.eviction.observed._STRIP_ELEMENTS", 1)
    for one, other in zip((fit_bias(observed), fit_values(observed)), whole, strict=True):
        assert_close(one, other)


def test_bad_arguments_are_named() -> None:
    good = problem()
    with pytest.raises(ValueError, match="values has shape"):
        replace(good, values=good.values[:, :1])
    with pytest.raises(ValueError, match="keep has shape"):
        replace(good, keep=good.keep[:, :, :3])
    with pytest.raises(ValueError, match="queries has shape"):
        replace(good, queries=good.queries[:, :3])
    with pytest.raises(ValueError, match="keep has heads without a kept token"):
        replace(good, keep=torch.zeros_like(good.keep))
    for fit in (fit_bias, fit_values):
        with pytest.raises(ValueError, match=r"ridge=-1\.0; accepted: numbers from 0"):
            fit(good, ridge=-1.0)


def by_hand(observed: Observed, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Squared output errors ``[B, Hkv]`` by the definition of attention."""
    errors = np.zeros((2, 2))
    for index in range(2):
        for kv_head in range(2):
            kept = observed.keep[index, kv_head].numpy()
            added = bias[index, kv_head].double().numpy()[kept]
            full, part = outputs(observed, index, kv_head, added)
            new, own = values[index, kv_head].double().numpy(), observed.values[index, kv_head].double().numpy()
            errors[index, kv_head] = ((part @ new[kept] - full @ own) ** 2).sum()
    return torch.from_numpy(errors)


def outputs(observed: Observed, index: int, kv_head: int, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities over all keys ``[g * n, T]``, and over the kept ones with a bias ``[g * n, C]``."""
    kept = observed.keep[index, kv_head].numpy()
    full, part = [], []
    for scores, sink in scores_of(observed, index, kv_head):
        full.append(softmax(scores, sink))
        part.append(softmax(scores[:, kept] + bias, sink))
    return np.concatenate(full), np.concatenate(part)


def shares_of_kept(observed: Observed, index: int, kv_head: int) -> np.ndarray:
    kept = observed.keep[index, kv_head].numpy()
    return np.concatenate([softmax(scores, None)[:, kept] for scores, _ in scores_of(observed, index, kv_head)])


def scores_of(observed: Observed, index: int, kv_head: int) -> list[tuple[np.ndarray, float | None]]:
    scoring = observed.scoring
    group = observed.queries.shape[1] // observed.keys.shape[1]
    found: list[tuple[np.ndarray, float | None]] = []
    for head in range(kv_head * group, (kv_head + 1) * group):
        scores = (observed.queries[index, head].double() @ observed.keys[index, kv_head].double().T).numpy()
        scores = scores * scoring.scaling
        if scoring.softcap is not None:
            scores = scoring.softcap * np.tanh(scores / scoring.softcap)
        if observed.bias is not None:
            scores = scores + observed.bias[index, kv_head].double().numpy()
        if observed.visible is not None:
            scores = np.where(observed.visible[0, 0].numpy(), scores, -np.inf)
        found.append((scores, None if scoring.sink_logits is None else float(scoring.sink_logits[head])))
    return found


def softmax(scores: np.ndarray, sink: float | None) -> np.ndarray:
    weights = np.exp(scores)
    total = weights.sum(1, keepdims=True) + (0.0 if sink is None else np.exp(sink))
    return weights / np.where(total == 0, 1, total)


def coordinate_descent(gram: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    weights = np.ones(len(wanted))
    least, most = np.exp(-LARGEST_BIAS), np.exp(LARGEST_BIAS)
    for _ in range(2000):
        before = weights.copy()
        for i in range(len(wanted)):
            weights[i] = min(max(weights[i] + (wanted[i] - gram[i] @ weights) / gram[i, i], least), most)
        if np.abs(weights - before).max() < 1e-6:
            break
    return weights


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rounding: float = ROUNDING) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rounding, atol=rounding)
