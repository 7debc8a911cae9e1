"""The kernels as torch operators: schemas, fake implementations, and use from compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels import ops
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.latent_decode import latent_attend
from hf_kvcache.kernels.visibility import Visibility


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend_arguments(codec: str = "unbiased4") -> tuple[Any, ...]:
    """Two rows of three pages of 16 tokens and five full-precision tokens."""
    encoder = PageEncoder(resolve(codec), 32, 32, 16, torch.float32)
    key_mean = random(3, 2, 32) if encoder.centered else None
    repeated = None if key_mean is None else key_mean.repeat_interleave(3, 0)
    records = encoder.encode(random(1, 6, 16, 32), random(2, 6, 16, 32), repeated)
    addresses = records.data_ptr() + torch.arange(6).view(2, 3) * records.shape[1]
    counts = torch.full((2, 3), 16, dtype=torch.int32)
    first = (torch.arange(3) * 16).expand(2, 3).contiguous()
    dense = (random(4, 1, 2, 5, 32), random(5, 1, 2, 5, 32), torch.arange(48, 53)[None], None)
    key = ops.layout_key(encoder.layout)
    return (
        random(6, 1, 6, 1, 32),
        [records],
        addresses,
        counts,
        first,
        key_mean,
        key,
        *dense,
        52,
        True,
        40,
        0.2,
        None,
        None,
    )


def latent_arguments(codec: str = "rotated4") -> tuple[Any, ...]:
    """One row of three pages of 16 tokens and five full-precision tokens; ranks of 32, rotary keys of 8."""
    encoder = PageEncoder(resolve(codec), 32, 8, 16, torch.float32)
    records = encoder.encode(random(1, 3, 16, 32), random(2, 3, 16, 8), None)
    addresses = records.data_ptr() + torch.arange(3)[None] * records.shape[1]
    counts, first = torch.full((1, 3), 16, dtype=torch.int32), torch.arange(3)[None] * 16
    dense = (random(4, 1, 1, 5, 32), random(5, 1, 1, 5, 8), torch.arange(48, 53)[None], None)
    key = ops.layout_key(encoder.layout)
    return random(6, 1, 4, 2, 40), [records], addresses, counts, first, key, *dense, 51, True, 40, 0.2, None, None


@pytest.mark.parametrize("codec", ["unbiased4", "none", "int8"])
def test_a_layout_survives_as_a_string(codec: str) -> None:
    layout = PageEncoder(resolve(codec), 32, 64, 16, torch.bfloat16).layout
    again = ops.layout_of(ops.layout_key(layout))
    assert again.sides == layout.sides and again.fields == layout.fields and again.page_size == layout.page_size


@pytest.mark.parametrize("codec", ["unbiased4", "none", "int8"])
def test_attend(codec: str) -> None:
    """The operator is the function with its arguments flattened."""
    arguments = attend_arguments(codec)
    query, slabs, addresses, counts, first, key_mean, key, keys, values, positions, _ = arguments[:11]
    tables: list[np.ndarray] = [t.numpy() for t in (addresses, counts, first)]
    pages = Pages(ops.layout_of(key), slabs, tables[0], tables[1], tables[2], {}, key_mean, 2)
    expected = attend(
        query, pages, DenseTokens(keys, values, positions), Visibility(52, 1, None, 0, True, 40), Scoring(0.2)
    )
    output, log_sum_exp = torch.ops.hf_kvcache.attend(*arguments)
    assert torch.equal(output, expected.output) and torch.equal(log_sum_exp, expected.log_sum_exp)


@pytest.mark.parametrize("codec", ["rotated4", "none"])
def test_latent_attend(codec: str) -> None:
    """The operator is the function with its arguments flattened, with pages and without."""
    arguments = latent_arguments(codec)
    query, slabs, addresses, counts, first, key, latents, rotary, positions, _ = arguments[:10]
    pages = Pages(ops.layout_of(key), slabs, addresses.numpy(), counts.numpy(), first.numpy(), {}, None, 1)
    dense = DenseTokens(latents, rotary, positions)
    for given, passed in ((pages, slabs), (None, [])):
        expected = latent_attend(query, given, dense, Visibility(51, 2, None, 0, True, 40), Scoring(0.2))
        output, log_sum_exp = torch.ops.hf_kvcache.latent_attend(query, passed, *arguments[2:])
        assert torch.equal(output, expected.output) and torch.equal(log_sum_exp, expected.log_sum_exp)


def cases() -> dict[str, tuple[Any, ...]]:
    keys = random(1, 1, 2, 7, 16)
    lse = torch.full((1, 4, 3), 2.0)
    attended = attend_arguments()
    return {
        "attend": attended,
        "column_sums": (random(2, 1, 4, 3, 16), lse, keys, keys, torch.arange(7)[None], None, 4, True, None, 0.3, None),
        "latent_attend": latent_arguments(),
        "rotate": (random(6, 3, 32), "signed_hadamard", False),
        "decode_side": (attended[1][0], attended[6], False),
    }


@pytest.mark.parametrize("name", ["attend", "column_sums", "latent_attend", "rotate", "decode_side"])
def test_contract(name: str) -> None:
    """Schema, fake implementation and tracing, as torch checks them."""
    torch.library.opcheck(getattr(torch.ops.hf_kvcache, name).default, cases()[name])


@pytest.mark.parametrize("name", ["attend", "latent_attend", "rotate"])
def test_compiled(name: str) -> None:
    """A compiled function holds the operator in one graph and gives the same."""
    operator, arguments = getattr(torch.ops.hf_kvcache, name), cases()[name]

    def use(x: torch.Tensor) -> torch.Tensor:
        result = operator(x * 2, *arguments[1:])
        return (result if isinstance(result, torch.Tensor) else result[0]) + 1

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), use(arguments[0]))


def test_rotation_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"rotation='haar'.*signed_hadamard"):
        torch.ops.hf_kvcache.rotate(torch.zeros(1, 8), "haar", False)
