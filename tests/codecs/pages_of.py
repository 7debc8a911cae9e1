"""Pages for the codec tests: data, encoding and decoding."""

from __future__ import annotations

import torch

from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.pack import decode_side

SIDES = ("keys", "values")


def name_of(spec: str) -> str:
    """The name of the codec without its width, on which most failures depend."""
    return resolve(spec).name


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_encoder(
    spec: str | Codec,
    key_dim: int = 64,
    value_dim: int | None = None,
    page_size: int = 64,
    dtype=torch.float32,
) -> PageEncoder:
    return PageEncoder(resolve(spec), key_dim, value_dim or key_dim, page_size, dtype)


def rotated(encoder: PageEncoder, side: str, pages: torch.Tensor) -> torch.Tensor:
    """Pages in the basis in which they are rounded, in float64."""
    fmt = encoder.layout.sides[side]
    rotation = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, pages.device)
    return pages.double() if rotation is None else torch.einsum("npd,de->npe", pages.double(), rotation)


def decoded(encoder: PageEncoder, side: str, records: torch.Tensor) -> torch.Tensor:
    """The vectors of the records in that basis, float64."""
    shape = (len(records), encoder.layout.page_size, encoder.layout.sides[side].dim)
    return decode_side(encoder.layout, side, records, torch.full(shape, float("nan"))).double()


def round_trip(encoder: PageEncoder, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each side encoded and decoded, in the basis in which it is rounded."""
    records = encoder.encode(keys, values, None)
    return {side: decoded(encoder, side, records) for side in SIDES}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean squared error over root mean square."""
    return float((actual - expected).norm() / expected.norm())
