"""Encoding of vectors into page records: rotation, subtraction of the key mean, rounding by the codec, bit packing."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, side_format
from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.pack import (
    can_encode_pages,
    decode_side,
    encode_pages,
    pack_bits,
    write_key_basis,
    write_key_mean,
)
from hf_kvcache.kernels.page import BIAS, PageLayout


class PageEncoder:
    """A codec for given widths, page size and dtype.

    Args:
        codec: how pages are stored.
        key_dim: width of a key.
        value_dim: width of a value.
        page_size: tokens a page holds.
        dtype: dtype of the model's keys and values.
        biased: whether pages hold a bias per token, which is 0 in all pages that are encoded.

    Raises:
        ValueError: if the codec cannot store such pages.
    """

    def __init__(
        self,
        codec: Codec,
        key_dim: int,
        value_dim: int,
        page_size: int,
        dtype: torch.dtype,
        biased: bool = False,
    ) -> None:
        self.codec = codec
        self.layout = PageLayout(
            side_format(codec.keys, key_dim, page_size, dtype),
            side_format(codec.values, value_dim, page_size, dtype),
            page_size,
            biased,
        )

    @property
    def centered(self) -> bool:
        """Whether a key mean is subtracted from the keys before they are encoded."""
        return self.layout.sides["keys"].centered

    @property
    def balanced(self) -> bool:
        """Whether keys are divided by a scale per channel before they are rotated."""
        return self.layout.sides["keys"].balanced

    @property
    def group(self) -> int:
        """The number of KV heads that share a record."""
        return 1

    @property
    def widths(self) -> dict[str, int]:
        """The widths of a key and of a value of a KV head in the model, by side."""
        return {side: fmt.dim for side, fmt in self.layout.sides.items()}

    def key_mean_of(self, mean: torch.Tensor, key_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The key mean ``[b, Hkv / group, dim]`` in the rotated basis, from ``mean [b, Hkv, Dk]`` in the model's.

        Args:
            mean: of the keys.
            key_scale: by what the keys are divided before the rotation, ``[b, Hkv, Dk]``; or None.
        """
        return rotate(mean if key_scale is None else mean / key_scale, self.layout.sides["keys"])

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_mean: torch.Tensor | None,
        key_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode ``N`` pages.

        Args:
            keys: ``[N, P, Dk]`` in the model's basis, with the KV heads of a sequence side by side.
            values: ``[N, P, Dv]``.
            key_mean: what to subtract from the rotated keys of each record, ``[N / group, dim]``; or None.
            key_scale: by what to divide the keys of each record before the rotation, of the same shape; or None.

        Returns:
            uint8 records ``[N / group, record_bytes]``. On the meta device there are no values to encode.
        """
        if keys.is_meta:
            return torch.empty(keys.shape[0], self.layout.record_bytes, dtype=torch.uint8, device="meta")
        if can_encode_pages(self.layout, self.methods, keys.unsqueeze(1), values.unsqueeze(1)):
            records = torch.empty(keys.shape[0], self.layout.record_bytes, dtype=torch.uint8, device=keys.device)
            self._encode_at_once(keys.unsqueeze(1), values.unsqueeze(1), key_mean, key_scale, records)
            bias = self.layout.view(records, BIAS)
            if bias is not None:
                bias.zero_()
            return records
        records = torch.zeros(keys.shape[0], self.layout.record_bytes, dtype=torch.uint8, device=keys.device)
        self._encode_side("keys", self.codec.keys, keys, key_mean, key_scale, records)
        self._encode_side("values", self.codec.values, values, None, None, records)
        return records

    def writes_at_once(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether :meth:`write` can encode such keys and values. It does not write a bias."""
        return not self.layout.biased and can_encode_pages(self.layout, self.methods, keys, values)

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_mean: torch.Tensor | None,
        key_scale: torch.Tensor | None,
        records: torch.Tensor,
    ) -> None:
        """Encode whole pages where they lie, in one launch or call, if :meth:`writes_at_once`.

        Args:
            keys: ``[b, Hkv, n * P, Dk]`` in the model's basis.
            values: ``[b, Hkv, n * P, Dv]``.
            key_mean: what to subtract from the rotated keys, ``[b, Hkv, dim]``; or None.
            key_scale: by what to divide the keys before the rotation, ``[b, Hkv, dim]``; or None.
            records: uint8 records ``[n * b * Hkv, record_bytes]``, page by page and for each page row by row, or their
                addresses, int64 ``[n * b * Hkv]``.
        """
        mean, scale = (None if t is None else t.flatten(0, 1) for t in (key_mean, key_scale))
        self._encode_at_once(keys, values, mean, scale, records)

    def write_key_mean(self, keys: torch.Tensor, key_scale: torch.Tensor | None, mean: torch.Tensor) -> bool:
        """Write the key mean of ``keys [b, Hkv, n, Dk]`` into ``mean [b, Hkv / group, dim]`` by kernels, if they can.

        Args:
            keys: in the model's basis.
            key_scale: by what they are divided before the rotation, ``[b, Hkv, Dk]``; or None.
            mean: is written.

        Returns:
            Whether it was written.
        """
        return write_key_mean(self.layout.sides["keys"], keys, key_scale, mean)

    def write_key_basis(
        self, query: torch.Tensor, keys: torch.Tensor, first: int, packed: torch.Tensor, mean: torch.Tensor
    ) -> torch.Tensor | None:
        """Write the key mean and return the scale of a prompt, if a kernel can find both together.

        Args:
            query: ``[b, Hq, T, Dk]``, of all tokens.
            keys: ``[b, Hkv, T, Dk]``, of all tokens.
            first: the first token that counts for the scale.
            packed: ``[b, Hkv, n, Dk]``, the keys that are packed.
            mean: float32 ``[b, Hkv, Dk]``, is written.

        Returns:
            The scale, float32 ``[b, Hkv, Dk]``; None if no kernel can, and nothing is written then.
        """
        return write_key_basis(self.layout.sides["keys"], query, keys, first, packed, mean)

    def decode(
        self,
        side: str,
        records: torch.Tensor,
        key_mean: torch.Tensor | None,
        out: torch.Tensor,
        key_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The vectors of one side of pages in the model's basis, as :meth:`encode` has rounded them.

        Args:
            side: ``"keys"`` or ``"values"``.
            records: uint8 ``[C, R, record_bytes]``, ``C`` pages of each of ``R`` rows; the rows of a sequence side by
                side.
            key_mean: what was subtracted from the rotated keys of each row, ``[R, dim]``; or None.
            out: float32 ``[C, R, P, dim]``, overwritten.
            key_scale: by what the keys of each row were divided before the rotation, ``[R, dim]``; or None.

        Returns:
            Float32 ``[R * group, C * P, D]``.
        """
        decoded = decode_side(self.layout, side, records, out)
        if side == "keys" and key_mean is not None:
            decoded = decoded + key_mean.unsqueeze(1)
        vectors = rotate(decoded, self.layout.sides[side], inverse=True).float()
        if side == "keys" and key_scale is not None:
            vectors = vectors * key_scale.unsqueeze(1)
        return vectors.transpose(0, 1).flatten(1, 2)

    @property
    def methods(self) -> tuple[str | None, str | None]:
        """Names of the encodings of keys and of values; None where a codec has none."""
        return self.codec.keys.method, self.codec.values.method

    def _encode_at_once(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_mean: torch.Tensor | None,
        key_scale: torch.Tensor | None,
        records: torch.Tensor,
    ) -> None:
        encode_pages(self.layout, self.methods, keys, values, key_mean, key_scale, records)

    def _encode_side(
        self,
        side: str,
        codec: SideCodec,
        x: torch.Tensor,
        key_mean: torch.Tensor | None,
        key_scale: torch.Tensor | None,
        records: torch.Tensor,
    ) -> None:
        fmt = self.layout.sides[side]
        if fmt.dim == 0:
            return
        if fmt.level != "dense":
            x = x.float()
            x = rotate(x if key_scale is None else x / key_scale.unsqueeze(1), fmt)
            if key_mean is not None:
                x = x - key_mean.unsqueeze(1)
        encoded = codec.encode(x)
        codes = encoded.codes if fmt.level == "dense" else pack_bits(encoded.codes, fmt.bits)
        self._write(records, f"{side}.codes", codes)
        for name in Encoded._fields[1:]:
            array = getattr(encoded, name)
            if array is not None:
                self._write(records, f"{side}.{name}", array)

    def _write(self, records: torch.Tensor, name: str, array: torch.Tensor) -> None:
        field = self.layout.view(records, name)
        assert field is not None and field.shape == array.shape, (name, array.shape)
        field.copy_(array)
