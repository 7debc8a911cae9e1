"""Pages of low-rank coefficients without any full-precision tokens, in widths that are no head dimension."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.triton import decode, extend
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kernel", "queries"), [(decode, 2), (extend, 20)], ids=["decode", "extend"])
@pytest.mark.parametrize("spec", ["unbiased4", slow("none"), slow("rotated8")])
@pytest.mark.parametrize("ranks", [(24, 16), slow((48, 40)), slow((64, 64)), slow((200, 192)), slow((256, 248))])
def test_pages_alone(ranks: tuple[int, int], spec: str, kernel: ModuleType, queries: int) -> None:
    """Output and log-sum-exp are those of the reference."""
    encoder = PageEncoder(resolve(spec), *ranks, 16, torch.float32)
    draw = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 48, rank, generator=draw) for rank in ranks)
    storage = PagedStorage(encoder, keys, values, 0, 0)
    storage.append_block(keys, values, 0, None)
    query = torch.randn(1, 4, queries, ranks[0], generator=draw)
    nothing = DenseTokens(*(query.new_empty(1, 2, 0, rank) for rank in ranks))
    call = query, storage.pages(), nothing, Visibility(48, queries, None, 0, True, None)
    assert kernel.supports(*call)
    ours, theirs = kernel.attend(*call, Scoring(0.2)), reference.attend(*call, Scoring(0.2))
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.log_sum_exp, theirs.log_sum_exp, rtol=1e-4, atol=1e-4)
