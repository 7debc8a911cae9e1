"""What a method is: a ``solve`` from moments to a basis, and what it takes to make a cut basis ready."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hf_kvcache.lowrank.bases import beside
from hf_kvcache.lowrank.moments import LayerMoments, States, divisor
from hf_kvcache.lowrank.projection import LayerBasis, SideBasis, SideProjection

#: Heads of a group where none is given (Palu's, arXiv:2407.21118).
GROUP = 4
_CENTERS = ("none", "keys", "values", "both")


class Method(ABC):
    """Solves for the bases of a layer. Subclasses take those of the options below that they have.

    Args:
        group: neighbouring KV heads that share a latent; None for the most up to 4 that divide them.
        before_rope: whether keys are stored as they are before their rotary embedding.
        center: whose mean is taken out first: ``"none"``, ``"keys"``, ``"values"`` or ``"both"``. It costs nothing:
            softmax does not see what all keys have in common, and probabilities add up to 1.

    Raises:
        ValueError: for an option out of range.
    """

    #: Registered name.
    name: ClassVar[str]

    def __init__(self, group: int | None = 1, before_rope: bool = False, center: str = "none") -> None:
        if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
            raise ValueError(f"group={group!r}; accepted: whole numbers from 1 that divide the KV heads")
        if not isinstance(before_rope, bool):
            raise ValueError(f"before_rope={before_rope!r}; accepted: True, False")
        if center not in _CENTERS:
            raise ValueError(f"center={center!r}; accepted: {', '.join(_CENTERS)}")
        self.group, self.before_rope, self.center = group, before_rope, center

    @abstractmethod
    def solve(self, moments: LayerMoments) -> LayerBasis:
        """The bases of one layer.

        Raises:
            ValueError: if the layer has no such moments, or the group does not divide its KV heads.
        """

    def finish(self, side: SideProjection) -> SideProjection:
        """What a basis becomes once it has been cut to its rank."""
        return side

    def options(self) -> dict[str, Any]:
        """With which this method was made."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def beside(self, heads: int) -> int:
        """How many of ``heads`` KV heads share a latent.

        Raises:
            ValueError: if the group does not divide them.
        """
        if self.group is None:
            return divisor(heads, GROUP)
        if heads % self.group:
            accepted = [g for g in range(1, heads + 1) if heads % g == 0]
            raise ValueError(f"group={self.group!r} does not divide {heads} KV heads; accepted: {accepted}")
        return self.group

    @property
    def most(self) -> int:
        """The most heads that share a latent in any layer."""
        return self.group or GROUP

    def keys_of(self, moments: LayerMoments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of the keys that are stored, and their mean if it is taken out."""
        states = moments.keys_before if self.before_rope else moments.keys
        if states is None:
            raise ValueError("before_rope=True: the layer's rotary embedding cannot be undone; accepted: False")
        return self._grouped(states, moments.heads, "keys")

    def values_of(self, moments: LayerMoments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same of the values."""
        return self._grouped(moments.values, moments.heads, "values")

    def queries_of(self, moments: LayerMoments) -> torch.Tensor:
        """Second moments ``[Hkv, Dk, Dk]`` of the queries, as the keys that are stored see them."""
        queries = moments.queries_before if self.before_rope else moments.queries
        assert queries is not None  # keys_of would have raised
        return queries

    def basis(self, moments: LayerMoments, keys: SideBasis, values: SideBasis) -> LayerBasis:
        """The two sides put together, with what an error of the keys means for the scores."""
        second, _ = self.keys_of(moments)
        half = keys.width // 2
        lost = torch.eye(keys.width, dtype=second.dtype) - keys.down[:, :, :half].double() @ keys.up[:, :half].double()
        metric = beside(self.queries_of(moments), self.beside(moments.heads))
        error = float(((lost.mT @ second @ lost) * metric).sum()) * moments.scaling**2 / moments.query_heads
        left = float(keys.energy[:, half:].double().sum())
        return LayerBasis(keys, values, moments.heads, self.before_rope, score=error / left if left > 0 else 0.0)

    def centered(self, side: str) -> bool:
        """Whether the mean of ``"keys"`` or ``"values"`` is taken out."""
        return self.center in (side, "both")

    def _grouped(self, states: States, heads: int, side: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return states.grouped(self.beside(heads), heads, self.centered(side))
