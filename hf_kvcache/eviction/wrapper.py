"""Policies that change a part of another policy, such as how its scores are compared, and leave the rest."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context


class Wrapper(Policy):
    """Does everything as another policy does; a subclass overrides what it changes.

    Args:
        policy: the other policy.

    Raises:
        TypeError: if ``policy`` is not a :class:`Policy`.
    """

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, got {type(policy).__name__}; names are for resolve()")
        self.policy = policy

    @property
    def observed(self) -> int:  # type: ignore[override]
        return self.policy.observed

    @property
    def needs_states(self) -> bool:  # type: ignore[override]
        return self.policy.needs_states

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        return self.policy.needs_values

    @property
    def moves_sinks(self) -> bool:  # type: ignore[override]
        return self.policy.moves_sinks

    @property
    def across_layers(self) -> bool:  # type: ignore[override]
        return self.policy.across_layers

    @property
    def needs_accumulated(self) -> bool:  # type: ignore[override]
        return self.policy.needs_accumulated

    @property
    def needs_replay(self) -> bool:  # type: ignore[override]
        return self.policy.needs_replay

    @property
    def replay_by_head(self) -> bool:  # type: ignore[override]
        return self.policy.replay_by_head

    @property
    def replay_squares(self) -> bool:  # type: ignore[override]
        return self.policy.replay_squares

    @property
    def keeps_above(self) -> float | None:  # type: ignore[override]
        return self.policy.keeps_above

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        return self.policy.needs_rope

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return self.policy.needs_output

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return self.policy.needs_hidden

    @property
    def head_floor(self) -> float | None:  # type: ignore[override]
        return self.policy.head_floor

    def score(self, ctx: Context) -> torch.Tensor:
        return self.policy.score(ctx)

    def gate_scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.policy.gate_scores(layer, hidden)

    def check_config(self, config: Any) -> None:
        self.policy.check_config(config)

    def check_module(self, module: torch.nn.Module, layer: int) -> None:
        self.policy.check_module(module, layer)

    def recent(self, quota: int) -> int:
        return self.policy.recent(quota)

    def layer_quota(self, quota: int, evicting_index: int, num_evicting: int, least: int, most: int) -> int:
        return self.policy.layer_quota(quota, evicting_index, num_evicting, least, most)
