"""A cache of a stored prompt as a file, and back."""

from __future__ import annotations

import json
import tempfile
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_kvcache.cache import files
from hf_kvcache.cache.base import KVCache
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.prompts.accounting import bytes_beside_pages, pages_of
from hf_kvcache.prompts.digests import prompt_digests
from hf_kvcache.utils.safetensors import file_size, write_file

#: Bytes of a header for each tensor, and for each token, at most.
_PER_TENSOR, _PER_TOKEN, _PER_FILE = 512, 24, 16384
#: Tensors that a layer saves, at most.
_TENSORS = 24


class PromptFile:
    """A prompt and its cache, ready to be written.

    Args:
        cache: the cache after the prompt.
        ids: int64 ``[n]``, the prompt.
        private: whether only digests of the tokens are written.
    """

    def __init__(self, cache: KVCache, ids: np.ndarray, private: bool) -> None:
        self.state = cache.state_dict()
        described = files.about(cache.options, cache.layers, type(cache).__name__, ids[None], private)
        described |= {"settings": None, "settings_missing": "the file belongs to a PromptStore"}
        self.about = described | {"prompt_digests": prompt_digests(ids)}
        self._metadata = {"format": files.FORMAT, "about": json.dumps(self.about)}
        #: Bytes of the file.
        self.size = file_size(self.state, self._metadata)

    def write(self, file: Any) -> None:
        """Write the file to an open one."""
        write_file(file.write, self.state, self._metadata)

    def content(self) -> bytes:
        """The whole file."""
        parts = BytesIO()
        self.write(parts)
        return parts.getvalue()


def largest_file(cache: KVCache, tokens: int) -> int:
    """Bytes that the file of a cache after ``tokens`` tokens does not exceed, without making it."""
    pages = sum(len(ids) * pool.record_bytes for pool, ids in pages_of(cache).items())
    header = _PER_TENSOR * _TENSORS * len(cache.layers) + _PER_TOKEN * tokens + _PER_FILE
    return pages + bytes_beside_pages(cache) + header


def check_file(cache: KVCache, tokens: int, budget: int | None) -> None:
    """Raise ValueError if a cache after ``tokens`` tokens cannot be saved, or its file alone may be over a budget."""
    for layer in cache.own_layers:
        if isinstance(layer, EvictingLayer) and layer.evictor is not None and layer.evictor.schedule.pending:
            raise ValueError("the prompt waits to be evicted; call compress() before the cache is put in the store")
    size = largest_file(cache, tokens)
    if budget is not None and size > budget:
        raise ValueError(
            f"disk={budget!r} bytes may be less than the file of this prompt of {tokens} tokens takes; accepted: from "
            f"{size}"
        )


def prompt_tokens(about: dict[str, Any]) -> np.ndarray | None:
    """The tokens ``[n]`` that a file says it is of; None if it is private.

    Raises:
        ValueError: if the file is of no prompt, or says two things.
    """
    try:
        tokens, digests, seen = about["tokens"], about["prompt_digests"], about["seen"]
        if type(seen) is not int or not digests or not all(isinstance(digest, str) for digest in digests):
            raise ValueError("no number of tokens, or no digests")
        if tokens is None:
            return None
        ids = np.array(tokens[0], dtype=np.int64)
        if len(tokens) != 1 or len(ids) != seen or prompt_digests(ids) != digests:
            raise ValueError("its digests are not those of its tokens")
    except (KeyError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"the file describes no prompt: {error}") from error
    return ids


def read_prompt(path: str | PathLike[str], empty: KVCache, digest: str, device: torch.device | str | None) -> KVCache:
    """Fill an empty cache from a file.

    Args:
        path: of the file.
        empty: the cache, with the settings of the saved one.
        digest: the digest of the tokens that the file must be of.
        device: where the cache is to lie; None leaves it in the mapped file until it is used.

    Raises:
        ValueError: if the file is damaged, or of other tokens or settings.
    """
    about = files.read_about(path)
    prompt_tokens(about)
    if about.get("prompt_digests", [None])[-1] != digest:
        raise ValueError(f"path={str(path)!r} is of another prompt")
    files.check_fingerprint(about["model"], empty.config)
    state, _ = files.read_tensors(path)
    empty.take_state(state, device)
    if empty.get_seq_length() != about["seen"]:
        raise ValueError(f"path={str(path)!r} holds {empty.get_seq_length()} tokens, not {about['seen']}")
    return empty


def read_content(
    content: bytes, empty: KVCache, digest: str, device: torch.device | str | None
) -> tuple[KVCache, np.ndarray | None]:
    """:func:`read_prompt` of the content of a file that is nowhere on this machine, and :func:`prompt_tokens`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt"
        path.write_bytes(content)
        return read_prompt(path, empty, digest, device), prompt_tokens(files.read_about(path))
