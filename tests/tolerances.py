"""The one table of tolerances: how far a result may lie from its float64 reference, by its dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """As in ``torch.testing.assert_close``: ``|actual - expected| <= absolute + relative * |expected|``."""

    relative: float
    absolute: float


#: For sums of a few hundred products of numbers of order 1; about 16 units in the last place of the dtype.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 4e-6),
    torch.float16: Tolerance(4e-3, 2e-3),
    torch.bfloat16: Tolerance(3.2e-2, 1.6e-2),
}

#: For the CPU kernels' integer products, whose float side is split in 16 bits: PLACEHOLDER
SPLIT_IN_16_BITS = Tolerance(1e-5, 6e-4)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless ``actual`` is ``expected`` within the tolerance of ``dtype`` (its own by default)."""
    assert_within(actual, expected, TOLERANCES[dtype or actual.dtype])


def assert_within(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    """Fail unless ``actual`` is ``expected`` within a tolerance of one's own choice."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=False
    )
