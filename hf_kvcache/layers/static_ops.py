"""The operators that compiled code calls for a layer with a fixed maximum length (``torch.ops.hf_kvcache.*``).

An operator takes only tensors, plain numbers and strings. The state of a layer is given as tensors that the operator
changes. What is fixed is given as a string, by which the settings are found.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from hf_kvcache.kernels.attention import attend as attend_kernel
from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.static_state import NewToken
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.new_tokens import check_finite
from hf_kvcache.layers.static_masks import read_mask
from hf_kvcache.layers.static_storage import StaticStorage, storage_of
from hf_kvcache.layers.static_tensors import StaticSettings, StaticTensors
from hf_kvcache.storage.transfers import to_device

Tensor = torch.Tensor

_known: dict[str, StaticSettings] = {}
#: Defined here and not by ``torch.library.custom_op``, whose wrappers in Python take longer than a small kernel.
_LIBRARY = torch.library.Library("hf_kvcache", "FRAGMENT")
_STATE = (
    "Tensor(a!) records, Tensor(b!) key_basis, Tensor(c!) dense_keys, Tensor(d!) dense_values, "
    "Tensor(e!) page_positions, Tensor(f!) state"
)
_LIBRARY.define(
    f"static_attend(Tensor query, Tensor keys, Tensor values, Tensor? mask, {_STATE}, Tensor final, str settings, "
    "bool causal, float scaling, float? softcap, Tensor? sink_logits) -> Tensor"
)
_LIBRARY.define("tokens_seen(Tensor state) -> Tensor")


def settings_key(settings: StaticSettings) -> str:
    """The string that stands for ``settings`` in a graph, the same for equal settings."""
    key = settings.describe()
    _known.setdefault(key, settings)
    return key


def static_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    records: Tensor,
    key_basis: Tensor,
    dense_keys: Tensor,
    dense_values: Tensor,
    page_positions: Tensor,
    state: Tensor,
    final: Tensor,
    settings: str,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Store new tokens in the tensors of a layer, and compute their attention over all tokens that the layer holds.

    Pages that are full afterwards are packed. If there is an error, nothing is stored.

    Args:
        query: ``[B, Hq, T, Dk]``.
        keys: of the new tokens, ``[B, H, T, Dk]``.
        values: ``[B, H, T, Dv]``.
        mask: see :func:`hf_kvcache.layers.static_masks.read_mask`.
        records: see :class:`hf_kvcache.layers.static_tensors.StaticTensors`, like the five that follow.
        key_basis: as there.
        dense_keys: as there.
        dense_values: as there.
        page_positions: as there.
        state: as there.
        final: the state of the layer that a forward pass comes to last; it has seen as many tokens as this one.
        settings: what :func:`settings_key` returned.
        causal: whether later tokens are hidden where there is no mask.
        scaling: see :class:`hf_kvcache.kernels.inputs.Scoring`, like the two that follow.
        softcap: as there.
        sink_logits: as there.

    Returns:
        ``[B, T, Hq, Dv]``.

    Raises:
        RuntimeError: if the forward pass before was interrupted.
        ValueError: if there is no room for the tokens, the mask shows padding, of which nothing is held, or the keys or
            values hold NaN or infinity and this is to be checked.
    """
    tensors = StaticTensors(records, key_basis, dense_keys, dense_values, page_positions, state)
    storage = storage_of(tensors, _known[settings])
    if state.is_cpu:  # elsewhere this would wait for the device
        _check_complete(storage, int(final[0]))
        if storage.settings.validate:
            check_finite(keys, values)
    elif keys.shape[2] > 1:
        storage.numbers.read()
    return attend_and_store(storage, query, keys, values, mask, causal, Scoring(scaling, softcap, sink_logits))


def _check_complete(storage: StaticStorage, complete: int) -> None:
    """Raise RuntimeError if the forward pass before was interrupted, so that the last layer has fewer tokens."""
    if storage.seen != complete:
        raise RuntimeError(
            "a compiled forward pass with this cache ended in the middle, by an exception or Ctrl-C: its layers have "
            f"seen {storage.seen} and {complete} tokens. Call crop(0) to return to the last complete pass, or reset()"
        )


def _attend_fake(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, values.shape[3])


def tokens_seen(state: Tensor) -> Tensor:
    """The number of tokens that a layer has seen, a copy without dimensions.

    It is an operator because inductor may compute what depends on it again in a later layer. From ``state`` itself,
    which :func:`static_attend` changes, it would then read the length after this step.
    """
    return state[0].clone()


def _seen_fake(state: Tensor) -> Tensor:
    return state.new_empty(())


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("static_attend", static_attend, _device)
    _LIBRARY.impl("tokens_seen", tokens_seen, _device)
torch.library.register_fake("hf_kvcache::static_attend", _attend_fake, lib=_LIBRARY)
torch.library.register_fake("hf_kvcache::tokens_seen", _seen_fake, lib=_LIBRARY)


def attend_and_store(
    storage: StaticStorage,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    causal: bool,
    scoring: Scoring,
) -> Tensor:
    """What :func:`static_attend` does, for code that is not compiled; the storage's numbers are up to date."""
    length = keys.shape[2]
    if length == 1:
        output = _by_device(storage, NewToken(query, keys, values, mask, scoring))
        if output is not None:
            return output
    storage.check_room(length)
    valid, mask = read_mask(mask, storage, length)
    if length == 1 and valid is None and mask is None:
        output = storage.steps.attend(storage, query, keys, values, scoring)
        if output is not None:
            storage.finish_step()
            return output
    visibility = _visibility(storage, length, mask, causal)
    if length == 1:
        one = None if valid is None else valid[:, 0]
        storage.put_one(keys, values, one)
        dense = _dense_with_one(storage, visibility, one)
    else:
        storage.balance(query, keys, valid)
        dense = _dense_with_block(storage, keys, values, valid)
    output = attend_kernel(query, storage.pages(), dense, visibility, scoring).output
    if length == 1:
        storage.finish_one(one)
    else:
        storage.store_block(keys, values, valid)
    return output


def _by_device(storage: StaticStorage, new: NewToken) -> Tensor | None:
    """:func:`attend_and_store` of one token by kernels that read all lengths on the device; None if there are none.

    On a CPU, where such kernels are interpreted, it is an error if there is no room. Elsewhere the output is NaN then,
    and the next function on the host raises, for asking would wait for the device.

    Raises:
        RuntimeError: if there are none and a CUDA graph is being captured.
    """
    cpu, mask = new.query.is_cpu, new.mask
    if cpu and implementation("static_step", new.query.device) is None:
        return None
    if cpu:
        storage.check_room(1)
    if mask is None or (mask.dim() in (2, 4) and mask.shape[-1] >= storage.settings.max_length):
        plain = mask
        if mask is not None:
            plain = mask.bool() if mask.dim() == 2 else mask[:, 0, 0] if mask.shape[1] == 1 else None
            plain = plain if plain is None or plain.stride(-1) == 1 else plain.contiguous()
        if (plain is None) == (mask is None):
            output = storage.steps.on_device(storage, replace(new, mask=plain))
            if output is not None:
                storage.changed()
                return output
    if not cpu:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step that cannot be part of a CUDA graph is being captured, as by torch.compile with "
                "mode='reduce-overhead': its mask differs between heads or is shorter than max_length; accepted: "
                "masks [B, 1, 1, max_length], or a step that is not captured"
            )
        storage.numbers.read()
    return None


def _visibility(storage: StaticStorage, length: int, mask: Tensor | None, causal: bool) -> Visibility:
    """Which keys the queries of ``length`` new tokens may see; ``mask`` is one that has to be read."""
    start, window = storage.seen, storage.settings.window
    if mask is None:
        return Visibility(start, length, None, 0, causal, window)
    if mask.dim() == 2:
        return Visibility(start, length, mask[:, None, None].bool(), 0, causal, window)
    # The mask includes causality and the window.
    return Visibility(start, length, mask, 0, causal and mask.shape[2] != length, None)


def _dense_with_one(storage: StaticStorage, visibility: Visibility, valid: np.ndarray | None) -> DenseTokens:
    """The full-precision tokens, the one of each sequence that was put in its slot among them."""
    lengths = storage.lengths + (1 if valid is None else valid)
    longest, uniform = int(lengths.max()), bool(lengths.min() == lengths.max())
    keys, values = storage.tensors.dense_keys[:, :, :longest], storage.tensors.dense_values[:, :, :longest]
    positions = storage.numbers.positions[:, :longest]
    oldest = int(positions[:, 0].min()) if longest else 0  # there is no token if all are padding
    if uniform and visibility.sees_all(oldest):
        return DenseTokens(keys, values)
    device = keys.device
    unused = None if uniform else to_device(np.arange(longest) >= lengths[:, None], device)
    return DenseTokens(keys, values, to_device(positions, device), unused)


def _dense_with_block(storage: StaticStorage, keys: Tensor, values: Tensor, valid: np.ndarray | None) -> DenseTokens:
    """The full-precision tokens, followed by new ones that are not stored yet."""
    tensors, (batch, _, length, _) = storage.tensors, keys.shape
    longest = int(storage.lengths.max())
    if longest:
        keys = torch.cat([tensors.dense_keys[:, :, :longest], keys], 2)
        values = torch.cat([tensors.dense_values[:, :, :longest], values], 2)
    new = np.broadcast_to(np.arange(storage.seen, storage.seen + length), (batch, length))
    # Kernels read the positions of a sequence side by side.
    positions = np.ascontiguousarray(np.concatenate([storage.numbers.positions[:, :longest], new], 1))
    unused = None
    if valid is not None or storage.lengths.min() != longest:
        padding = np.zeros((batch, length), dtype=bool) if valid is None else ~valid
        hidden = np.concatenate([np.arange(longest) >= storage.lengths[:, None], padding], 1)
        unused = to_device(hidden, keys.device)
    return DenseTokens(keys, values, to_device(positions, keys.device), unused)
