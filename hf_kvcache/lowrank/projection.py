"""The bases in which the layers of a model store keys and values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_kvcache.integration.recording import check_model, load_file
from hf_kvcache.lowrank.identity import identity
from hf_kvcache.lowrank.ranks import Spread, choose_ranks

_FORMAT = "hf_kvcache projection 1"
_SIDES = ("keys", "values")


@dataclass(frozen=True)
class SideProjection:
    """Keys or values of one layer as latents: ``latent = (x - mean) @ down``, ``x ~ mean + latent @ up``.

    ``g`` neighbouring KV heads share a latent: ``x`` is their vectors side by side. With ``g = 1`` each head has one of
    its own.

    Attributes:
        down: float32 ``[G, g * D, r]``, ``G = Hkv / g``.
        up: float32 ``[G, r, g * D]``.
        mean: float32 ``[G, g * D]``, what is taken out first; None for nothing.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Width of a latent."""
        return self.down.shape[2]


@dataclass(frozen=True)
class LayerProjection:
    """How one layer's keys and values are stored.

    Attributes:
        keys: of the keys.
        values: of the values.
        heads: number of KV heads, ``Hkv``; the same number of them share a latent on both sides.
        before_rope: whether the basis is one of keys before their rotary embedding.
        weights: some numbers of the layer's weights, to know the model by; None where there are none.
    """

    keys: SideProjection
    values: SideProjection
    heads: int
    before_rope: bool = False
    weights: Sequence[float] | None = field(default=None, repr=False)

    @property
    def groups(self) -> int:
        """Latents of a token, ``G``."""
        return self.keys.down.shape[0]


@dataclass(frozen=True)
class SideBasis:
    """All directions of the keys or values of one layer: ``x = mean + ((x - mean) @ down) @ up``.

    Attributes:
        down: float32 ``[G, W, W]``, ``W = g * D``, the most important direction first.
        up: float32 ``[G, W, W]``, its inverse.
        energy: float32 ``[G, W]``, the error that dropping a direction causes, as a share of what dropping all of the
            layer's would.
        mean: float32 ``[G, W]``, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    energy: torch.Tensor
    mean: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Number of directions, ``W``."""
        return self.down.shape[2]

    def cut(self, rank: int) -> SideProjection:
        """The first ``rank`` directions."""
        return SideProjection(self.down[:, :, :rank].contiguous(), self.up[:, :rank].contiguous(), self.mean)


@dataclass(frozen=True)
class LayerBasis:
    """The bases of one layer.

    Attributes:
        keys: of the keys.
        values: of the values.
        heads: KV heads.
        before_rope: whether the keys' basis is one of keys before their rotary embedding.
        score: mean squared error of the scores, scaled as softmax sees them, per unit of the keys' energy. Where the
            energies are errors of scores it is the mean squared score; elsewhere it is measured at half of the width.
    """

    keys: SideBasis
    values: SideBasis
    heads: int
    before_rope: bool = False
    score: float = 1.0


@dataclass(frozen=True)
class Projection:
    """What a calibration has found: the bases of a model's layers, to be cut to any rank.

    Attributes:
        bases: by index of the layer; only layers that cache keys and values.
        method: by which they were solved for.
        options: of the method.
        fingerprint: of the model's config.
        weights: some numbers of the model's weights by layer, which are compared when the cache is first used; without
            the layers where they were not at hand.
        texts: names of what the model read.
        tokens: how many counted.
    """

    bases: dict[int, LayerBasis] = field(repr=False)
    method: str
    options: dict[str, Any]
    fingerprint: dict[str, Any] = field(repr=False)
    weights: Mapping[int, Sequence[float]] = field(default_factory=dict, repr=False)
    texts: Sequence[str] = ()
    tokens: int = 0

    def layers(
        self, rank: int | None = None, ratio: float | None = None, spread: Spread = "energy"
    ) -> dict[int, LayerProjection]:
        """The bases cut to ranks that are multiples of 8, as many bits are packed.

        Args:
            rank: width of a latent per KV head, on average over layers, keys and values.
            ratio: the same as a share of the full width, above 0 and up to 1.
            spread: ``"energy"`` gives layers and sides the ranks that lose least, ``"uniform"`` all the same.

        Raises:
            ValueError: unless there is either a rank or a ratio, within its range.
        """
        from hf_kvcache.lowrank.methods import resolve  # solves for bases, and so imports this file

        method = resolve(self.method, **self.options)
        ranks = choose_ranks(self.bases, rank, ratio, spread)
        return {
            index: LayerProjection(
                method.finish(basis.keys.cut(ranks[index].keys)),
                method.finish(basis.values.cut(ranks[index].values)),
                basis.heads,
                basis.before_rope,
                self.weights.get(index),
            )
            for index, basis in self.bases.items()
        }

    def for_config(
        self, config: Any, rank: int | None = None, ratio: float | None = None, spread: Spread = "energy"
    ) -> dict[int, LayerProjection]:
        """:meth:`layers` after :meth:`check`."""
        self.check(config)
        return self.layers(rank, ratio, spread)

    def check(self, config: Any) -> None:
        """Raise a ValueError unless a model with this config is of the kind that was calibrated."""
        check_model("projection", self.fingerprint, identity(config))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {}
        for index, basis in self.bases.items():
            for side in _SIDES:
                for name in ("down", "up", "energy", "mean"):
                    part = getattr(getattr(basis, side), name)
                    if part is not None:
                        tensors[f"{index}.{side}.{name}"] = part.clone(memory_format=torch.contiguous_format)
        about = {name: getattr(self, name) for name in ("method", "options", "fingerprint", "weights", "tokens")}
        about["texts"] = list(self.texts)
        about["layers"] = {index: [basis.heads, basis.before_rope, basis.score] for index, basis in self.bases.items()}
        save_file(tensors, path, {"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Projection:
        """Read what :meth:`save` has written.

        Raises:
            ValueError: if the file is missing, is none of these, or lacks a part.
        """
        accepted = "bases; accepted: what Projection.save() and `hf-kvcache calibrate` write"
        tensors, known = load_file(path, "projection", _FORMAT, accepted)
        try:
            about = json.loads(known["about"])
            bases = {
                int(index): LayerBasis(_side(tensors, f"{index}.keys"), _side(tensors, f"{index}.values"), *others)
                for index, others in about.pop("layers").items()
            }
            # Files of before have a hash here, which other dtypes of the same weights do not have.
            weights = about.pop("weights") or {}
            sketch = {} if isinstance(weights, str) else {int(index): part for index, part in weights.items()}
            return cls(bases, weights=sketch, **about)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"projection={str(path)!r} is damaged: {error}") from error


def _side(tensors: dict[str, torch.Tensor], prefix: str) -> SideBasis:
    down, up, energy = (tensors[f"{prefix}.{name}"] for name in ("down", "up", "energy"))
    return SideBasis(down, up, energy, tensors.get(f"{prefix}.mean"))
