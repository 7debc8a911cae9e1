"""The cache methods that transformers calls, over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling
from transformers import PreTrainedConfig

from hf_kvcache.cache.forward_pass import ForwardPass
from hf_kvcache.cache.model_checks import ReadCheck, drop_limit, warn_if_dropped
from hf_kvcache.cache.model_config import check_states, make_layers
from hf_kvcache.cache.offloading import Offloading
from hf_kvcache.cache.other_crops import check_crop
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.own import OwnLayer
from hf_kvcache.layers.rows import check_rows
from hf_kvcache.utils.validation import whole


class CacheContract(Offloading):
    """A transformers cache whose attention layers are those of this package.

    Layers of other types (convolutions, recurrences, chunked attention) are transformers' own.

    Args:
        config: the config of the model's decoder.
        options: the settings that all layers of this package share.
    """

    def __init__(self, config: PreTrainedConfig, options: LayerOptions) -> None:
        super().__init__(layers=make_layers(config, options))
        self.config, self.options = config, options
        self._pass = ForwardPass(config, self.layers)
        self._read_check = ReadCheck(options)
        self._drop_limit = drop_limit(config)
        self._fitting: set[tuple[int, ...]] = set()  # heads and widths of keys that fit the config
        self.begin_offloading(options.offload is not None)

    @property
    def own_layers(self) -> list[OwnLayer]:
        """The layers of this package, in order; transformers' own layers are left out."""
        return [layer for layer in self.layers if isinstance(layer, OwnLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new tokens to a layer.

        Args:
            key_states: the keys ``[B, Hkv, T, Dk]``.
            value_states: the values ``[B, Hkv, T, Dv]``.
            layer_idx: number of the layer in the model.
            *args: passed on to the layer.
            **kwargs: passed on to the layer.

        Returns:
            Handles on all keys and all values that attention may see.

        Raises:
            ValueError: if the tensors do not fit each other, the model's config or the stored tokens.
            RuntimeError: if an earlier forward pass was interrupted, or the model did not read the handles.
        """
        if is_dynamo_compiling():
            if self.options.max_length is not None:
                final = self.layers[self._pass.places.index(self._pass.final)]
                return self.layers[layer_idx].trace_update(key_states, value_states, final)  # type: ignore[union-attr]
            return _update(self, key_states, value_states, layer_idx, *args, **kwargs)
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"layer_idx={layer_idx!r}: this cache was built for a {self.config.model_type!r} model of "
                f"{len(self.layers)} layers; build a cache from the config of the model that runs"
            )
        layer = self.layers[layer_idx]
        if not getattr(layer, "is_initialized", True):
            self._check_states(key_states)
        if not self._read_check.passed:
            self._read_check.check(self.layers, layer_idx)
        latest = self._pass
        place = latest.places[layer_idx]
        if place <= latest.reached != latest.final and getattr(layer, "_new", None) is None:
            self.check_complete()  # a new pass begins; raises if the latest one was interrupted
        # The base class would also create missing layers, and move all that offloaded ones hold.
        states = layer.update(key_states, value_states, *args, **kwargs)  # type: ignore[union-attr]
        if self.offloading:
            self._fetch_ahead(layer_idx, key_states.shape[2])
        if layer_idx not in latest.not_in_every_pass:
            latest.reached = place
        return states

    def enter_other_layer(self, layer_idx: int) -> None:
        if self._pass.goes_back(layer_idx):
            self.check_complete()
        self._pass.enter_other_layer(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset, in tokens seen, of the keys that a layer's mask for ``query_length`` new tokens covers.

        Models call this at the beginning of a forward pass.
        """
        if is_dynamo_compiling():
            if self.options.max_length is not None:
                return self.options.max_length, 0
            return _get_mask_sizes(self, query_length, layer_idx)
        # A compiled pass does not say how far it has come; the lengths of its layers do.
        if not self._pass.ended or self.options.max_length is not None:
            self.check_complete()
        return super().get_mask_sizes(query_length, layer_idx)

    def check_complete(self) -> None:
        """Raise RuntimeError if the latest forward pass ended in the middle. Its layers then hold different tokens."""
        if not self._interrupted:
            return
        for layer in self.own_layers:
            layer.check_whole()
        held = sorted({layer.get_seq_length() for layer in self._pass.in_every_pass(self.layers)}, reverse=True)
        raise RuntimeError(
            f"a forward pass with this cache ended in the middle, by an exception or Ctrl-C: its layers have seen "
            f"{' and '.join(map(str, held))} tokens. Call crop(0) to return to the "
            f"{self._pass.complete_length(self.layers)} tokens of "
            "the last complete pass, or reset() to drop all tokens."
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Yield keys, values and sliding window of each layer, as a DynamicCache does.

        The keys and values are decompressed when they are used.
        """
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                None if window is None else torch.tensor(window, device="cpu"),
            )

    def __bool__(self) -> bool:
        # Phi-3 drops a cache that is true. An empty cache is false, so that a prompt longer than Phi-3's limit is kept.
        return self._drop_limit is None or super().get_seq_length() > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that a layer has seen, padding included.

        While a cache with a maximum length is compiled this is a tensor, since a number would be part of the graph.
        """
        if is_dynamo_compiling():
            if self.options.max_length is not None:
                return self.layers[layer_idx].traced_length  # type: ignore[union-attr]
            return _get_seq_length(self, layer_idx)
        length = int(super().get_seq_length(layer_idx))
        if self._drop_limit is not None and 0 < length <= self._drop_limit:
            warn_if_dropped(self.config, length)
        return length

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first update."""
        sizes = {layer.batch_size for layer in self.own_layers if layer.is_initialized}
        return sizes.pop() if len(sizes) == 1 else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens of every sequence, and confirm the others.

        All layers are checked before one is changed. After a forward pass that ended in the middle, the tokens that it
        added are removed first, so ``crop(0)`` undoes it.

        Args:
            tokens_to_remove: minus the number of tokens to remove; 0 only confirms.

        Raises:
            ValueError: if the number is positive, or larger than the number of tokens seen.
            RuntimeError: if a layer cannot return to the earlier length: a sliding window or an eviction has dropped
                tokens, or there is a recurrent state.
        """
        tokens_to_remove = int(tokens_to_remove)  # older versions of transformers pass a tensor
        if self._interrupted:
            if not self._pass.take_back(self.layers):
                self.reset()
            if not tokens_to_remove:
                return
        for layer in self._pass.in_every_pass(self.layers):
            layer.check_crop(tokens_to_remove)
        for index, any_layer in enumerate(self.layers):
            if not isinstance(any_layer, OwnLayer):
                check_crop(index, any_layer, tokens_to_remove)
        for index, any_layer in enumerate(self.layers):
            if index not in self._pass.cross:
                any_layer.crop(tokens_to_remove)  # type: ignore[union-attr]

    def reset(self) -> None:
        """Drop all tokens. The next update may have another batch size."""
        for layer in self.own_layers:
            layer.reset()
        # transformers' own layers would keep zeroed states of the old batch size, so new layers replace them.
        fresh = make_layers(self.config, self.options)
        self.layers = [a if isinstance(a, OwnLayer) else b for a, b in zip(self.layers, fresh, strict=True)]
        self._pass.end()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]`` (beam search)."""
        rows = self._checked_rows("beam_idx", beam_idx)
        self._change_rows(rows, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences ``indices``, in that order."""
        rows = self._checked_rows("indices", indices)
        self._change_rows(rows, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times; the copies of a sequence lie side by side."""
        rows = np.arange(max(self.batch_size, 0)).repeat(whole("repeats", repeats, 1))
        self._change_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    @property
    def _interrupted(self) -> bool:
        """Whether the latest forward pass ended in the middle."""
        return not self._pass.ended or self._pass.complete_length(self.layers) < self.get_seq_length()

    def _check_states(self, key_states: torch.Tensor) -> None:
        """Raise ValueError if keys cannot come from the model. Layers mostly have keys of one kind, checked once."""
        kind = key_states.shape[1:2] + key_states.shape[3:]
        if kind not in self._fitting:
            check_states(self.config, key_states)
            self._fitting.add(kind)

    def _checked_rows(self, argument: str, rows: torch.Tensor) -> np.ndarray:
        """The numbers of the sequences ``rows``, none negative; raises ValueError unless every layer has them."""
        for own in self.own_layers:
            own.check_rows(argument, rows)
        return check_rows(argument, rows, self.batch_size)

    def _change_rows(self, rows: np.ndarray, change: Callable[[OwnLayer], None]) -> None:
        """Make ``rows`` the sequences of every layer; ``change`` does that for a layer of this package.

        Of transformers' own layers, those with a recurrence have no other method for it than ``reorder_cache``, which
        takes any number of rows.
        """
        others, empty = torch.from_numpy(rows), self.batch_size < 0
        for layer in self.layers:
            if isinstance(layer, OwnLayer):
                change(layer)
            elif not empty:
                layer.reorder_cache(others)  # type: ignore[arg-type]


_update = torch.compiler.disable(CacheContract.update)
_get_mask_sizes = torch.compiler.disable(CacheContract.get_mask_sizes)
_get_seq_length = torch.compiler.disable(CacheContract.get_seq_length)
