"""Folding scales into queries and weights has the same result as decoding the page and multiplying."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.reference.levels import page_output, page_scores
from tests.kernels.test_decode_side import FORMATS, PAGE, random_records
from tests.tolerances import TOLERANCES

FILLER = SideFormat(48, 3, group=48)
#: Query counts on both sides of the switch from folding to decoding.
QUERIES = [1, 3, 32, 33]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Near in units of the sum of the absolute terms, since large terms may cancel."""
    tolerance = TOLERANCES[torch.float32]
    assert actual.isfinite().all()
    assert ((actual.double() - expected).abs() <= tolerance.relative * magnitude + tolerance.absolute).all()


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("name", FORMATS)
def test_page_scores(name: str, queries: int) -> None:
    """Scores of two columns of three rows against float64 dot products with the decoded keys."""
    fmt = FORMATS[name]
    layout = PageLayout(fmt, FILLER, PAGE)
    records, keys = random_records(layout, "keys", 6)
    query = torch.randn(3, queries, fmt.dim, generator=torch.Generator().manual_seed(queries))
    buffer = torch.full((2, 3, PAGE, fmt.dim), float("nan"))
    scores = page_scores(layout, records.view(2, 3, -1), query, buffer)
    by_page = keys.view(2, 3, PAGE, fmt.dim)
    expected = torch.einsum("rmd,crpd->crmp", query.double(), by_page)
    assert_close(scores, expected, torch.einsum("rmd,crpd->crmp", query.double().abs(), by_page.abs()))


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("name", FORMATS)
def test_page_output(name: str, queries: int) -> None:
    """Weighted sums of two columns of three rows against float64 sums of the decoded values."""
    fmt = FORMATS[name]
    layout = PageLayout(FILLER, fmt, PAGE)
    records, values = random_records(layout, "values", 6)
    weights = torch.rand(2, 3, queries, PAGE, generator=torch.Generator().manual_seed(queries))
    buffer = torch.full((2, 3, PAGE, fmt.dim), float("nan"))
    by_page = values.view(2, 3, PAGE, fmt.dim)
    expected = torch.einsum("crmp,crpd->crmd", weights.double(), by_page)
    magnitude = torch.einsum("crmp,crpd->crmd", weights.double(), by_page.abs())
    assert_close(page_output(layout, records.view(2, 3, -1), weights, buffer), expected, magnitude)
