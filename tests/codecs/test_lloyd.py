"""Lloyd-Max levels of the standard normal distribution."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.codecs.lloyd import lloyd_max_levels, nearest_level, normal_levels
from tests.tolerances import assert_near

#: The positive levels published by Max (1960), table I.
PUBLISHED = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_published_levels(bits: int) -> None:
    """The levels are those of the literature to the digits printed there, mirrored around zero."""
    expected = [*(-level for level in reversed(PUBLISHED[bits])), *PUBLISHED[bits]]
    assert lloyd_max_levels(bits) == pytest.approx(expected, abs=6e-4)
    levels = normal_levels(bits)
    assert levels == pytest.approx([-level for level in reversed(levels)], abs=1e-9)
    assert levels == pytest.approx(expected, abs=levels[-1] / 127)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_nearest(bits: int) -> None:
    """Every number gets the level that is nearest to it, far outside the range too."""
    x = torch.cat([torch.linspace(-6, 6, 3001), torch.tensor([-1e30, 1e30, 0.0])])
    codes, levels = nearest_level(x, bits)
    distances = (x[:, None].double() - torch.tensor(normal_levels(bits), dtype=torch.float64)).abs()
    assert codes.dtype == torch.uint8 and int(codes.max()) == 2**bits - 1
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), atol=1e-6, rtol=1e-6)
    assert_near(levels, torch.tensor(normal_levels(bits), dtype=torch.float64)[codes.long()])
