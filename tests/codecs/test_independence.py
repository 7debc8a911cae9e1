"""The encoding of a page depends on the page alone."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.codecs import specs
from tests.choosing import pairwise
from tests.codecs.pages_of import gaussian, make_encoder, name_of

#: Widths of keys and values, and the page size.
SIZES = [(64, 64, 16), (80, 80, 64), (96, 64, 128), (128, 128, 16), (256, 256, 64)]


@pairwise("spec, sizes", specs(), SIZES, of=lambda spec, sizes: (name_of(spec), sizes))
def test_alone_or_among_others(spec: str, sizes: tuple[int, int, int]) -> None:
    """A page encoded alone, among others or once more gives the same bytes."""
    key_dim, value_dim, page_size = sizes
    encoder = make_encoder(spec, *sizes)
    keys, values = gaussian(0, 5, page_size, key_dim), gaussian(1, 5, page_size, value_dim)
    keys[3] *= 1000
    together = encoder.encode(keys, values, None)
    assert torch.equal(encoder.encode(keys, values, None), together)
    for page in (0, 3, 4):
        assert torch.equal(
            encoder.encode(keys[page : page + 1], values[page : page + 1], None), together[page : page + 1]
        )
    assert torch.equal(encoder.encode(keys.flip(0), values.flip(0), None), together.flip(0))


@pytest.mark.parametrize("spec", specs())
def test_strides_do_not_matter(spec: str) -> None:
    """Pages that are a view into other dimensions give the bytes of contiguous ones; nothing is changed."""
    encoder = make_encoder(spec, 64, page_size=16)
    stored = gaussian(0, 16, 5, 64)
    before = stored.clone()
    view = stored.transpose(0, 1)
    assert torch.equal(encoder.encode(view, view, None), encoder.encode(view.contiguous(), view.contiguous(), None))
    assert torch.equal(stored, before)


@pytest.mark.parametrize("spec", specs())
def test_keys_and_values_do_not_mix(spec: str) -> None:
    """Other values leave the bytes of the keys as they are, and the other way round."""
    encoder = make_encoder(spec, 96, 64, 16)
    keys, values = gaussian(0, 2, 16, 96), gaussian(1, 2, 16, 64)
    start = encoder.layout.fields["values.codes"].offset
    base = encoder.encode(keys, values, None)
    other_values, other_keys = encoder.encode(keys, values + 1, None), encoder.encode(keys + 1, values, None)
    assert torch.equal(base[:, :start], other_values[:, :start])
    assert torch.equal(base[:, start:], other_keys[:, start:])
    assert not torch.equal(base, other_values) and not torch.equal(base, other_keys)
