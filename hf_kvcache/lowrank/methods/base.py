"""The base class of methods: a method solves for a basis from moments."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.lowrank.basis_solvers import block_diagonal
from hf_kvcache.lowrank.moments import LayerMoments, States, largest_divisor
from hf_kvcache.utils.validation import flag, one_of

#: Heads of a group where no number is given (Palu's, arXiv:2407.21118).
DEFAULT_GROUP = 4
#: Sides whose mean can be subtracted.
CENTERS = ("none", "keys", "values", "both")


class Method(ABC):
    """Solves for the bases of a layer. The constructor of a subclass has those of the options below that it uses.

    Args:
        group: number of neighbouring KV heads that share coefficients; None for the largest number up to 4 that
            divides the KV heads.
        before_rope: whether keys are stored as they are before their rotary embedding.
        center: whose mean is subtracted first: ``"none"``, ``"keys"``, ``"values"`` or ``"both"``. It costs nothing:
            softmax does not see what all keys have in common, and probabilities add up to 1.

    Raises:
        ValueError: for an option out of range.
    """

    #: Registered name.
    name: ClassVar[str]

    def __init__(self, group: int | None = 1, before_rope: bool = False, center: str = "none") -> None:
        if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
            raise ValueError(f"group={group!r}; accepted: whole numbers from 1 that divide the KV heads")
        self.group = group
        self.before_rope = flag("before_rope", before_rope)
        self.center = one_of("center", center, CENTERS)

    @abstractmethod
    def solve(self, moments: LayerMoments) -> LayerBasis:
        """The bases of one layer.

        Raises:
            ValueError: if moments that the method needs were not measured, or the group does not divide the layer's KV
                heads.
        """

    def options(self) -> dict[str, Any]:
        """The options that this method was made with."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def group_size(self, heads: int) -> int:
        """How many of ``heads`` KV heads share coefficients.

        Raises:
            ValueError: if the group does not divide them.
        """
        if self.group is None:
            return largest_divisor(heads, DEFAULT_GROUP)
        if heads % self.group:
            accepted = [g for g in range(1, heads + 1) if heads % g == 0]
            raise ValueError(f"group={self.group!r} does not divide {heads} KV heads; accepted: {accepted}")
        return self.group

    @property
    def largest_group(self) -> int:
        """The largest number of heads that share coefficients in any layer."""
        return self.group or DEFAULT_GROUP

    def keys_of(self, moments: LayerMoments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of the keys that are stored, and their mean if it is subtracted."""
        states = moments.keys_before if self.before_rope else moments.keys
        if states is None:
            raise ValueError("before_rope=True: the layer's rotary embedding cannot be undone; accepted: False")
        return self._grouped(states, moments.heads, "keys")

    def values_of(self, moments: LayerMoments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of the values, and their mean if it is subtracted."""
        return self._grouped(moments.values, moments.heads, "values")

    def queries_of(self, moments: LayerMoments) -> torch.Tensor:
        """Second moments ``[Hkv, Dk, Dk]`` of the queries, in the basis of the keys that are stored."""
        queries = moments.queries_before if self.before_rope else moments.queries
        assert queries is not None  # keys_of would have raised
        return queries

    def layer_basis(self, moments: LayerMoments, keys: SideBasis, values: SideBasis) -> LayerBasis:
        """The bases of keys and values together, with what an error of the keys means for the scores."""
        second, _ = self.keys_of(moments)
        half = keys.width // 2
        lost = (
            torch.eye(keys.width, dtype=second.dtype, device="cpu")
            - keys.down[:, :, :half].double() @ keys.up[:, :half].double()
        )
        metric = block_diagonal(self.queries_of(moments), self.group_size(moments.heads))
        error = float(((lost.mT @ second @ lost) * metric).sum()) * moments.scaling**2 / moments.query_heads
        left = float(keys.energy[:, half:].double().sum())
        return LayerBasis(keys, values, moments.heads, self.before_rope, score=error / left if left > 0 else 0.0)

    def centered(self, side: str) -> bool:
        """Whether the mean of ``"keys"`` or ``"values"`` is subtracted."""
        return self.center in (side, "both")

    def _grouped(self, states: States, heads: int, side: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return states.grouped(self.group_size(heads), heads, self.centered(side))
