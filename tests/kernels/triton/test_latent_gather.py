"""The Triton kernel that gathers single latents, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_latent_decode import CODECS, Shape, make_call, make_case
from tests.kernels.test_latent_gather import check
from tests.kernels.test_latent_picked import check as check_picked
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401

_FAST = ("bfloat16", "int4 rotated in groups")


@pytest.mark.parametrize("codec", _FAST)
def test_gathered_tokens(codec: str) -> None:
    """Rows without some of the pages, tokens of both kinds and of none."""
    check("triton", codec, Shape(64, 16, 32, 5, 1, 2), count=16, ragged=True, dense_dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("codec", _FAST)
def test_attention_to_gathered_tokens(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole call, in the kernels' basis: gathering, attention, and the rotation of queries and outputs."""
    call = make_call(make_case(codec, Shape(64, 16, 32, 5, 2, 2), ragged=True))
    check_picked("triton", call, 24, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("codec", [name for name in CODECS if name not in _FAST])
def test_other_codecs(codec: str) -> None:
    """The other ways to store latents; widths that are no powers of two; a rotary part of nothing."""
    check("triton", codec, Shape(48, 24, 24, 3, 1, 2), ragged=True, strided=True)
    check("triton", codec, Shape(64, 0, 16, 4, 1, 1))
