"""Layers whose policy scores tokens as they come, by the hidden states that the attention module is given."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.eviction.options import EvictionOptions, LayerPlace
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.storage import PagedStorage
from hf_kvcache.utils.autocast import without_autocast


class GateScores(KVCacheLayer):
    """A layer with an :class:`Evictor` that keeps, beside each token, what the policy gave it when it came.

    Other policies want nothing of hidden states, and nothing is kept then.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share.
        eviction: the settings of eviction: policy, budget and schedule.
        place: the number of the layer in the model, and its number among the layers that evict.
    """

    def __init__(self, index: int, options: LayerOptions, eviction: EvictionOptions, place: LayerPlace) -> None:
        super().__init__(index, options)
        self.eviction, self.place = eviction, place
        self._module_checked = False

    def clear(self) -> None:
        super().clear()
        self.evictor: Evictor | None = None
        self._hidden: torch.Tensor | None = None

    def see_hidden(self, module: torch.nn.Module, hidden: Any) -> None:
        """Take note of the hidden states ``[B, T, hidden]`` of the tokens that come next, for a policy that needs them.

        Raises:
            ValueError: if the policy was fitted to another model than that of the attention ``module``.
        """
        policy = self.eviction.policy
        if not policy.needs_hidden:
            return
        if not self._module_checked:
            policy.check_module(module, self.index)
            self._module_checked = True
        self._hidden = hidden if isinstance(hidden, torch.Tensor) else None

    def scores_of_new(self, key_states: torch.Tensor) -> torch.Tensor:
        """What a policy that needs hidden states gives the tokens of ``key_states [B, Hkv, T, Dk]``, ``[B, Hkv, T]``.

        Raises:
            RuntimeError: if the hidden states of these tokens were not seen.
            ValueError: if the scores are those of another number of heads.
        """
        hidden, self._hidden = self._hidden, None
        batch, heads, tokens, _ = key_states.shape
        if hidden is None or hidden.dim() != 3 or hidden.shape[:2] != (batch, tokens):
            seen = "none" if hidden is None else f"some of shape {list(hidden.shape)}"
            raise RuntimeError(
                f"layer {self.index}: policy {self.eviction.policy.name!r} needs the hidden states of the {tokens} new "
                f"tokens, and got {seen}. The model has to be called as a whole, with the config that the cache was "
                "built from, and without torch.compile"
            )
        with torch.no_grad(), without_autocast(key_states.device):
            scores = self.eviction.policy.gate_scores(self.index, hidden.detach().to(key_states.device))
        if scores.shape != (batch, heads, tokens):
            raise ValueError(
                f"layer {self.index}: policy {self.eviction.policy.name!r} gave scores of shape {list(scores.shape)}; "
                f"accepted: {[batch, heads, tokens]}, those of the KV heads that this process has"
            )
        return scores

    def _held(self) -> tuple[PagedStorage, Evictor]:
        assert self.storage is not None and self.evictor is not None
        return self.storage, self.evictor

    def _keep_scores(self, new: NewTokens) -> None:
        """Keep what the policy gave new tokens as they came."""
        if new.scores is not None:
            storage, evictor = self._held()
            evictor.observations.add_scores(storage, new.scores, new.stored, new.valid)
