"""The page format: how the bytes of a page are laid out and what they mean.

A page holds ``page_size`` tokens of one KV head as a single record of bytes. Each side (keys, values) decodes as

    x_hat[t, c] = (level(code[t, c]) * scale + zero) * other

in a rotated basis. ``scale`` and ``zero`` have one axis, per channel or per token. ``other`` is an optional second
scale on the other axis. ``level`` is the identity, a table or a cast. Every codec is a choice of these constants with
an ``encode``, so that one decode kernel serves all codecs.

A page may also hold a *bias* per token, which is added to the token's scores: the logarithm of how many tokens it
stands for. It lies in the record, so it goes wherever the token goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch

Axis = Literal["channel", "token"]
Level = Literal["integer", "table", "float8", "dense"]
Rotation = Literal["none", "hadamard", "signed_hadamard"]

#: Records start at multiples of this many bytes, so that vector loads of any field stay aligned.
ALIGNMENT = 16
#: The name of the field with the bias of each token.
BIAS = "bias"


@dataclass(frozen=True)
class SideFormat:
    """What the bytes of one side (keys or values) of a page mean.

    Attributes:
        dim: width of a token's vector (head_dim, or the latent rank).
        bits: bits of a code; for ``level="dense"`` the bits of the stored element.
        level: how a code becomes a number before scaling.
        axis: ``"channel"``: a scale per channel and group of tokens; ``"token"``: one per token and group of channels.
        group: tokens (axis "channel") or channels (axis "token") that share a scale.
        zero: whether a zero point is stored beside the scale.
        other: whether a second scale along the other axis is stored.
        rotation: orthonormal map applied to the vectors before encoding.
        centered: whether a key mean is subtracted first. It changes all scores of a query alike, so softmax ignores it.
        table: the levels when ``level="table"``, ascending, ``2**bits`` of them.
        dense_dtype: the element type when ``level="dense"``.
        balanced: whether the keys of each KV head are divided by a factor per channel before the rotation. Queries are
            multiplied by it, so scores do not change.
    """

    dim: int
    bits: int
    level: Level = "integer"
    axis: Axis = "token"
    group: int = 0
    zero: bool = True
    other: bool = False
    rotation: Rotation = "none"
    centered: bool = False
    table: tuple[float, ...] = ()
    dense_dtype: torch.dtype | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.balanced and not self.centered:
            # Caches hold and save a scale of keys beside their mean, and only there.
            raise ValueError("balanced=True with centered=False; accepted: centered=True, or balanced=False")

    def scale_shape(self, page_size: int) -> tuple[int, int]:
        """Shape of ``scale`` (and ``zero``) for one page: ``[token groups, channel groups]``."""
        if self.axis == "channel":
            return page_size // self.group, self.dim
        return page_size, self.dim // self.group

    def other_shape(self, page_size: int) -> tuple[int, int]:
        """Shape of ``other`` for one page: per token under axis "channel", per channel under axis "token"."""
        return (page_size, 1) if self.axis == "channel" else (1, self.dim)


class Field(NamedTuple):
    """A typed array inside a page record: ``record[offset : offset + nbytes]`` seen as ``dtype`` of ``shape``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class PageLayout:
    """Byte layout of a page record for a pair of side formats.

    Args:
        keys: format of the key side.
        values: format of the value side.
        page_size: tokens a page holds.
        biased: whether a page holds a bias per token. It is added to the scores of the token, softcap or not, and
            stored in half precision.
    """

    def __init__(self, keys: SideFormat, values: SideFormat, page_size: int, biased: bool = False) -> None:
        self.sides = {"keys": keys, "values": values}
        self.page_size, self.biased = page_size, biased
        self.fields: dict[str, Field] = {}
        offset = 0
        for side, fmt in self.sides.items():
            for name, shape, dtype in _side_fields(fmt, page_size):
                field = Field(shape, dtype, offset)
                self.fields[f"{side}.{name}"] = field
                offset += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        if biased:
            field = self.fields[BIAS] = Field((page_size,), torch.float16, offset)
            offset += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self.record_bytes = offset
        self.code_bytes = sum(f.nbytes for name, f in self.fields.items() if name.endswith(".codes"))
        self.scale_bytes = sum(f.nbytes for f in self.fields.values()) - self.code_bytes

    @property
    def bits_per_element(self) -> float:
        """Bits per packed element, scales counted, averaged over keys and values."""
        elements = self.page_size * sum(fmt.dim for fmt in self.sides.values())
        return 8 * (self.code_bytes + self.scale_bytes) / elements

    def view(self, records: torch.Tensor, name: str) -> torch.Tensor | None:
        """The field ``name`` of ``records [..., record_bytes]`` as ``[..., *shape]``, or None if it is not stored."""
        field = self.fields.get(name)
        if field is None:
            return None
        raw = records[..., field.offset : field.offset + field.nbytes]
        return raw.view(field.dtype).unflatten(-1, field.shape)


def _side_fields(fmt: SideFormat, page_size: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    if fmt.level == "dense":
        assert fmt.dense_dtype is not None
        return [("codes", (page_size, fmt.dim), fmt.dense_dtype)]
    fields: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("codes", (page_size, fmt.dim * fmt.bits // 8), torch.uint8),
        ("scale", fmt.scale_shape(page_size), torch.float16),
    ]
    if fmt.zero:
        fields.append(("zero", fmt.scale_shape(page_size), torch.float16))
    if fmt.other:
        fields.append(("other", fmt.other_shape(page_size), torch.float16))
    return fields
