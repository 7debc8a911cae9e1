"""Gathering of single latents by every backend, against pages that are decoded from their bytes with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.reference import latent_gather as reference
from tests.kernels.cpu.brute_force import decode_record
from tests.kernels.test_latent_decode import CODECS, Shape, make_call, make_case

_SHAPES = (Shape(64, 16, 32, 5, 1, 2), Shape(16, 8, 8, 1, 1, 1), Shape(64, 0, 16, 4, 3, 2), Shape(128, 64, 24, 4, 1, 3))


def _record(pages: Pages, address: int) -> np.ndarray:
    for slab in pages.slabs:
        offset = address - slab.data_ptr()
        if 0 <= offset < slab.numel():
            return slab.view(-1)[offset : offset + pages.layout.record_bytes].numpy()
    raise AssertionError("no slab holds the record")


def expected(pages: Pages, dense: DenseTokens, places: np.ndarray) -> list[np.ndarray]:
    """Latents and rotary keys in float64, in the basis of the pages."""
    out = []
    for side, held in (("keys", dense.keys), ("values", dense.values)):
        fmt, slots, size = pages.layout.sides[side], held.shape[2], pages.layout.page_size
        matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, torch.device("cpu")) if fmt.dim else None
        tokens = np.zeros((*places.shape, fmt.dim))
        for (row, i), place in np.ndenumerate(places):
            if 0 <= place < slots:
                x = held[row, 0, place].double().numpy()
                tokens[row, i] = x if matrix is None else x @ matrix.numpy()
            elif fmt.dim and place >= slots and pages.addresses[row, (place - slots) // size]:
                record = _record(pages, int(pages.addresses[row, (place - slots) // size]))
                tokens[row, i] = decode_record(pages.layout, side, record)[(place - slots) % size]
        out.append(tokens)
    return out


def _places(pages: Pages, dense: DenseTokens, count: int) -> np.ndarray:
    """Places of tokens in random order, and some of none."""
    rng, slots, size = np.random.default_rng(3), dense.keys.shape[2], pages.layout.page_size
    places = np.full((pages.rows, count), -1)
    for row in range(pages.rows):
        there = [slots + c * size + t for c in range(pages.columns) for t in range(pages.counts[row, c])]
        some = rng.permutation([*range(slots), *there, -1, -1])[:count]
        places[row, : len(some)] = some
    return places


def check(backend: str, codec: str, shape: Shape, count: int = 40, **features: Any) -> None:
    """Tokens that a backend gathers from pages of a codec and from a full-precision buffer."""
    call = make_call(make_case(codec, shape, **features))
    assert call.pages is not None
    places = _places(call.pages, call.dense, count)
    assert (places >= call.dense.keys.shape[2]).any()
    module: Any = reference if backend == "reference" else dispatch.module_of("latent_gather", backend)
    if backend != "reference":
        assert module.supports(call.pages, call.dense)
    got = module.gather_latents(call.pages, call.dense, torch.from_numpy(places))
    dtype = call.dense.keys.dtype
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    wanted_sides = expected(call.pages, call.dense, places)
    for x, wanted in zip(got, wanted_sides, strict=True):
        assert x.dtype == dtype and x.shape[1] == 1
        top = float(np.abs(wanted).max(initial=1))
        np.testing.assert_allclose(x[:, 0].double().numpy(), wanted, rtol=tolerance, atol=tolerance * top)
        assert not x[:, 0][torch.from_numpy(places < 0)].any()


@pytest.mark.parametrize("codec", CODECS)
def test_gathered_tokens(codec: str) -> None:
    """Tokens of pages and of the full-precision buffer, none of them, in any order; rows without some of the pages."""
    for shape in _SHAPES:
        check("reference", codec, shape, ragged=shape.batch > 1)
    check("reference", codec, _SHAPES[0], dense_dtype=torch.bfloat16)


def test_without_pages() -> None:
    """A cache of full-precision tokens alone."""
    call = make_call(make_case(None, _SHAPES[0]))
    places = torch.tensor([[0, -1, 1], [2, 0, -1]])
    latents, rotary = reference.gather_latents(None, call.dense, places)
    for x, held in ((latents, call.dense.keys), (rotary, call.dense.values)):
        wanted = torch.stack([held[0, 0, 0], 0 * held[0, 0, 0], held[0, 0, 1]])
        torch.testing.assert_close(x[0, 0], wanted, rtol=0, atol=0)
