"""Gate: how much each KV head will need a token, told by its hidden state (arXiv:2601.07891)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.gates import Gate
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import one_of, whole


@register("gate")
class GatePolicy(Policy):
    """What a gate, fitted to KVzip+'s scores beforehand, gives each token when it comes (also arXiv:2601.17668).

    The context is read once. A prompt and a decoded token cost a small matrix product in each layer. Heads compete
    within their layer. Layers get the shares of the budget that the gate's calibration text called for: those in which
    heads needed many tokens keep more.

    Args:
        gate: what ``hf-kvcache calibrate --method gate`` has fitted, or the file it is in, or a published KVzap model.
        window: newest tokens that stay, though no more than half of what a head keeps.
        spread: how the budget is spread over layers: ``"calibrated"``, or ``"uniform"`` for equal parts. A published
            KVzap model does not say what layers need: there both are the same.

    Raises:
        ValueError: if ``window`` is negative, ``spread`` is neither, or a file holds no gate; when a cache is built
            without a gate, or for another model than the gate's.
    """

    needs_states = False
    needs_values = False
    needs_hidden = True
    head_floor = 0.0

    def __init__(self, gate: Gate | str | Path | None = None, window: int = 32, spread: str = "calibrated") -> None:
        if isinstance(gate, str | Path):
            gate = Gate.load(gate)
        elif not isinstance(gate, Gate | None):
            raise ValueError(f"gate={gate!r}; accepted: a Gate, the path of a file")
        self.gate = gate
        self.window, self.spread = whole("window", window, 0), one_of("spread", spread, ("calibrated", "uniform"))

    def check_config(self, config: Any) -> None:
        if self.gate is None:
            raise ValueError("gate=None; accepted: a file of hf-kvcache calibrate --method gate, or a Gate")
        self.gate.check_config(config)

    def check_module(self, module: torch.nn.Module, layer: int) -> None:
        assert self.gate is not None
        self.gate.check_module(module, layer)

    def gate_scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        assert self.gate is not None
        return self.gate.layer(layer, hidden.device)(hidden)

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.gated is not None
        return ctx.gated

    def recent(self, quota: int) -> int:
        return min(self.window, quota // 2)

    def layer_quota(self, quota: int, evicting_index: int, num_evicting: int, least: int, most: int) -> int:
        if self.gate is None or self.spread == "uniform" or len(self.gate.layers) != num_evicting:
            return quota
        return self.gate.quotas(quota, least, most)[evicting_index]
