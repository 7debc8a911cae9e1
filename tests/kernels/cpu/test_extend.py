"""Long blocks of queries: the native kernels against the reference, which the storage tests compare with float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.attention import read_pages
from hf_kvcache.kernels.cpu import extend as native
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.pruning import keep_only
from hf_kvcache.storage.token_view import TokenView
from tests.tolerances import assert_near


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def storage_of(codec: str, length: int, key_dim: int = 32, value_dim: int = 32) -> PagedStorage:
    encoder = PageEncoder(resolve(codec), key_dim, value_dim, 16, torch.float32)
    keys, values = random(1, 2, 2, length, key_dim), random(2, 2, 2, length, value_dim)
    storage = PagedStorage(encoder, keys, values, 2, 5)
    storage.append_block(keys, values, 0, None)
    return storage


@pytest.mark.parametrize("codec", ["none", "rotated4", "unbiased3", "fp8", "kvarn2"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("chunk", "widths"), [(32, (32, 32)), (4096, (32, 32)), (32, (24, 40)), (32, (64, 16))])
def test_block_of_queries(
    codec: str, sinks: bool, chunk: int, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks of pages, the tail, and the tokens of the queries, which are causal."""
    monkeypatch.setattr(native, "_CHUNK_TOKENS", chunk)
    key_dim, value_dim = widths
    storage = storage_of(codec, 150, *widths)
    dense, pages = storage.dense, storage.pages()
    assert pages is not None and pages.columns > 4
    at = torch.cat(
        [torch.from_numpy(dense.positions[:, : dense.longest].copy()), torch.arange(150, 170).expand(2, 20)], 1
    )
    tokens = DenseTokens(
        torch.cat([dense.keys[:, :, : dense.longest], random(3, 2, 2, 20, key_dim)], 2),
        torch.cat([dense.values[:, :, : dense.longest], random(4, 2, 2, 20, value_dim)], 2),
        at,
    )
    query, visibility = random(5, 2, 6, 20, key_dim), Visibility(150, 20, None, 0, True, None)
    scoring = Scoring(0.2, None, random(6, 6) if sinks else None)
    assert native.supports(query, pages, tokens, visibility)
    ours = native.attend(query, pages, tokens, visibility, scoring, sums=True)
    theirs = reference.attend(query, pages, tokens, visibility, scoring, sums=True)
    for own, other in zip(ours, theirs, strict=True):
        assert own is not None and other is not None
        assert_near(own, other)


@pytest.mark.parametrize("codec", ["none", "unbiased3"])
def test_pages_with_holes_and_rows_without(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After eviction pages hold fewer tokens than they could, and heads end at different pages."""
    monkeypatch.setattr(native, "_CHUNK_TOKENS", 32)
    storage = storage_of(codec, 150)
    held = TokenView.of(storage, np.arange(2))
    keep = torch.from_numpy(np.random.default_rng(0).random(held.shape) < np.array([0.9, 0.1])[:, None])
    keep[..., :2] = keep[..., -5:] = True
    keep_only(held, keep)
    pages = storage.pages()
    assert pages is not None and not pages.full and (pages.counts == 0).any()
    length = storage.dense.longest
    dense = DenseTokens(storage.dense.keys[:, :, :length], storage.dense.values[:, :, :length])
    query, visibility = random(5, 2, 6, 20, 32), Visibility(150, 20, None, 0, True, None)
    assert native.supports(query, pages, dense, visibility)
    ours = native.attend(query, pages, dense, visibility, Scoring(0.2))
    # Decoded alike: the few tokens of a page have let its scales grow, so that two orders of rounding differ by more
    # than the tolerance.
    theirs = reference.attend(query, pages, dense, visibility, Scoring(0.2), read_pages=read_pages)
    assert_near(ours.output, theirs.output)
    assert_near(ours.log_sum_exp, theirs.log_sum_exp)


def test_a_row_without_pages_sees_none_of_the_others() -> None:
    """Its queries see nothing, not even full-precision tokens: output 0, log-sum-exp of minus infinity."""
    storage = storage_of("none", 150)
    held = TokenView.of(storage, np.arange(1))
    number = torch.arange(held.tokens)
    keep = ((number < 2) | (number >= held.tokens - 5)).expand(held.shape)  # sinks and tail only
    keep_only(held, keep)
    pages = storage.pages()
    assert pages is not None and (pages.counts.sum(1) == 0).any()
    dense = DenseTokens(random(3, 2, 2, 4, 32), random(4, 2, 2, 4, 32), unused=torch.ones(2, 4, dtype=torch.bool))
    query, visibility = random(5, 2, 6, 20, 32), Visibility(150, 20, None, 0, True, None)
    ours = native.attend(query, pages, dense, visibility, Scoring(0.2))
    theirs = reference.attend(query, pages, dense, visibility, Scoring(0.2))
    assert ours.output[0].eq(0).all() and (ours.log_sum_exp[0] == -torch.inf).all()
    assert_near(ours.output, theirs.output)
    assert_near(ours.log_sum_exp[1], theirs.log_sum_exp[1])


def test_what_it_leaves_to_the_reference() -> None:
    storage = storage_of("int4", 150)
    pages = storage.pages()
    dense = DenseTokens(storage.dense.keys, storage.dense.values)
    query = random(5, 2, 6, 20, 32)
    assert native.supports(query, pages, dense, Visibility(150, 20, None, 0, True, None))
    assert not native.supports(query, pages, dense, Visibility(150, 20, None, 0, True, 40))
