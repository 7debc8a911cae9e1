"""The tokens of the latest update: their checks, and how attention reads them before they are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from hf_kvcache.kernels.inputs import DenseTokens
from hf_kvcache.kernels.padding import PaddingPlaces
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage


@dataclass
class NewTokens:
    """The tokens of the latest update, kept aside until attention has seen them.

    Attributes:
        keys: ``[B, Hkv, T, Dk]``.
        values: ``[B, Hkv, T, Dv]``.
        position: position of the first token.
        valid: bool ``[B, T]``, False for padding; None if no token is padding.
        stored: whether the tokens are in the storage already.
        earlier_padding: the positions of padding in earlier updates; None until a mask was read.
        with_gradient: keys and values as the model gave them, if they carry a gradient; else None.
        scores: float32 ``[B, Hkv, T]``, what an eviction policy gave the tokens as they came; None if it gives nothing.
        read: whether the keys and values were read as dense tensors.
    """

    keys: torch.Tensor
    values: torch.Tensor
    position: int
    valid: np.ndarray | None = None
    stored: bool = False
    earlier_padding: PaddingPlaces | None = None
    with_gradient: tuple[torch.Tensor, torch.Tensor] | None = None
    scores: torch.Tensor | None = None
    read: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.keys.shape[2]

    def copy(self) -> NewTokens:
        """The same tokens, for another layer to store. The tensors are shared."""
        return replace(self)

    def append_one_to(self, storage: PagedStorage) -> None:
        """Store the only token of each sequence, where it is no padding."""
        valid = None if self.valid is None else self.valid[:, 0]
        storage.append_one(self.keys, self.values, self.position, valid)

    def part(self, tokens: slice) -> NewTokens:
        """Some of the tokens, not stored yet."""
        valid, earlier = self.valid, self.earlier_padding
        if valid is not None and earlier is not None:
            earlier = earlier.extend(self.position, valid[:, : tokens.start])
        return NewTokens(
            self.keys[:, :, tokens],
            self.values[:, :, tokens],
            self.position + tokens.start,
            None if valid is None else valid[:, tokens],
            earlier_padding=earlier,
            scores=None if self.scores is None else self.scores[:, :, tokens],
        )


class HoldsDense(Protocol):
    """A storage whose ``dense`` has full-precision ``keys [B, Hkv, n, Dk]`` and ``values [B, Hkv, n, Dv]``."""

    @property
    def dense(self) -> Any: ...


def check_update(
    index: int, storage: HoldsDense | None, keys: torch.Tensor, values: torch.Tensor, finite: bool, least: int = 1
) -> None:
    """Raise ValueError unless new keys and values fit each other and the stored tokens of layer ``index``.

    Args:
        index: number of the layer in the model.
        storage: the stored tokens; None before the first update.
        keys: ``[B, Hkv, T, Dk]``.
        values: ``[B, Hkv, T, Dv]``.
        finite: whether NaN and infinity are errors.
        least: the smallest number of tokens that is accepted.
    """
    shapes = f"key_states {tuple(keys.shape)}, value_states {tuple(values.shape)}"
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] < least:
        raise ValueError(f"{shapes}: accepted: [batch, heads, tokens, dim], equal except in dim, at least one token")
    if keys.dtype != values.dtype or not keys.is_floating_point():
        raise ValueError(f"key_states {keys.dtype}, value_states {values.dtype}: accepted: one floating dtype")
    if storage is not None:
        check_fits(index, (storage.dense.keys, storage.dense.values), keys, values)
    if finite:
        check_finite(keys, values, f" of layer {index}")


def check_finite(keys: torch.Tensor, values: torch.Tensor, where: str = "") -> None:
    """Raise ValueError if new keys or values hold NaN or infinity; ``where`` says of which layer they are."""
    for name, states in (("key_states", keys), ("value_states", values)):
        if not bool(states.isfinite().all()):
            raise ValueError(f"{name}{where} holds NaN or infinity; accepted with validate=True: finite numbers")


def check_fits(index: int, held: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError unless new keys and values go with the stored ones ``held`` of layer ``index``."""
    for name, new, old in (("key_states", keys, held[0]), ("value_states", values, held[1])):
        if new.shape[:2] != old.shape[:2] or new.shape[3] != old.shape[3] or new.dtype != old.dtype:
            raise ValueError(
                f"{name} {list(new.shape)} {new.dtype} does not go with what layer {index} holds: "
                f"batch {old.shape[0]}, {old.shape[1]} heads, dim {old.shape[3]}, {old.dtype}. Call reset(), "
                "or use a cache of its own for each batch and model."
            )
        if new.device != old.device:
            raise ValueError(
                f"{name} is on {new.device}; accepted: {old.device}, where the tokens of layer {index} are"
            )


def dense_tokens(
    storage: PagedStorage, new: NewTokens, visibility: Visibility, ahead: int, queries: slice
) -> DenseTokens:
    """The full-precision tokens that some queries may see: the dense buffer, then the new tokens if they are not in it.

    Args:
        storage: the stored tokens.
        new: the tokens of the latest update.
        visibility: which tokens the queries may see.
        ahead: number of pages packed ahead that the queries read. Their tokens are hidden in the dense buffer.
        queries: the queries of the new tokens that attend.
    """
    buffer, held = storage.dense, storage.dense.longest
    keys, values = buffer.keys[:, :, :held], buffer.values[:, :, :held]
    # Of several queries, the first do not see the tokens of the last.
    plain = visibility.mask is None and visibility.window is None and visibility.length == 1
    if new.stored and plain and not ahead and buffer.uniform_length is not None:
        return DenseTokens(keys, values)
    positions, fresh = buffer.positions[:, :held], 0
    if not new.stored:
        fresh = queries.stop
        new_keys, new_values = new.keys[:, :, :fresh], new.values[:, :, :fresh]
        keys = torch.cat([keys, new_keys], 2) if held else new_keys
        values = torch.cat([values, new_values], 2) if held else new_values
        at = np.broadcast_to(np.arange(new.position, new.position + fresh), (storage.batch, fresh))
        # Kernels read the positions of a sequence side by side; numpy may have joined the arrays by columns.
        positions = np.ascontiguousarray(np.concatenate([positions, at], 1))
    ragged = buffer.uniform_length is None or (fresh and new.valid is not None)
    oldest = int(positions[:, 0].min()) if positions.shape[1] else 0  # there is no token if all are padding
    if not ragged and not ahead and not fresh and visibility.length == 1 and visibility.sees_all(oldest):
        return DenseTokens(keys, values, None, None)
    unused = None
    if ragged or ahead:
        slots = np.arange(held)
        hidden = slots >= buffer.lengths[:, None]
        first = storage.sink_length
        hidden |= (slots >= first) & (slots < first + ahead * storage.page_size)
        if fresh:
            padding = np.zeros((storage.batch, fresh), bool) if new.valid is None else ~new.valid[:, :fresh]
            hidden = np.ascontiguousarray(np.concatenate([hidden, padding], 1))
        unused = torch.from_numpy(hidden).to(storage.device)
    return DenseTokens(keys, values, torch.from_numpy(positions).to(storage.device), unused)
