"""Plain steps of a layer with a fixed maximum length by prepared calls, as in :mod:`hf_kvcache.layers.decode_step`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import CallInputs, Scoring, Slots
from hf_kvcache.kernels.prepared_call import PreparedCall, prepare
from hf_kvcache.kernels.static_state import NewToken
from hf_kvcache.layers.static_contents import StaticContents


class StaticSteps:
    """Attention of single tokens, none of them padding, by a kernel call whose arguments are filled in once."""

    def __init__(self) -> None:
        self._call: PreparedCall | None = None
        self._kind: tuple[Any, ...] = ()

        self._on_device: Any = None
        self._device_kind: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Prepare the next call anew: the tensors have other contents."""
        self._call = None

    def on_device(self, contents: StaticContents, new: NewToken) -> torch.Tensor | None:
        """Store a token of each sequence, attend, and pack what is due, by kernels that read all lengths on the device.

        Args:
            contents: the tensors of the layer, always the same ones. The numbers on the host are not looked at.
            new: the token.

        Returns:
            ``[B, 1, Hq, Dv]``. None, with nothing stored, if there are no such kernels.
        """
        backend = implementation("static_step", new.query.device)
        if backend is None:
            return None
        scoring, tokens, mask, sinks = new.scoring, (new.query, new.keys, new.values), new.mask, new.scoring.sink_logits
        kind = (
            *((x.shape, x.stride(), x.dtype) for x in tokens),
            None if mask is None else (mask.shape, mask.stride(), mask.dtype),
            (scoring.scaling, scoring.softcap, None if sinks is None else sinks.data_ptr()),
        )
        if self._device_kind != kind:
            held = contents.tensors.for_kernels(contents.settings)
            self._on_device = backend.StaticStep(held, new) if backend.supports(held, new) else None
            self._device_kind = kind
        return None if self._on_device is None else self._on_device(*tokens, mask)

    def attend(
        self,
        contents: StaticContents,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor | None:
        """Put a token of each sequence in its slot, count the slot, and compute the token's attention.

        Args:
            contents: the tensors of the layer, always the same ones.
            query: ``[B, Hq, 1, Dk]``.
            keys: ``[B, H, 1, Dk]``.
            values: ``[B, H, 1, Dv]``.
            scoring: how scores are computed.

        Returns:
            ``[B, 1, Hq, Dv]``. None, with nothing stored, if no kernel can store and attend in one call.
        """
        lengths, sinks = contents.lengths, scoring.sink_logits
        slot = int(lengths.max())
        ragged = bool((lengths != slot).any())  # padded rows hold fewer tokens
        address = None if sinks is None else sinks.data_ptr()
        shapes = (query.shape, query.stride(), query.dtype, keys.stride(), values.stride(), keys.dtype)
        # Counted in the tensors, since a graph may have packed pages in copies of them.
        kind = (shapes, scoring.scaling, scoring.softcap, address, int(contents.numbers.page_events[0]), ragged)
        if self._call is None or self._kind != kind:
            tensors, positions = contents.tensors, contents.numbers.positions
            # On a CPU the positions on the device are those of the host.
            slots = Slots(
                tensors.dense_keys, tensors.dense_values, positions, lengths, partial(torch.from_numpy, positions)
            )
            window, pages = contents.settings.window, contents.pages()
            self._call = prepare(CallInputs(query, keys, values, pages, slots, scoring, window, ragged=ragged))
            self._kind = kind
        if self._call is None:
            return None
        return self._call(query, keys, values, slot, contents.seen)
