"""How the layers of a cache evict, and what attention has shown of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from weakref import ref

import torch

from hf_kvcache.eviction import Policy
from hf_kvcache.eviction.budget import Budget, Pins
from hf_kvcache.integration.rope import LayerRope, rope_of
from hf_kvcache.kernels.inputs import Scoring

#: For ``compensate``: kept tokens get a bias and new values (attention matching).
MATCH: Literal["match"] = "match"
#: Latest queries that tokens are fitted to where nothing else says how many.
_MATCHED_QUERIES = 64


@dataclass(frozen=True)
class EvictionOptions:
    """How the layers of a cache evict.

    Attributes:
        policy: scores the tokens.
        budget: how many stay.
        pins: tokens that stay because the user says so.
        evict_prefill: when a prompt is evicted: after every forward pass of several tokens (``"chunk"``), before the
            first single token (``"end"``), or not by itself (None).
        interval: tokens decoded between two evictions; None: decoding evicts nothing.
        seed: for policies that draw random numbers.
        compensate: latest queries whose attention the kept tokens are made to reproduce, by new values; 0 for none.
            ``"match"``: by a bias of the keys too, for the queries of a second reading or the latest ones.
    """

    policy: Policy
    budget: Budget
    pins: Pins
    evict_prefill: Literal["chunk", "end"] | None
    interval: int | None
    seed: int
    compensate: int | Literal["match"] = 0

    @property
    def matches(self) -> bool:
        """Whether kept tokens get a bias beside new values."""
        return self.compensate == MATCH

    @property
    def compensated_queries(self) -> int:
        """How many of the latest queries kept tokens are fitted to; 0 for none."""
        if isinstance(self.compensate, str):
            return 0 if self.policy.needs_replay else _MATCHED_QUERIES
        return self.compensate

    def describe(self) -> str:
        """All options that the choices depend on, as text; without the pins."""
        when = f"evict_prefill={self.evict_prefill!r}, interval={self.interval!r}, seed={self.seed}"
        when += f", compensate={self.compensate!r}" if self.compensate else ""
        return f"{self.policy!r}, budget={self.budget.amount!r}, {when}"


@dataclass(frozen=True)
class LayerPlace:
    """Which layer of the model one is, and which of the layers that evict.

    Attributes:
        layer_index: its index in the model.
        num_layers: how many layers the model has.
        evicting_index: its number among the layers that evict, from 0.
        num_evicting: how many layers evict.
    """

    layer_index: int
    num_layers: int
    evicting_index: int
    num_evicting: int


class Attending:
    """The scoring and the attention module that the latest update was attended with.

    Args:
        scoring: how queries are scored against keys.
        module: the attention module; None if it is not known. A cache must not keep a model alive: it is held weakly.
        rope: the rotary embedding of a module that is not known; None if that is not known either.
    """

    def __init__(self, scoring: Scoring, module: torch.nn.Module | None, rope: LayerRope | None = None) -> None:
        self.scoring = scoring
        self._module = None if module is None else ref(module)
        self._rope = rope

    @property
    def module(self) -> torch.nn.Module | None:
        """The attention module; None if it is not known, or gone."""
        return None if self._module is None else self._module()

    def rope(self) -> LayerRope | None:
        """The layer's rotary embedding; None if it is not known. Raises ValueError where it cannot be found out."""
        module = self.module
        return self._rope if module is None else rope_of(module)

    def without_module(self, rope: bool) -> Attending:
        """The same for another process, where the module is not known; with its ``rope``, if that can be found out."""
        try:
            return Attending(self.scoring, None, self.rope() if rope else None)
        except ValueError:  # which whoever needs the rotary embedding will be told
            return Attending(self.scoring, None)
