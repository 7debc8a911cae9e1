"""A layer of latents that evicts tokens to stay within a budget."""

from __future__ import annotations

import torch

from hf_kvcache.eviction import Policy
from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.eviction.layer_selection import LayerSelection
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.layers.mla import LatentLayer, in_latent_space
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.token_view import TokenView


class LatentSelection(LayerSelection):
    """Shows latents to a policy as the one KV head that all query heads read in latent space.

    The keys of that head are the latents with the rotary keys appended. Its values are the latents.
    """

    def states(self, held: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
        if not (self.policy.needs_states or self.policy.needs_values):
            return super().states(held)
        latents, rotary = held.states("keys"), held.states("values")
        return self.attended_keys(latents, rotary), latents

    def attended_keys(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([keys, values], -1)


class EvictingLatentLayer(LatentLayer, EvictingLayer):
    """The cache of one latent-attention layer that evicts tokens to stay within a budget."""

    def make_evictor(self, storage: PagedStorage) -> Evictor:
        return Evictor(self.eviction, self.place, storage, LatentSelection)

    def queries_for_policy(self, query: torch.Tensor) -> torch.Tensor:
        assert self.evictor is not None
        if not self.evictor.stateful:
            return query  # the policy does not look at queries
        up = None if self.expansion is None else self.expansion.up_projections()
        if up is None:
            raise RuntimeError(
                f"layer {self.index}: policy {self.evictor.policy.name!r} looks at queries, and only a plain "
                "kv_b_proj can take queries into latent space; accepted here: 'streaming', 'random', 'keepall'"
            )
        return in_latent_space(query, up)


def check_policy(policy: Policy, compensate: int | str) -> None:
    """Raise ValueError if an eviction method does not work on latents.

    Policies cannot be used that undo rotary positions, read the output projection, read the context again, let layers
    compete or move sinks. New values for kept tokens (``compensate``) cannot be used either.
    """
    for name in ("needs_rope", "needs_output", "needs_replay", "needs_hidden", "across_layers", "moves_sinks"):
        if getattr(policy, name):
            raise ValueError(
                f"policy={policy!r} does not go with latents ({name.replace('_', ' ')}); accepted: policies that look "
                "at attention, keys or values only, such as 'snapkv', 'h2o', 'tova', 'streaming', 'random'"
            )
    if compensate:
        raise ValueError(
            f"compensate={compensate!r} does not go with latents: a latent is key and value in one; accepted: 0"
        )
