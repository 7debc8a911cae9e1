"""Page records of low-rank coefficients: keys and values in a calibrated basis, packed by any codec."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.lowrank.projection import LayerProjection, SideProjection


class LowRankEncoder(PageEncoder):
    """Projects keys and values and packs the coefficients; the codec sees vectors whose width is the rank.

    Args:
        codec: how coefficients are stored.
        projection: the bases, on the device of the pages.
        page_size: tokens a page holds.
        dtype: dtype of the model's keys and values.

    Raises:
        ValueError: if the codec cannot store vectors of that width.
    """

    def __init__(self, codec: Codec, projection: LayerProjection, page_size: int, dtype: torch.dtype) -> None:
        super().__init__(codec, projection.keys.rank, projection.values.rank, page_size, dtype)
        self.projection = projection

    @property
    def group(self) -> int:
        return self.projection.heads // self.projection.groups

    @property
    def widths(self) -> dict[str, int]:
        return {side: getattr(self.projection, side).down.shape[1] // self.group for side in ("keys", "values")}

    @property
    def balanced(self) -> bool:
        return False  # no queries in the basis of the coefficients are known when keys are packed

    def key_mean_of(self, mean: torch.Tensor, key_scale: torch.Tensor | None = None) -> torch.Tensor:
        coefficients = self._project(self.projection.keys, mean.flatten(0, 1).unsqueeze(1))
        return super().key_mean_of(coefficients.view(mean.shape[0], self.projection.groups, -1))

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_mean: torch.Tensor | None,
        key_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        projection = self.projection
        return super().encode(self._project(projection.keys, keys), self._project(projection.values, values), key_mean)

    def decode(
        self,
        side: str,
        records: torch.Tensor,
        key_mean: torch.Tensor | None,
        out: torch.Tensor,
        key_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        projection: SideProjection = getattr(self.projection, side)
        coefficients = super().decode(side, records, key_mean, out).unflatten(0, (-1, self.projection.groups))
        vectors = coefficients @ projection.up
        if projection.mean is not None:
            vectors += projection.mean.unsqueeze(1)
        return vectors.unflatten(3, (self.group, -1)).transpose(2, 3).flatten(0, 2)

    def writes_at_once(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        return False  # coefficients of a long prompt are made in portions

    def write_key_mean(self, keys: torch.Tensor, key_scale: torch.Tensor | None, mean: torch.Tensor) -> bool:
        return False

    def _project(self, projection: SideProjection, x: torch.Tensor) -> torch.Tensor:
        """Coefficients ``[N / group, P, r]``, float32, of ``x [N, P, D]``.

        The KV heads of a sequence are neighbours in ``x``.
        """
        together = x.float().unflatten(0, (-1, self.projection.groups, self.group)).transpose(2, 3).flatten(3)
        if projection.mean is not None:
            together = together - projection.mean.unsqueeze(1)
        return (together @ projection.down).flatten(0, 1)
