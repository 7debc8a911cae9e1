"""``PromptStore``: caches of prompts that were read once, shared by all that begin alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.loading import check_savable
from hf_kvcache.integration.placement import only_device, reads_on
from hf_kvcache.prompts import rows
from hf_kvcache.prompts.chat import Chat
from hf_kvcache.prompts.generating import generate
from hf_kvcache.prompts.namespace import KnownModel, check_settings, digest_of, namespace_of, settings_of
from hf_kvcache.prompts.shelf import Shelf
from hf_kvcache.prompts.sizes import size
from hf_kvcache.prompts.stats import StoreStats
from hf_kvcache.utils.validation import flag, whole


class PromptStore:
    """Keeps the caches of prompts, so that a prompt which begins like an earlier one is read from there on only.

    Prompts are compared by their token ids. What begins alike is held once in memory. With a directory, prompts are
    also written to files in the background, which other processes and later ones find. Several threads may use one
    store, and several processes one directory.

    Args:
        make_cache: makes an empty cache: ``lambda: QuantizedKVCache(model.config, bits=4)``.
        memory: bytes that stored prompts may take in memory, as a number or as text. The prompt that was used longest
            ago is dropped first. Caches that were fetched and are still used do not count.
        directory: folder of the files, missing or empty or of an earlier store; None for none. It is made readable for
            its owner only.
        disk: bytes of all files in the directory.
        remote: URL where several machines share prompts: of any file system that fsspec knows, or ``redis://``; None
            for none.
        model: the model that reads the prompts. It is needed with a directory or a remote tier: what lies there is
            shared by models with the same weights, and a config does not tell a checkpoint from its next version.
        tokenizer: the tokenizer of the prompts; stores with another one are kept apart.
        namespace: text that keeps stores apart which differ by something else.
        private: whether files hold digests of the tokens in their place.

    Raises:
        ValueError: for a budget, a directory or a URL that is not accepted, or one of these without a model.
        ImportError: if a package is missing that a tier needs.
    """

    def __init__(
        self,
        make_cache: Callable[[], KVCache],
        memory: int | str = "2 GiB",
        directory: str | PathLike[str] | None = None,
        disk: int | str = "20 GiB",
        remote: str | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        namespace: str = "",
        private: bool = False,
    ) -> None:
        empty = make_cache()
        if not isinstance(empty, KVCache) or empty.get_seq_length():
            raise ValueError(f"make_cache returned {empty!r}; accepted: a function that returns an empty KVCache")
        empty.refuse_static("a PromptStore")
        budgets = {"memory": size("memory", memory), "disk": size("disk", disk)}
        self._make, self._known, self._settings = make_cache, KnownModel(model), settings_of(empty)
        if model is None and (directory is not None or remote is not None):
            raise ValueError(
                "model=None with a directory or a remote tier; accepted: the model, as a config tells no weights"
            )
        described = namespace_of(empty, model, tokenizer, namespace)
        tier, elsewhere = None, None
        if directory is not None:
            from hf_kvcache.prompts.disk import DiskTier

            tier = DiskTier(Path(directory), described, budgets["disk"])
        if remote is not None:
            from hf_kvcache.prompts.remote import remote_of
            from hf_kvcache.prompts.remote_tier import RemoteTier

            elsewhere = RemoteTier(remote_of(remote, digest_of(described)))
        self._shelf = Shelf(self.make_cache, budgets["memory"], tier, elsewhere, flag("private", private))
        #: Whether caches of single prompts can be put together to a batch.
        self.joinable = rows.joinable(empty)

    def make_cache(self) -> KVCache:
        """An empty cache."""
        return self._make()

    def fetch(self, input_ids: Any, attention_mask: Any = None, least: int = 1) -> tuple[KVCache, int]:
        """A cache that has read the longest stored beginning of a prompt.

        The model needs a token to go on from, so the last token is never part of it. The cache is a fork: what is done
        with it does not change what is stored.

        Args:
            input_ids: the prompt, ``[T]`` or ``[1, T]``, or a batch ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding on the left; None if there is none.
            least: tokens that a stored beginning must have to be worth it.

        Returns:
            The cache, and how many columns of ``input_ids`` it has read, padding included. For a batch that is the most
            that every sequence has. Caches that cannot be put together to a batch, or behind padding, are empty.

        Raises:
            ValueError: if the arguments are no prompts.
        """
        prompts, width = rows.prompts_of(input_ids, attention_mask), rows.width_of(input_ids)
        if len(prompts) == 1 and len(prompts[0]) == width:
            cache, length, tier = self._shelf.find(prompts[0][:-1], whole("least", least))
            self._shelf.note(len(prompts[0]), length, tier)
            return (self.make_cache(), 0) if cache is None else (cache, length)
        return self._fetch_batch(prompts, width, whole("least", least))

    def _fetch_batch(self, prompts: list[Any], width: int, least: int) -> tuple[KVCache, int]:
        found = [self._shelf.find(ids[:-1], least) if self.joinable else (None, 0, "") for ids in prompts]
        # Every sequence ends where the one ends that has least.
        columns = min(width - len(ids) + length for ids, (_, length, _) in zip(prompts, found, strict=True))
        keep = [max(columns - (width - len(ids)), 0) for ids in prompts]
        if not any(keep):
            columns = 0
        for ids, length, (_, _, tier) in zip(prompts, keep, found, strict=True):
            self._shelf.note(len(ids), length if columns else 0, tier)
        if not columns:
            return self.make_cache(), 0
        caches = []
        for length, (cache, _, _) in zip(keep, found, strict=True):
            cache = self.make_cache() if cache is None else cache
            if length < cache.get_seq_length():
                cache.crop(length - cache.get_seq_length())
            caches.append(cache)
        joined = rows.join(self.make_cache(), caches, keep, columns)
        return joined, columns

    def put(
        self,
        input_ids: Any,
        cache: KVCache,
        attention_mask: Any = None,
        checkpoints: Mapping[int, KVCache] | None = None,
    ) -> None:
        """Keep a cache as the one of the tokens that it has read.

        The store keeps a fork. The cache itself may be used on.

        Args:
            input_ids: these tokens, ``[T]``, ``[1, T]`` or a batch ``[B, T]``.
            cache: the cache.
            attention_mask: ``[B, T]``, 0 for padding on the left; None if there is none.
            checkpoints: forks of the cache from when it had read fewer tokens, by their number. Caches that evict, and
                those of models with recurrent layers, cannot return to earlier tokens: the store finds them after all
                of their tokens or at a checkpoint.

        Raises:
            ValueError: if the cache has read other numbers of tokens or sequences or other padding, has other settings
                than those that ``make_cache`` makes, cannot be taken apart, or is over a budget. Nothing is kept then.
            RuntimeError: if a forward pass ended in the middle, or the cache is in the middle of a draft.
        """
        prompts = rows.prompts_of(input_ids, attention_mask)
        width = rows.width_of(input_ids)
        taken = {width: cache} | dict(checkpoints or {})
        padding = [width - len(ids) for ids in prompts]
        for length, one in taken.items():
            self._check(one, padding, length, width)
        self._shelf.store(
            [
                (ids[: length - padding[row]], rows.to_keep(one if padding == [0] else rows.take_out(one, row)))
                for length, one in sorted(taken.items())
                for row, ids in enumerate(prompts)
                if length > padding[row]
            ]
        )

    def put_each(self, prompts: Sequence[tuple[Any, KVCache]]) -> None:
        """:meth:`put` of several prompts ``[T]`` and their caches, all of them or none."""
        found = [(rows.prompts_of(input_ids)[0], cache) for input_ids, cache in prompts]
        for ids, cache in found:
            self._check(cache, [0], len(ids), len(ids))
        self._shelf.store([(ids, rows.to_keep(cache)) for ids, cache in found])

    def _check(self, cache: KVCache, padding: list[int], length: int, width: int) -> None:
        """Raise the errors of :meth:`put`; ``padding [B]`` is how much of it stands before each prompt."""
        batch = len(padding)
        if not isinstance(cache, KVCache):
            raise ValueError(f"cache is a {type(cache).__name__}; accepted: caches that make_cache makes")
        cache.refuse_static("put()")
        check_savable(cache)
        seen = cache.get_seq_length()
        if seen != length or length > width or cache.batch_size != batch:
            raise ValueError(
                f"the cache has read {seen} tokens of {cache.batch_size} sequences; accepted with these input_ids: "
                f"{length} of {batch}"
            )
        check_settings(cache, self._settings)
        if padding != [0] and not self.joinable:
            raise ValueError(
                f"a {type(cache).__name__} of {batch} sequences of this model cannot be taken apart; accepted: caches "
                "of one sequence without padding, or caches that keep every token of models with full attention"
            )
        for row, count in enumerate(padding):
            found = rows.padding_of(cache, row)
            if not np.array_equal(found, np.arange(min(count, length))):
                raise ValueError(
                    f"sequence {row} of the cache has padding at {found.tolist()[:8]}, {len(found)} in all; accepted: "
                    f"{count} before the prompt, as attention_mask says"
                )

    def generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        keep_reply: bool = False,
        checkpoints: Sequence[int] = (),
        **generation_options: Any,
    ) -> torch.Tensor:
        """``model.generate`` that reads of a prompt what is not stored, and keeps the prompt.

        Args:
            model: the model; always the same one.
            input_ids: the prompts, ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding on the left; None if there is none.
            keep_reply: whether the prompt is kept together with what was generated, as a chat needs it.
            checkpoints: numbers of tokens after which the cache is kept too, for a single prompt; see :meth:`put`.
            **generation_options: options of ``model.generate``.

        Returns:
            What ``model.generate`` returns for these arguments.

        Raises:
            ValueError: for another model than before, a prompt that is more than tokens, or options that do not go
                with a store; and as :meth:`put`.
        """
        self._known.check(model)
        self._shelf.device = only_device(model)  # without one, layers from files move with their first update
        return generate(self, model, input_ids, attention_mask, keep_reply, checkpoints, generation_options)

    def chat(self, model: PreTrainedModel, tokenizer: Any, messages: Any = (), **generation_options: Any) -> Chat:
        """A chat whose earlier turns are not read again; a context manager.

        Args:
            model: the model.
            tokenizer: its tokenizer, which has a chat template.
            messages: earlier messages, each with a ``role`` and a ``content``.
            **generation_options: options of ``model.generate``.
        """

        def reply_to(ids: torch.Tensor) -> torch.Tensor:
            return self.generate(model, ids, keep_reply=True, **generation_options)

        return Chat(reply_to, self.flush, tokenizer, list(messages), reads_on(model))

    def stats(self) -> StoreStats:
        """What the store has done, and what it holds."""
        return self._shelf.stats()

    def flush(self) -> None:
        """Wait until all prompts are written."""
        self._shelf.flush()

    def close(self) -> None:
        """Write all prompts, and end the background thread. The store can be used on."""
        self._shelf.close()

    def __enter__(self) -> PromptStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
