"""Saving what the next choice of a layer depends on, and restoring it."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.evictor import Evictor

_SEEN, _SINKS = "seen.", "sinks."


def evictor_state(evictor: Evictor) -> dict[str, torch.Tensor]:
    """What the next choice depends on, as tensors by name.

    Raises:
        ValueError: while a prompt waits to be evicted, since the queries that this will look at are not saved.
    """
    schedule, pinned = evictor.schedule, evictor.pinned
    if schedule.pending:
        raise ValueError("a prompt waits to be evicted; call compress() before the cache is saved")
    state = {f"{_SEEN}{name}": tensor.clone() for name, tensor in evictor.observations.state().items()}
    state |= pinned.state()
    state["counters"] = torch.tensor([schedule.evictions, schedule.evicted_at, pinned.padded], device="cpu")
    return state | {f"{_SINKS}{name}": tensor.clone() for name, tensor in evictor.sinks.state().items()}


def restore_evictor(evictor: Evictor, state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Let an evictor of an empty layer take over what :func:`evictor_state` returned.

    Raises:
        ValueError: if the tensors do not go together.
    """
    schedule, pinned = evictor.schedule, evictor.pinned
    batch = len(pinned.counts)
    state = {name: x if x.is_floating_point() else x.cpu() for name, x in state.items()}
    for name, tensor in state.items():
        if name.startswith(_SEEN) and tensor.shape[0] != batch:
            raise ValueError(f"'evictor.{name}' is of {tensor.shape[0]} sequences; accepted: {batch}")
    pinned.restore(state)
    evictor.observations.restore(_part(state, _SEEN), device)
    evictor.sinks.restore(_part(state, _SINKS), device)
    schedule.evictions, schedule.evicted_at, padded = state["counters"].tolist()
    pinned.padded = bool(padded)


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
