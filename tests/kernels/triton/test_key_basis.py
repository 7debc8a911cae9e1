"""The scale and the mean of the keys of a prompt in two launches, against each alone and against float64."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_matrix
from hf_kvcache.kernels.triton import key_basis as kernel
from hf_kvcache.kernels.triton.key_mean import key_mean
from hf_kvcache.kernels.triton.key_scale import key_scale
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401 (an autouse fixture)
from tests.kernels.triton.test_key_scale import made

#: Sequences, heads, tokens, width; query heads per KV head; dtype; the first token that counts; tokens that are packed.
CASES = [
    ((1, 2, 40, 16), 3, torch.float32, 4, 1),
    pytest.param((2, 1, 600, 40), 1, torch.bfloat16, 4, 512, marks=pytest.mark.slow),
    pytest.param((1, 1, 300, 64), 2, torch.float16, 0, 300, marks=pytest.mark.slow),
    # What is packed may be longer than what the scale is made of.
    pytest.param((1, 1, 12, 16), 2, torch.float32, 0, 300, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "group", "dtype", "first", "count"), CASES)
def test_as_each_alone(
    shape: tuple[int, int, int, int], group: int, dtype: torch.dtype, first: int, count: int, device: torch.device
) -> None:
    """Odd sizes, GQA, keys that are part of a larger tensor, and NaN in what does not count."""
    query, keys = made(shape, group, dtype, device)
    longer = made((shape[0], shape[1], count + 5, shape[3]), group, dtype, device)[1]
    packed = longer[:, :, 3 : 3 + count]
    for unread in (query[:, :, :first], keys[:, :, :first], longer[:, :, :3], longer[:, :, 3 + count :]):
        unread.fill_(torch.nan)
    fmt = SideFormat(shape[3], 4, rotation="hadamard")
    mean, alone = (torch.full((*shape[:2], shape[3]), torch.nan, device=device) for _ in range(2))
    assert kernel.supports(fmt, query, keys, first, packed)
    scale = kernel.key_basis(query, keys, first, packed, fmt, mean)
    assert torch.equal(scale, key_scale(query, keys, first, None)) and scale.is_contiguous()
    assert len(scale.unique()) > 2
    key_mean(fmt, packed, scale, alone)
    assert torch.equal(mean, alone)
    matrix = rotation_matrix(shape[3], "hadamard", torch.float64, torch.device("cpu"))
    assert matrix is not None
    exact = (packed.cpu().double().mean(2) / scale.cpu().double()) @ matrix
    torch.testing.assert_close(mean.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_other_tensors_are_left_to_others(device: torch.device) -> None:
    """No packed keys, another dtype, a side that is not rotated."""
    query, keys = made((1, 1, 12, 16), 1, torch.float32, device)
    fmt = SideFormat(16, 4, rotation="hadamard")
    assert kernel.supports(fmt, query, keys, 0, keys)
    for wrong in (keys[:, :, :0], keys.half(), keys[..., :8], keys.expand(2, 1, 12, 16)):
        assert not kernel.supports(fmt, query, keys, 0, wrong)
    assert not kernel.supports(SideFormat(16, 4), query, keys, 0, keys)
    assert not kernel.supports(fmt, query.half(), keys, 0, keys)
