"""The choice of pages by the C++ kernels, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.kernels.dispatch import module_of
from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule
from hf_kvcache.kernels.reference.choose import NO_COLUMN, choose, choose_across_heads
from tests.kernels.choices import CASES, Case, equal_scores, expected, make


@pytest.mark.parametrize(
    ("rows", "width", "columns", "spans", "count"),
    [(1, 16, 1, 1, 1), (3, 40, 70, 2, 9), (2, 7, 130, 1, 130), (8, 256, 65, 4, 64), (2, 33, 64, 1, 1)],
)
def test_choice(isa: str, rows: int, width: int, columns: int, spans: int, count: int) -> None:
    """The C++ kernel chooses what the reference does, with rows that may have fewer pages or lack some."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 1, width, generator=draw)
    held = torch.randint(-127, 128, (rows, columns * spans + 5, width), dtype=torch.int8, generator=draw)
    codes = held[:, : columns * spans]
    scales = (torch.rand(rows, columns * spans + 5, generator=draw) + 0.1).half()[:, : columns * spans]
    limits = torch.randint(0, count + 1, (rows,), generator=draw)
    missing = torch.rand(rows, columns, generator=draw) < 0.2
    native = module_of("choose", "native")
    for some in (None, limits):
        for lacking in (None, missing):
            assert native.supports(query, codes)
            got = native.choose(query, codes, scales, spans, count, some, lacking)
            expected = choose(query, codes, scales, spans, count, some, lacking)
            if lacking is not None:  # where too few pages are left, those that are missing may stand for any other
                got, expected = (_held(x, lacking) for x in (got, expected))
            assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_prepared(isa: str, case: Case) -> None:
    """A call that is prepared once chooses for one query after the other, and copies the pages' table entries."""
    inputs = make(case)
    native = module_of("choose", "native")
    assert native.PreparedChoice.supports(inputs)
    call = native.PreparedChoice(inputs)
    for seed in (0, 1):
        inputs.query.copy_(make(case, seed).query)
        columns, table = expected(case, inputs)
        assert torch.equal(call(inputs.query), columns)
        assert torch.equal(inputs.table, table) and (inputs.counts == table[1].numpy()).all()


@pytest.mark.parametrize("some", [False, True])
def test_heads_share_equal_scores(isa: str, some: bool) -> None:
    """Of pages with equal scores those of the first heads are chosen, and of one head those that come first."""
    case, inputs = equal_scores(some)
    assert case.width == 6
    columns, table = expected(case, inputs)
    if not some:
        assert columns.tolist()[:3] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, *[NO_COLUMN] * 3], [NO_COLUMN] * 6]
    call = module_of("choose", "native").PreparedChoice(inputs)
    assert torch.equal(call(inputs.query), columns) and torch.equal(inputs.table, table)
    assert torch.equal(_by_reference(case, inputs), columns)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_heads_share(data: st.DataObject) -> None:
    """Any sizes: what the reference and loops in float64 choose, with every page where all may be read."""
    columns = data.draw(st.integers(1, 40))
    dim, band = data.draw(st.sampled_from([(1, 1), (7, 1), (16, 8), (33, 1), (33, 11), (40, 8)]))
    case = Case(
        batch=data.draw(st.integers(1, 3)),
        heads=data.draw(st.integers(1, 4)),
        group=data.draw(st.integers(1, 5)),
        dim=dim,
        columns=columns,
        spans=data.draw(st.sampled_from([1, 2, 4])),
        count=data.draw(st.integers(1, columns)),
        rule=MassRule(0.02, data.draw(st.sampled_from([0.5, 1.77])), band),
        some=data.draw(st.booleans()),
        sinks=data.draw(st.integers(0, 5)),
    )
    inputs = make(case, data.draw(st.integers(0, 1000)))
    call = module_of("choose", "native").PreparedChoice(inputs)
    columns_, table = expected(case, inputs)
    assert torch.equal(call(inputs.query), columns_) and torch.equal(inputs.table, table)
    assert torch.equal(_by_reference(case, inputs), columns_)


def _by_reference(case: Case, inputs: ChoiceInputs) -> torch.Tensor:
    query = inputs.query.float().reshape(inputs.pages.rows, case.group, 1, case.dim)
    assert isinstance(inputs.rule, MassRule) and inputs.sharing is not None
    vectors, who = (inputs.codes, inputs.scales, inputs.spans), (inputs.limits, inputs.missing)
    return choose_across_heads(query, inputs.rule, *vectors, *who, case.heads, inputs.sharing)


def _held(columns: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    gone = missing.gather(1, columns.clamp(max=missing.shape[1] - 1)) | (columns == NO_COLUMN)
    return columns.masked_fill(gone, NO_COLUMN).sort(1).values
