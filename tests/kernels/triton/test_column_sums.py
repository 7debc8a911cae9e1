"""Column sums by a Triton kernel, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.triton import column_sums as kernels
from tests.choosing import chosen
from tests.kernels.test_column_sums import CODECS, Problem, check, packed_problem, prompt_problem
from tests.kernels.triton.calls import Shape, biased, expected, make_call, ragged
from tests.kernels.triton.fixtures import bfloat16_dot, poisoned_outputs  # noqa: F401
from tests.tolerances import assert_near

SINKS = torch.tensor([-1.0, 0.0, 2.0, 5.0])


def run(query: torch.Tensor, log_sum_exp: torch.Tensor, *arguments) -> tuple[torch.Tensor | None, torch.Tensor]:
    pages, dense, visibility, _ = arguments
    assert kernels.supports(query, pages, dense, visibility)
    return kernels.column_sums(query, log_sum_exp, *arguments)


@chosen(
    "codec, padded",
    CODECS,
    [False, True],
    fast=[("none", True), ("int8", False), ("unbiased4", True), ("kvarn3", True), ("kvarn3", False)],
)
def test_pages_and_tail(codec: str, padded: bool) -> None:
    """Pages of several formats (rotated, centered) and a tail."""
    check(packed_problem(codec, padded, length=5, ratio=3), run)


@pytest.mark.parametrize(("length", "ratio"), [(1, 1), pytest.param(9, 4, marks=pytest.mark.slow), (3, 8)])
def test_query_heads(length: int, ratio: int) -> None:
    """Any number of queries, and of query heads for each KV head."""
    check(packed_problem("unbiased4", True, length, ratio), run)


@pytest.mark.parametrize("window", [1, 9, 40])
def test_windows(window: int) -> None:
    """Keys that have left a sliding window get no probability."""
    check(packed_problem("unbiased4", True, 5, 2, window), run)
    check(prompt_problem(11, 37, 4, 2, window), run)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scoring(softcap: float | None) -> None:
    """Soft-capping, on pages whose keys are centered too, and sink logits that take probability away."""
    check(packed_problem("unbiased4", True, 3, 2, scoring=Scoring(0.3, softcap, SINKS)), run)
    check(packed_problem("kvarn3", True, 3, 2, scoring=Scoring(0.3, softcap, SINKS)), run)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bias(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose keys stand for others, some of them at a time, with NaN where there is no token."""
    monkeypatch.setattr(kernels, "DECODED_TOKENS", 16)
    call = ragged(make_call("unbiased4", Shape(2, 2, 3, 5, columns=3, slots=7)))
    call = biased(replace(call, scoring=Scoring(0.3, softcap, torch.tensor([-1.0, 0.0, 2.0, 5.0, 0.0, 1.0]))))
    wanted = expected(call)
    page_sums, dense_sums = run(call.query, wanted.log_sum_exp.float(), *call.arguments[1:])
    assert page_sums is not None and wanted.page_sums is not None and wanted.dense_sums is not None
    assert_near(page_sums, wanted.page_sums)
    assert_near(dense_sums, wanted.dense_sums)


def test_few_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of pages that are decoded at a time does not matter."""
    monkeypatch.setattr(kernels, "DECODED_TOKENS", 8)
    check(packed_problem("int8", True, 3, 2), run)


@pytest.mark.parametrize("length", [1, 16, 75])
def test_observation_windows_of_a_prompt(length: int) -> None:
    """Several tiles of queries and keys; some queries see only padding."""
    check(prompt_problem(length, 75, 33, 2), run)
    check(prompt_problem(length, 75, 33, 1, window=20), run)


def test_every_query_sees_every_token_without_positions() -> None:
    """Full-precision tokens without positions, with and without unused slots."""
    given = prompt_problem(5, 21, 3, 2)
    given.dense.positions = None
    check(given, run)
    given.dense.unused = None
    check(given, run)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Queries and keys in half precision, scores and sums in float32: the sums are those of the rounded keys."""
    given = prompt_problem(11, 37, 4, 3)
    given.query, given.dense.keys = given.query.to(dtype), given.dense.keys.to(dtype)
    check(given, run)


def test_views_of_a_larger_buffer() -> None:
    """Keys that are a part of a larger buffer full of NaN, of a width that is no power of two."""
    given = prompt_problem(9, 37, 4, 2)
    wide = torch.randn(2, 2, 37, 24, generator=torch.Generator().manual_seed(5))
    buffer = torch.full((2, 2, 64, 24), float("nan"))
    buffer[:, :, 3:40] = wide
    query = torch.randn(2, 4, 9, 24, generator=torch.Generator().manual_seed(6))
    given.query, given.dense = query, replace(given.dense, keys=buffer[:, :, 3:40])
    check(given, run)


def test_what_is_left_to_the_reference() -> None:
    """Masks, mixed dtypes, wide heads and calls without a query."""
    given: Problem = prompt_problem(5, 21, 3, 2)
    masked = replace(given.visibility, mask=torch.ones(2, 1, 1, 21, dtype=torch.bool))
    assert not kernels.supports(given.query, None, given.dense, masked)
    assert not kernels.supports(given.query.half(), None, given.dense, given.visibility)
    assert not kernels.supports(given.query[:, :, :0], None, given.dense, given.visibility)
    assert not kernels.supports(torch.ones(2, 4, 5, 512), None, given.dense, given.visibility)
