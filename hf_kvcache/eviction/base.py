"""What a policy is: a score for each token that a layer holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hf_kvcache.eviction.context import Context

#: For ``Policy.observed``: every query of the latest update, however many.
ALL_QUERIES = -1


class Policy(ABC):
    """Says how much each token matters; budgets, protected tokens and the choice itself are not its business.

    A policy keeps no state between calls and draws random numbers only from ``ctx.generator()``, so the same inputs
    keep the same tokens. Subclasses take their options as keyword arguments and keep them as attributes of the same
    name, which is what ``repr`` shows.
    """

    #: Registered name.
    name: ClassVar[str]
    #: Latest queries that :meth:`score` looks at: 0 for none, ``ALL_QUERIES`` for every one of the latest update.
    observed: int = 0
    #: Whether it looks at keys and values; they are not decoded for a policy that does not.
    needs_states: bool = True
    #: Whether it looks at values beside the keys.
    needs_values: bool = True
    #: Whether it wants the attention that each key has received from all queries so far (``ctx.accumulated``).
    needs_accumulated: bool = False
    #: Whether it scores by reading the context once more (``ctx.replayed``); then nothing is evicted before
    #: ``cache.compress(model, input_ids)``.
    needs_replay: bool = False
    #: Of policies that replay: whether ``ctx.replayed`` is of each query head, ``[B, Hkv, g, T]``, and each probability
    #: is divided by the length of the query's hidden state.
    replay_by_head: bool = False
    #: Of policies that replay: whether ``ctx.replayed`` is the root mean square over all queries of the group, of the
    #: probabilities over the context alone; else it is the largest probability, over all that a query sees.
    replay_squares: bool = False
    #: Whether it works before rotary positions (``ctx.rope``).
    needs_rope: bool = False
    #: Whether it looks at the output projection (``ctx.output_weight``).
    needs_output: bool = False
    #: Whether it scores tokens as they come, by the hidden states that the attention module is given: what
    #: :meth:`gate_scores` returns is kept beside each token (``ctx.gated``).
    needs_hidden: bool = False
    #: Whether the sinks' keys are moved along with the window behind them, so that no gap is between them.
    moves_sinks: bool = False
    #: None: each head of a layer keeps equally many. A share: heads compete for the layer's budget, each keeps at
    #: least this share of an equal part (Ada-KV, arXiv:2407.11550).
    head_floor: float | None = None
    #: Whether heads compete over all layers and not only within theirs, where all layers choose at once: at
    #: ``cache.compress()`` and at the end of a prompt. A layer that chooses alone goes by ``head_floor``.
    across_layers: bool = False
    #: None: as many tokens stay as the budget has room for. A number: of them, those that score no more go too.
    keeps_above: float | None = None

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{self.name}({options})"

    @property
    def waits(self) -> bool:
        """Whether nothing is evicted before ``cache.compress()``, unless the cache is told otherwise."""
        return self.needs_replay or self.across_layers

    @abstractmethod
    def score(self, ctx: Context) -> torch.Tensor:
        """How much each token matters, float ``[B, Hkv, T]``, higher is kept first.

        What is returned for protected tokens and for places without a token is not looked at. Ties go to the newer one.
        """

    def gate_scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of new tokens, float32 ``[B, Hkv, T]``, for policies with ``needs_hidden``.

        Args:
            layer: index of the layer in the model.
            hidden: ``[B, T, hidden]``, what the attention module of the layer is given.
        """
        raise NotImplementedError(f"policy {self.name!r} does not score hidden states")

    def check_config(self, config: Any) -> None:
        """Raise ValueError if the policy does not fit a model with this ``config``, which has just got a cache."""
        return None

    def check_module(self, module: torch.nn.Module, layer: int) -> None:
        """Raise ValueError if the policy does not fit the attention module of ``layer``; for ``needs_hidden``."""
        return None

    def recent(self, quota: int) -> int:
        """Newest tokens that stay whatever their scores, when a head keeps ``quota`` tokens."""
        return 0

    def layer_quota(self, quota: int, evicting_index: int, num_evicting: int, least: int, most: int) -> int:
        """Tokens that a head of one layer keeps, when heads keep ``quota`` on average over the layers that evict.

        Args:
            quota: the mean.
            evicting_index: the layer's number among those that evict, from 0.
            num_evicting: how many layers evict.
            least: tokens that every layer keeps in any case.
            most: tokens that a layer can hold at all.
        """
        return quota
