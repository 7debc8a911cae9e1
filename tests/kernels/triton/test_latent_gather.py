"""The Triton kernel that gathers single latents, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_latent_decode import Shape
from tests.kernels.test_latent_gather import check
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8 rotated", "int4 rotated in groups", "turboquant3", "fp8"])
def test_gathered_tokens(codec: str) -> None:
    """Rows without some of the pages, tokens of both kinds and of none, a rotary part of nothing."""
    check("triton", codec, Shape(64, 16, 32, 5, 1, 2), ragged=True)
    check("triton", codec, Shape(64, 0, 16, 4, 1, 1), dense_dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int4", "int2 in groups", "int3 in groups", "int8 per channel in groups"])
def test_other_codecs(codec: str) -> None:
    """The other ways to share scales, and widths that are no powers of two."""
    check("triton", codec, Shape(48, 24, 24, 3, 1, 2), ragged=True, strided=True)
