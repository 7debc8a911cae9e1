"""The bases in which the layers of a model store keys and values, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_kvcache.integration.model_identity import check_identity
from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.lowrank.ranks import Spread, choose_ranks
from hf_kvcache.utils.safetensors import load_file

_FORMAT = "hf_kvcache projection 1"
_SIDES = ("keys", "values")


@dataclass(frozen=True)
class SideProjection:
    """Keys or values of one layer as low-rank coefficients.

    ``coefficients = (x - mean) @ down``, and ``x ~ mean + coefficients @ up``. The vectors of ``g`` neighbouring KV
    heads, side by side, are one ``x``. With ``g = 1`` each head has coefficients of its own.

    Attributes:
        down: float32 ``[G, g * D, r]``, ``G = Hkv / g``.
        up: float32 ``[G, r, g * D]``.
        mean: float32 ``[G, g * D]``, what is subtracted first; None for nothing.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of coefficients, ``r``."""
        return self.down.shape[2]

    @classmethod
    def of(cls, basis: SideBasis, rank: int) -> SideProjection:
        """``basis`` cut to ``rank``; see :meth:`~hf_kvcache.lowrank.basis.SideBasis.cut`."""
        return cls(*basis.cut(rank), basis.mean)


@dataclass(frozen=True)
class LayerProjection:
    """How one layer's keys and values are stored.

    Attributes:
        keys: projection of the keys.
        values: projection of the values.
        heads: number of KV heads, ``Hkv``. Keys and values have the same number of heads per group.
        before_rope: whether the basis is one of keys before their rotary embedding.
        weights: samples of the layer's weights, by which the model is recognized; None where there are none.
    """

    keys: SideProjection
    values: SideProjection
    heads: int
    before_rope: bool = False
    weights: Sequence[float] | None = field(default=None, repr=False)

    @property
    def groups(self) -> int:
        """Number of groups of heads, ``G``, each of which has coefficients of its own."""
        return self.keys.down.shape[0]


@dataclass(frozen=True)
class Projection:
    """The result of a calibration: the bases of a model's layers, which can be cut to any rank.

    Attributes:
        bases: by index of the layer; only layers that cache keys and values.
        method: name of the method that solved for them.
        options: of the method.
        fingerprint: what the model's config says of the model.
        weights: samples of the model's weights by layer, which are compared when the cache is first used. Layers whose
            weights were not loaded are left out.
        texts: names of the texts that the model read.
        tokens: number of tokens that were counted.
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
        """The bases cut to ranks that are multiples of 8, since codes are packed in whole bytes.

        Args:
            rank: coefficients per KV head, on average over layers, keys and values.
            ratio: the same as a share of the full width, above 0 and up to 1.
            spread: ``"energy"`` gives layers and sides the ranks that lose least, ``"uniform"`` the same to all.

        Raises:
            ValueError: unless there is either a rank or a ratio, within its range.
        """
        ranks = choose_ranks(self.bases, rank, ratio, spread)
        return {
            index: LayerProjection(
                SideProjection.of(basis.keys, ranks[index].keys),
                SideProjection.of(basis.values, ranks[index].values),
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
        check_identity("projection", self.fingerprint, config)

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
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: if the file is missing, is of another kind, or lacks a part.
        """
        accepted = "bases; accepted: what Projection.save() and `hf-kvcache calibrate` write"
        tensors, known = load_file(path, "projection", _FORMAT, accepted)
        try:
            about = json.loads(known["about"])
            bases = {int(index): _layer(tensors, index, settings) for index, settings in about.pop("layers").items()}
            # Earlier files have a hash here. It would not match the same weights in another dtype, so it is dropped.
            weights = about.pop("weights") or {}
            samples = {} if isinstance(weights, str) else {int(index): part for index, part in weights.items()}
            return cls(bases, weights=samples, **about)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"projection={str(path)!r} is damaged: {error}") from error


def _layer(tensors: dict[str, torch.Tensor], index: str, settings: list[Any]) -> LayerBasis:
    """The basis of one layer from a file, with what the file says beside the tensors."""
    # Earlier files have a fourth setting, which was true for a method that there is no more.
    heads, before_rope, score, *mixed = settings
    if any(mixed):
        raise ValueError("its bases are mixed by a Hadamard matrix, which no method does any more; calibrate again")
    return LayerBasis(_side(tensors, f"{index}.keys"), _side(tensors, f"{index}.values"), heads, before_rope, score)


def _side(tensors: dict[str, torch.Tensor], prefix: str) -> SideBasis:
    down, up, energy = (tensors[f"{prefix}.{name}"] for name in ("down", "up", "energy"))
    return SideBasis(down, up, energy, tensors.get(f"{prefix}.mean"))
