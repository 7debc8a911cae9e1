"""Results of the kernels against float64, each within the tolerance of its arithmetic."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_kvcache.kernels.cpu import decode as native
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import Attention
from hf_kvcache.kernels.page import PageLayout
from tests.kernels.cpu import brute_force
from tests.kernels.cpu.brute_force import Expected
from tests.kernels.cpu.cases import Call, Case, make_call
from tests.tolerances import SPLIT_IN_16_BITS, TOLERANCES, Tolerance, assert_within

#: The instruction sets with integer dot products.
INTEGER_ISAS = ("avx2", "avx512-vnni", "avx512-amx", "neon-dotprod", "neon-i8mm")


@lru_cache(maxsize=16)
def worked_out(case: Case) -> tuple[Call, Expected]:
    """The call of a case and what it should give; cached, since every instruction set asks for it."""
    call = make_call(case)
    return call, brute_force.attend(call)


def attend(call: Call, sums: bool = True) -> Attention:
    """The kernels' result."""
    assert native.supports(*call[:4])
    return native.attend(*call, sums)


def check(case: Case, factor: float = 1) -> None:
    """Assert that the kernels in use agree with float64, attention sums too; ``factor`` widens the tolerance."""
    call, expected = worked_out(case)
    check_call(call, expected, factor)


def check_call(call: Call, expected: Expected, factor: float = 1) -> None:
    """:func:`check` of a call of one's own."""
    actual = attend(call)
    layout = None if call.pages is None else call.pages.layout
    assert actual.output.dtype == call.query.dtype
    assert actual.dense_sums is not None and (actual.page_sums is None) == (layout is None)
    tolerance = widened(tolerance_of("output", layout), factor)
    assert_within(actual.output, expected.output, max(tolerance, TOLERANCES[call.query.dtype]))
    assert_within(actual.log_sum_exp, expected.log_sum_exp, widened(tolerance_of("log_sum_exp", layout), factor))
    sums_tolerance = widened(tolerance_of("sums", layout), factor)
    assert_within(actual.dense_sums, expected.dense_sums, sums_tolerance)
    if actual.page_sums is not None:
        assert_within(actual.page_sums, expected.page_sums, sums_tolerance)


def widened(tolerance: Tolerance, factor: float) -> Tolerance:
    """A tolerance that is wider by a factor."""
    return Tolerance(tolerance.relative * factor, tolerance.absolute * factor)


def tolerance_of(result: str, layout: PageLayout | None) -> Tolerance:
    """The tolerance of the arithmetic that the instruction set in use has for such pages."""
    integers = layout is not None and library.isa() in INTEGER_ISAS and _takes_integers(layout)
    return SPLIT_IN_16_BITS[result] if integers else TOLERANCES[torch.float32]


def _takes_integers(layout: PageLayout) -> bool:
    """Whether a side's products are of integers: where a scale is shared by less than a page or row, they are not."""
    page = layout.page_size
    return any(
        fmt.level in ("integer", "table") and fmt.group == (page if fmt.axis == "channel" else fmt.dim)
        for fmt in layout.sides.values()
    )
