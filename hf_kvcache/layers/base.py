"""transformers' cache-layer contract over paged storage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.integration.handle import HeldStates, KVHandle, carrying_gradient
from hf_kvcache.integration.masks import expect_mask, latest_padding
from hf_kvcache.integration.padding import Padding, check_hidden, padding_of, valid_in
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces, padding_places
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.decode_step import PreparedDecoding
from hf_kvcache.layers.new_tokens import NewTokens, check_update, dense_tokens
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.checking import check_like, check_storage
from hf_kvcache.storage.dense_read import dense_side

logger = logging.get_logger(__name__)

#: Past this many tokens without a confirming `crop`, the oldest are taken as confirmed: nobody drafts that far ahead.
MAX_UNCONFIRMED = 512
#: Of which layer, and what it lost.
CANNOT_TAKE_BACK = (
    "crop(): a forward pass ended in the middle, and layer {} cannot go back to what it held before: it no longer has "
    "{}. Call reset()."
)


@dataclass(frozen=True)
class LayerOptions:
    """What every layer of a cache shares.

    Attributes:
        codec: how pages are stored.
        sink_length: tokens at the start of a sequence that stay in full precision.
        tail_length: newest tokens that stay in full precision.
        page_size: tokens a page holds.
        validate: whether every update is checked for NaN and infinity.
        deferred: whether new tokens are stored at the next call only, because other layers read them too.
        eviction: how full-attention layers keep within a budget; None: they keep every token.
        latents: ``"native"`` where the model caches latents itself, or the basis of each layer by its number; None:
            keys and values are stored as they are.
        config: of the model, for errors that say what would work with it.
    """

    codec: Codec
    sink_length: int
    tail_length: int
    page_size: int
    validate: bool
    deferred: bool
    eviction: EvictionOptions | None = None
    latents: Literal["native"] | dict[int, LayerProjection] | None = None
    config: PreTrainedConfig | None = field(default=None, repr=False, compare=False)


class KVCacheLayer(CacheLayerMixin):
    """One attention layer's cache.

    Args:
        index: number of the layer in the model.
        options: what the layers of the cache share.
        sliding_window: tokens a query sees, itself included; None for full attention.
    """

    #: Whether what is held are latents that the model expands.
    takes_expansion = False
    #: Beginnings of the names of tensors that a layer may have saved or not.
    optional_tensors: tuple[str, ...] = ()
    #: Whether tokens that a query may see can be gone.
    evicts = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None = None) -> None:
        super().__init__()
        self.index, self.options, self.sliding_window = index, options, sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.storage: PagedStorage | None = None
        #: Changes whenever handles given out earlier become wrong.
        self.version = 0
        self._seen = 0
        self._unconfirmed = 0
        self._kept_from = 0  # tokens before this position may be gone (sliding windows)
        self._new: NewTokens | None = None
        #: Where padding stood among the tokens seen.
        self.padding: PaddingPlaces = NO_PADDING
        self._movable = False  # was restored on a device that nobody has named
        self._checked: tuple[Any, ...] | None = None  # shapes, dtypes and device of the latest update
        #: Whether storing tokens was cut off in the middle, by Ctrl-C or for want of memory: only reset() helps then.
        self.broken = False
        self.prepared = self.make_prepared()

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys that are held, ``[B, Hkv, T, Dk]`` with zeros for padding; None before the first.

        For code that looks into the layers of any cache. They are decompressed by whoever computes with them.
        """
        return self.held_states("keys")

    @keys.setter
    def keys(self, none: torch.Tensor | None) -> None:
        pass  # the base class declares it so

    @property
    def values(self) -> torch.Tensor | None:
        """All values that are held, ``[B, Hkv, T, Dv]`` with zeros for padding; None before the first."""
        return self.held_states("values")

    @values.setter
    def values(self, none: torch.Tensor | None) -> None:
        pass

    def __repr__(self) -> str:
        window = f", sliding_window={self.sliding_window}" if self.is_sliding else ""
        return f"{type(self).__name__}({self.index}, {self.options.codec!r}{window}, tokens={self._seen})"

    # -- transformers' contract -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the storage for tensors like these, ``[B, Hkv, T, D]``."""
        # In a sliding layer the first tokens leave the window like any others.
        sinks = 0 if self.is_sliding else self.options.sink_length
        self.storage = self.make_storage(key_states, value_states, sinks)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens ``[B, Hkv, T, D]``; returns handles on all keys and values that attention may see.

        Raises:
            ValueError: if the tensors do not go with each other or with what the layer holds.
        """
        two = key_states.dtype != value_states.dtype
        if two and key_states.is_floating_point() and value_states.is_floating_point():
            # Under autocast a rotary embedding leaves keys in float32, and values come in the narrower dtype.
            both = torch.promote_types(key_states.dtype, value_states.dtype)
            key_states, value_states = key_states.to(both), value_states.to(both)
        kind = (key_states.shape, value_states.shape, key_states.dtype, value_states.dtype, key_states.device)
        if kind != self._checked or self.options.validate or value_states.device != key_states.device:
            self.check_whole()
            if self._movable:
                self._move(key_states.device)
            check_update(self.index, self.storage, key_states, value_states, self.options.validate)
        if self._new is not None:
            self.flush()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._checked = kind
        given = None
        if key_states.requires_grad or value_states.requires_grad:
            # What is stored carries no gradient; attention of a first forward pass gets it all the same.
            given = key_states, value_states
            key_states, value_states = key_states.detach(), value_states.detach()
        self._new = NewTokens(key_states, value_states, self._seen, given=given)
        self._seen += key_states.shape[2]
        self._unconfirmed += key_states.shape[2] if self.record_past else 0
        self.version += 1
        length = self._visible_length(key_states.shape[2])
        batch, heads, _, key_dim = key_states.shape
        keys = KVHandle(self, "keys", (batch, heads, length, key_dim), key_states)
        values = KVHandle(self, "values", (batch, heads, length, value_states.shape[3]), value_states)
        if given is not None and torch.is_grad_enabled():
            exact = self._new.position == 0
            return carrying_gradient(keys, given[0], exact), carrying_gradient(values, given[1], exact)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``query_length`` new tokens covers, in tokens seen."""
        expect_mask(self.options)
        offset = self._window_start(self._seen)
        return self._seen + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """The sliding window, or -1: no maximum."""
        return self.sliding_window or -1

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first update."""
        return -1 if self.storage is None else self.storage.batch

    def reset(self) -> None:
        """Forget everything; the layer may then hold another batch."""
        self.storage = self._new = self._checked = None
        self.prepared = self.make_prepared()
        self.is_initialized = self.record_past = self.broken = self._movable = False
        self._seen = self._unconfirmed = self._kept_from = 0
        self.padding = NO_PADDING
        self.version += 1

    def activate_past_recording(self) -> None:
        """Hold back packing until :meth:`crop` confirms the tokens."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens and confirm the others.

        Raises:
            ValueError: if the number is positive or beyond the tokens seen.
            RuntimeError: if a sliding layer no longer holds the tokens that would then be in its window.
        """
        self.check_crop(tokens_to_remove)
        if self.storage is None:
            return
        self.flush()
        self._seen += tokens_to_remove
        if tokens_to_remove:
            self.storage.truncate_from(self._seen)
            self.padding = self.padding.before(self._seen)
        self._confirm()
        self.version += 1

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise the error of :meth:`crop`, if it has one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove!r}): the number of tokens to remove is given as a negative int")
        length = self._seen + tokens_to_remove
        if length < 0:
            raise ValueError(f"crop({tokens_to_remove!r}): accepted: -{self._seen} to 0, the tokens seen so far")
        if self._window_start(length) < self._kept_from and length > 0 and tokens_to_remove:
            raise RuntimeError(
                f"crop({tokens_to_remove!r}): layer {self.index} no longer holds tokens before {self._kept_from} that "
                "its sliding window would need. Call activate_past_recording() before the tokens are added."
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]``."""
        self.select_rows(self.check_rows("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, copies side by side."""
        if self.storage is not None:
            self.select_rows(np.arange(self.batch_size).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` only, in that order."""
        self.select_rows(self.check_rows("indices", indices))

    def offload(self) -> None:
        raise NotImplementedError("a KVCache holds its pages on the device of their layer; offloading is not available")

    prefetch = offload

    def make_storage(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sink_length: int, spare: int | None = None
    ) -> PagedStorage:
        """An empty storage for tensors like these, with room for ``spare`` tokens beyond sinks and tail."""
        options = self.options
        encoder = PageEncoder(
            options.codec, key_states.shape[-1], value_states.shape[-1], options.page_size, key_states.dtype
        )
        return PagedStorage(encoder, key_states, value_states, sink_length, options.tail_length, spare)

    def make_prepared(self) -> PreparedDecoding | None:
        """What does plain decoding; None where attention is more than reading pages."""
        return PreparedDecoding(self.sliding_window)

    # -- what the package adds ------------------------------------------------------------------------------------

    def check_rows(self, argument: str, rows: torch.Tensor) -> np.ndarray:
        """``rows`` on the host; raises ValueError if one is not a sequence that the layer holds."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        if rows.is_floating_point():
            raise ValueError(f"{argument}={rows.tolist()!r}: accepted: whole numbers or booleans")
        indices = rows.cpu().numpy().astype(np.int64)
        if self.storage is None:
            return indices
        batch = self.storage.batch
        if indices.ndim != 1 or ((indices < -batch) | (indices >= batch)).any():
            raise ValueError(f"{argument}={indices.tolist()!r} is not a list of sequences; accepted: 0 to {batch - 1}")
        return np.where(indices < 0, indices + batch, indices)

    def select_rows(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them."""
        if self.storage is None or (len(rows) == self.batch_size and (rows == np.arange(len(rows))).all()):
            return
        self.flush()
        self.storage.select(rows)
        self.padding = self.padding.select(rows)
        self._checked = None
        self.version += 1

    def fork(self) -> KVCacheLayer:
        """A copy that shares the pages, which never change once written."""
        self.flush()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.storage = None if self.storage is None else self.storage.fork()
        other.prepared = self.make_prepared()
        return other

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return self.__dict__ | {"steps": None}  # which hold addresses

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepared = self.make_prepared()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCacheLayer:
        # Pages are immutable, so a fork is as independent as a copy of every byte.
        return self.fork()

    def attend(
        self,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scoring: Scoring,
        causal: bool = True,
        module: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """Attention of the latest update's queries over the cache; the new tokens are stored by it.

        Args:
            query: ``[B, Hq, T, Dk]``, or only the last of the T queries (a layer that shares another's keys).
            attention_mask: boolean or additive ``[B, 1 or Hq, T, tokens]``, 2D ``[B, tokens]``, or None.
            scoring: how scores are made.
            causal: whether a token sees no later one where no mask says it.
            module: the attention module, for layers whose storage or eviction depends on it.

        Returns:
            ``[B, T, Hq, Dv]``.

        Raises:
            ValueError: if the query does not go with the latest update.
        """
        new, storage = self._latest()
        skip = self.check_query(query)
        output = self.attend_token(new, storage, query, attention_mask, scoring)
        if output is not None:
            if not self.options.deferred:
                self.flush()
            return output
        visibility = self._visibility(new, storage, attention_mask, causal, skip)
        segments = [
            (slice(max(at.start, skip), at.stop), n) for at, n in self._segments(new, storage) if at.stop > skip
        ]
        if new.length == 1 and not new.stored:
            # Written to the dense buffer first, so that nothing is concatenated.
            storage.append_one(new.keys, new.values, new.position, None if new.valid is None else new.valid[:, 0])
            new.stored = True
        outputs = [
            self.read(
                query if len(segments) == 1 else query[:, :, queries.start - skip : queries.stop - skip],
                storage.pages(ahead),
                dense_tokens(storage, new, visibility, ahead, queries),
                visibility if len(segments) == 1 else visibility.part(slice(queries.start - skip, queries.stop - skip)),
                scoring,
                module,
            ).output
            for queries, ahead in segments
        ]
        if not self.options.deferred:
            self.flush()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def attend_token(
        self,
        new: NewTokens,
        storage: PagedStorage,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scoring: Scoring,
    ) -> torch.Tensor | None:
        """Store the one new token and attend to it and to all held; None, and nothing stored, if it is more than that.

        More are several tokens, a padded or ragged batch, a mask that says more than causality, tokens that may be
        rolled back, a gradient asked for.
        """
        if (
            new.length != 1
            or query.shape[2] != 1
            or new.stored
            or self.record_past
            or storage.dense.uniform_length is None
            or self.padding is not NO_PADDING
            or (query.requires_grad and torch.is_grad_enabled())
        ):
            return None
        if attention_mask is not None:
            padding = padding_of(attention_mask, new.position, 1, self.sliding_window)
            if padding is None or not padding.none:
                return None
        return self.step(new, storage, query, scoring)

    def step(self, new: NewTokens, storage: PagedStorage, query: torch.Tensor, scoring: Scoring) -> torch.Tensor | None:
        """:meth:`attend_token` once it is known to be no more; None where no kernel does it at once."""
        return None if self.prepared is None else self.prepared.attend(storage, new, query, scoring)

    def read(
        self,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        scoring: Scoring,
        module: torch.nn.Module | None,
        sums: bool = False,
    ) -> Attention:
        """Attention of queries ``[B, Hq, q, Dk]`` over what is stored; of what is stored how, subclasses know."""
        return attend(query, pages, dense, visibility, scoring, sums)

    def check_query(self, query: torch.Tensor) -> int:
        """How many of the new tokens have no query; raises ValueError if the query does not go with them."""
        new, storage = self._latest()
        skip = new.length - query.shape[2]
        if query.shape[0] != storage.batch or skip < 0 or query.shape[1] % storage.heads:
            raise ValueError(
                f"query of shape {tuple(query.shape)} does not go with keys of shape {tuple(new.keys.shape)}"
            )
        return skip

    def has_history(self) -> bool:
        """Whether attention has to look at anything but the tokens of the latest update."""
        return self._latest()[0].position > 0

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, Hkv, T, D]``, with their gradient if they have one."""
        new, _ = self._latest()
        return (new.keys, new.values) if new.given is None else new.given

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """What attention over the latest update may be asked for a gradient of, beside its queries."""
        given = self._latest()[0].given
        return () if given is None else given

    def note_attended(
        self,
        attention_mask: torch.Tensor | None,
        query: torch.Tensor | int,
        scoring: Scoring | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        """Take note that someone else did the attention of the latest update; stores the tokens.

        Args:
            attention_mask: under which mask.
            query: with which queries ``[B, Hq, q, Dk]``, or how many.
            scoring: how scores were made, for layers that look at them.
            module: of which attention module.
        """
        new, _ = self._latest()
        queries = query if isinstance(query, int) else query.shape[2]
        if queries == new.length:  # else a layer that shares these keys, of which the mask does not tell
            self._note_padding(new, attention_mask)
        if not self.options.deferred:
            self.flush()

    def flush(self) -> None:
        """Store the tokens of the latest update, and pack what is due and confirmed."""
        new, storage = self._new, self.storage
        if new is None or storage is None:
            return
        self._new = None
        try:
            self._flush(new, storage)
        except BaseException:
            self.note_broken()
            raise

    def _flush(self, new: NewTokens, storage: PagedStorage) -> None:
        keep_from = 0 if self.record_past else self._window_start(self._seen)
        if new.length == 1 and not new.stored:
            storage.append_one(new.keys, new.values, new.position, None if new.valid is None else new.valid[:, 0])
        elif not new.stored:
            storage.append_block(new.keys, new.values, new.position, new.valid, not self.record_past, keep_from)
        if not self.record_past or self._unconfirmed > MAX_UNCONFIRMED:
            self._confirm()

    def note_dense_read(self) -> None:
        """Take note that someone reads dense keys and values, under the mask that was made last for this cache."""
        new = self._new
        if new is not None and not new.read:
            new.read = True
            padding = latest_padding(self.options, new.position, new.length, new.keys.shape[0])
            if padding is not None and new.earlier_padding is None and not new.stored:
                padding.hides_only(self.padding)  # raises if it shows padding
                new.valid, new.earlier_padding = padding.valid, self.padding
                self.padding = self.padding.extend(new.position, new.valid)
            elif padding is None and len(new.keys) > 1 and self.options.codec.name != "none":
                logger.warning_once(
                    "A KVCache is read by a model that makes its attention masks by itself: padding is stored like "
                    "tokens, and with a codec that rounds a padded sequence may differ from the same sequence alone."
                )

    def is_unread(self) -> bool:
        """Whether nobody has read what the latest update returned, though tokens were held before it."""
        new = self._new
        return new is not None and new.position > 0 and not (new.read or new.stored or self.options.deferred)

    def dense_side(self, side: str) -> torch.Tensor:
        """All keys or all values that attention may see, ``[B, Hkv, T, D]``, zeros where a token is not held."""
        new, storage = self._new, self.storage
        assert storage is not None
        fresh = new.length if new is not None and not new.stored else 0
        length = self._visible_length(new.length if new is not None else 1)
        if new is not None and length == fresh:
            return getattr(new, side)
        logger.warning_once(
            "A KVCache is read by something that needs dense keys and values: the whole cache is decompressed at every "
            "step, which is correct but slow. With attn_implementation='hf_kvcache' the pages are read as they are."
        )
        dense = dense_side(storage, side, self._seen - length, length)
        if new is not None and fresh:
            dense[:, :, length - fresh :] = getattr(new, side)
        return dense

    def held_states(self, side: str) -> torch.Tensor | None:
        """All keys or all values that are held, as a tensor that knows its shape; None before the first."""
        if self.storage is None:
            return None
        length = self._seen - self._window_start(self._seen)
        sizes = (self.storage.batch, self.storage.heads, length, self.storage.encoder.widths[side])
        return HeldStates(self, side, sizes, getattr(self.storage.dense, side))

    def decompressed(self, side: str) -> torch.Tensor:
        """All keys or all values that are held, ``[B, Hkv, T, D]``, zeros where a token is not held."""
        new, storage, start = self._new, self.storage, self._window_start(self._seen)
        assert storage is not None
        dense = dense_side(storage, side, start, self._seen - start)
        if new is not None and not new.stored:
            fresh = getattr(new, side)[:, :, -dense.shape[2] :]
            dense[:, :, dense.shape[2] - fresh.shape[2] :] = fresh
        return dense

    def progress(self) -> dict[str, int]:
        """The counters that go with the storage's tensors when the layer is saved."""
        self.flush()
        return {"seen": self._seen, "unconfirmed": self._unconfirmed, "kept_from": self._kept_from}

    def own_tensors(self) -> list[torch.Tensor]:
        """What the layer holds beside its storage."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, as tensors by name."""
        self.flush()
        if self.storage is None:
            return {}
        places = np.stack([self.padding.rows, self.padding.positions])
        return self.storage.state() | {"padding_places": torch.from_numpy(places)}

    def blank(self) -> KVCacheLayer:
        """An empty layer like this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.reset()
        return other

    def check_tensors(self, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        """Raise ValueError unless this empty layer could have saved them, with these counters."""
        keys, values = tensors["dense.keys"], tensors["dense.values"]
        check_update(self.index, None, keys[:, :, :1], values[:, :, :1], False, least=0)
        empty = self.blank()
        empty.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        check_like(tensors, empty.tensors(), self.optional_tensors)
        counters = {name: progress.get(name) for name in empty.progress()}
        for name, count in counters.items():
            if type(count) is not int or not 0 <= count <= progress["seen"]:
                raise ValueError(f"{name}={count!r} of {progress['seen']!r} tokens")
        assert empty.storage is not None
        check_storage(empty.storage, tensors, progress["seen"])

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: torch.device | str | None = None
    ) -> None:
        """Hold what :meth:`tensors` and :meth:`progress` returned, in place of what is held.

        Without a ``device`` tensors stay where they are until the first update, and then move to where that comes from.
        """
        self.reset()
        if tensors:
            to = tensors["dense.keys"].device if device is None else device
            # Bookkeeping lies on the host.
            tensors = {n: x.to(to if x.is_floating_point() or n == "records" else "cpu") for n, x in tensors.items()}
            self.lazy_initialization(tensors["dense.keys"], tensors["dense.values"])
            assert self.storage is not None
            self.storage.restore(tensors)
            self.padding = padding_places(*tensors["padding_places"].numpy())
            self._movable = device is None
        self._seen, self._unconfirmed, self._kept_from = (progress[k] for k in ("seen", "unconfirmed", "kept_from"))
        if self.storage is not None:
            self.storage.lost_before = self._kept_from

    def _move(self, device: torch.device) -> None:
        """Let what was restored lie where the first update comes from."""
        self._movable = False
        if self.device != device:
            recording = self.record_past
            self.restore(self.tensors(), self.progress(), device)
            self.record_past = recording

    @property
    def complete_length(self) -> int:
        """Tokens seen but for those of an update that attention is known not to have come to the end of."""
        return self._seen

    def check_take_back(self, length: int) -> None:
        """Raise RuntimeError if tokens that a pass was to add have driven out some of the first ``length``."""
        if self.storage is not None and self._window_start(length) < self.storage.lost_before:
            raise RuntimeError(CANNOT_TAKE_BACK.format(self.index, "what has left its sliding window meanwhile"))

    def take_back(self, length: int) -> None:
        """Return to the first ``length`` tokens; the update behind them may have been cut off anywhere."""
        self._new = None
        if self.storage is not None:  # else it reads what another layer holds
            self._seen = length
            self.storage.truncate_from(length)
            self.padding = self.padding.before(length)
            self._confirm()
        self.version += 1

    def note_broken(self) -> None:
        """Take note that storing tokens was cut off in the middle."""
        self.broken, self._checked = True, None  # so that the next update looks

    def check_whole(self) -> None:
        """Raise RuntimeError if storing tokens was cut off in the middle."""
        if self.broken:
            raise RuntimeError(
                f"layer {self.index}: an exception or Ctrl-C came while tokens were stored, some of which are lost or "
                "there twice; call reset() and begin again"
            )

    def check(self) -> None:
        """Raise IntegrityError if an invariant of the storage is broken."""
        self.check_whole()
        self.flush()
        if self.storage is not None:
            self.storage.check()

    # -- internals ------------------------------------------------------------------------------------------------

    def _latest(self) -> tuple[NewTokens, PagedStorage]:
        if self._new is None or self.storage is None:
            raise RuntimeError(
                f"layer {self.index}: attention was already computed for the latest update. A model whose layers share "
                "keys and values says so in its config (`kv_sharing_modes`); this one does not."
            )
        return self._new, self.storage

    def _note_padding(self, new: NewTokens, attention_mask: torch.Tensor | None) -> Padding | None:
        """Take from the mask which new tokens are padding; returns the mask's own view if it says no more than that."""
        padding = padding_of(attention_mask, new.position, new.length, self.sliding_window)
        if new.earlier_padding is None:
            if padding is not None:
                new.valid = padding.valid
            elif attention_mask is not None:
                new.valid = valid_in(attention_mask, new.length)
            new.earlier_padding = self.padding
            self.padding = self.padding.extend(new.position, new.valid)
        return padding

    def _visibility(
        self, new: NewTokens, storage: PagedStorage, attention_mask: torch.Tensor | None, causal: bool, skip: int
    ) -> Visibility:
        mask, mask_start, window = attention_mask, self._window_start(new.position), self.sliding_window
        if not skip:
            padding = self._note_padding(new, mask)
            assert new.earlier_padding is not None
            if padding is None and mask is not None:
                check_hidden(mask, mask_start, new.earlier_padding, new.valid)
            elif padding is not None:
                # A mask that was made causal is so whatever the module says of its attention in general.
                causal = causal or (mask is not None and mask.dim() == 4)
                if padding.hides_only(new.earlier_padding):
                    mask = None  # it hides padding, of which nothing is stored, and what causality and the window hide
        if mask is not None and mask.dim() == 2:
            mask, mask_start = mask[:, None, None, :].bool(), 0
        elif mask is not None:
            window = None  # it says itself what is seen; that of Moshi has no window, though its cache has one
        return Visibility(
            start=new.position + skip,
            length=new.length - skip,
            mask=mask,
            mask_start=mask_start,
            causal=causal if mask is None or mask.shape[2] != new.length - skip or mask.shape[2] == 1 else False,
            window=window,
        )

    def _segments(self, new: NewTokens, storage: PagedStorage) -> list[tuple[slice, int]]:
        """The queries in runs that see the same pages, each with the number of pages packed ahead that it sees.

        While tokens may be rolled back, a token is to see what it would have seen in plain decoding: a page from the
        moment on when it would have been packed.
        """
        held = storage.dense.uniform_length
        drafted = new.length <= max(1, self.options.tail_length)
        if not self.record_past or held is None or new.valid is not None or not drafted or new.stored:
            return [(slice(0, new.length), storage.ahead)]
        due = storage.due(held + np.arange(new.length))
        storage.pack_ahead(int(due[-1]))
        starts = [0, *(np.flatnonzero(np.diff(due)) + 1).tolist(), new.length]
        return [(slice(a, b), int(due[a])) for a, b in itertools.pairwise(starts)]

    def _confirm(self) -> None:
        """Pack what is due, and let go of what has left the window."""
        assert self.storage is not None
        self._unconfirmed = 0
        keep_from = self._window_start(self._seen)
        self.storage.commit_ahead()
        self.storage.pack_due(keep_from)
        if self.is_sliding and keep_from:
            self.storage.drop_before(keep_from)
            self._kept_from = keep_from

    def _window_start(self, seen: int) -> int:
        """Position of the first token that a query after ``seen`` tokens may see."""
        return 0 if self.sliding_window is None else max(seen - self.sliding_window + 1, 0)

    def _visible_length(self, new: int) -> int:
        """Keys shown to the queries of the last ``new`` tokens seen."""
        return self._seen - self._window_start(self._seen - new)
