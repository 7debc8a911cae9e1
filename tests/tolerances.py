"""The table of tolerances: how far a result may be from its float64 reference, by its dtype."""

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

#: For the CPU kernels' integer products, whose float side (scaled queries, weights) is split in 16 bits. Each of its
#: elements has an error of up to 2^-16 of the largest. A score of normal vectors sums 64 to 256 products with levels,
#: so its error is some 1e-4, which is the relative error of a probability, and of the outputs in units of the values.
#: The largest error of an output in some 1700 calls was 1.4e-4.
SPLIT_IN_16_BITS = {
    "output": Tolerance(1e-5, 3e-4),
    "log_sum_exp": Tolerance(1e-5, 2.5e-4),
    "sums": Tolerance(3e-4, 4e-6),
}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless ``actual`` equals ``expected`` within the tolerance of ``dtype`` (its own by default)."""
    assert_within(actual, expected, TOLERANCES[dtype or actual.dtype])


def assert_within(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    """Fail unless ``actual`` equals ``expected`` within the ``tolerance``."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=False
    )
