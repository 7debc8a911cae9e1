"""A cache as a file: the tensors of its state, and what one has to know to read them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_kvcache.cache.settings import BASES, bases, describe
from hf_kvcache.integration.model_identity import check_identity, model_identity
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.own import OwnLayer
from hf_kvcache.utils.safetensors import check_digest, load_file, read_header, write_file

_KIND = "hf_kvcache cache"
#: Version of the file, incremented when its metadata change their meaning. The state in it has a version of its own.
_VERSION = 1
FORMAT = f"{_KIND} {_VERSION}"
_WHAT = "a cache; accepted: what KVCache.save() writes"
#: What every description of a cache has beside that of its model.
_DESCRIBED = ("class", "seen", "tokens", "tokens_digest", "settings", "settings_missing")
#: What a config may say of its model and another one leaves open.
_OPTIONAL = ("name", "revision")


def fingerprint(config: Any) -> dict[str, Any]:
    """What a config says of which model it belongs to."""
    name, revision = getattr(config, "name_or_path", None), getattr(config, "_commit_hash", None)
    return model_identity(config) | {"name": name or None, "revision": revision}


def check_fingerprint(known: dict[str, Any], config: Any) -> None:
    """Raise ValueError unless a model with ``config`` may be the one that a cache was filled by.

    Args:
        known: the :func:`fingerprint` of the config of that model.
        config: the config of the model that is to go on with the cache.
    """
    check_identity("cache", known, config)
    own = fingerprint(config)
    for name in _OPTIONAL:
        if None not in (known.get(name), own[name]) and known[name] != own[name]:
            raise ValueError(
                f"the cache was made with the model {name} {known[name]!r}, this config is of {own[name]!r}; accepted: "
                "the same, or check_model=False if both are the same model"
            )


def token_digest(input_ids: np.ndarray) -> str:
    """A digest of token ids of any shape, which tells nothing of ids that nobody guesses."""
    ids = np.ascontiguousarray(input_ids, dtype="<i8")
    return hashlib.sha256(json.dumps(list(ids.shape)).encode() + ids.tobytes()).hexdigest()


def about(
    options: LayerOptions, layers: list[Any], kind: str, input_ids: np.ndarray | None, private: bool
) -> dict[str, Any]:
    """What a file says of its cache beside the tensors, as values for JSON.

    Args:
        options: the settings of the layers.
        layers: the layers of the cache.
        kind: name of the class of the cache.
        input_ids: int64 ``[B, n]``, the tokens that the cache has seen; None if they are not known.
        private: whether only a digest of the tokens is kept.
    """
    try:
        settings, why = describe(options), None
    except ValueError as error:
        settings, why = None, str(error)
    own = [layer for layer in layers if isinstance(layer, OwnLayer)]
    dtypes = [layer.dtype for layer in own if layer.is_initialized and hasattr(layer, "dtype")]
    tokens = None if input_ids is None or private else input_ids.tolist()
    return {
        "class": kind,
        "model": fingerprint(options.config),
        "dtype": str(dtypes[0]) if dtypes else None,
        "codec": repr(options.codec),
        "policy": None if options.eviction is None else repr(options.eviction.policy),
        "seen": next((layer.get_seq_length() for layer in own), 0),
        "tokens": tokens,
        "tokens_digest": None if input_ids is None else token_digest(input_ids),
        "settings": settings,
        "settings_missing": why,
    }


def check_ids(input_ids: torch.Tensor, batch: int, seen: int) -> np.ndarray:
    """``input_ids`` as int64 ``[B, n]`` on the host.

    Raises:
        ValueError: unless they are whole numbers, ``seen`` for each of ``batch`` sequences.
    """
    ids = whole_ids(input_ids)
    if tuple(ids.shape) != (batch, seen):
        raise ValueError(
            f"input_ids of shape {list(ids.shape)}; accepted: [{batch}, {seen}], the tokens that the cache has seen"
        )
    return ids


def whole_ids(input_ids: torch.Tensor) -> np.ndarray:
    """``input_ids [B, n]`` or ``[n]`` as int64 ``[B, n]`` on the host; raises ValueError unless whole numbers."""
    ids = torch.as_tensor(input_ids, device="cpu")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids of {ids.dtype}; accepted: whole numbers")
    return (ids[None] if ids.dim() == 1 else ids).numpy().astype(np.int64)


def write(
    path: str | os.PathLike[str], state: dict[str, torch.Tensor], described: dict[str, Any], options: LayerOptions
) -> None:
    """Write a cache. A file of that name is replaced once the new one is complete, and stays as it is on an error.

    Args:
        path: of the file.
        state: the tensors of the cache.
        described: what :func:`about` returned.
        options: the settings of the layers, whose low-rank bases go along.
    """
    parts = state | (bases(options) if described["settings"] is not None else {})
    metadata = {"format": FORMAT, "about": json.dumps(described)}
    replace_file(Path(path), lambda file: write_file(file.write, parts, metadata))


def replace_file(path: Path, fill: Callable[[Any], Any], mode: int | None = None) -> None:
    """Make or replace a file in one step: either the old content or the new one is there, whatever happens.

    Args:
        path: of the file.
        fill: is called with the open file, and writes it.
        mode: permissions of the file; None for those of any new file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode), "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of its cache: :func:`about`.

    Raises:
        ValueError: if the file is missing, damaged, of another kind or of a newer version.
    """
    try:
        _, metadata, _ = read_header(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} cannot be read: {error}") from error
    given = metadata.get("format", "")
    newer = re.fullmatch(rf"{_KIND} (\d+)", given)
    if newer is not None and int(newer[1]) > _VERSION:
        raise ValueError(
            f"path={str(path)!r} has version {newer[1]} of the format; this release of hf_kvcache reads version "
            f"{_VERSION}. Use the release that wrote the file, or a later one."
        )
    if given != FORMAT:
        raise ValueError(f"path={str(path)!r} is no file of {_WHAT}")
    try:
        found = json.loads(metadata["about"])
        if not isinstance(found, dict) or not isinstance(found["model"], dict):
            raise TypeError("no description of the model")
        for name in _DESCRIBED:
            found[name]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is damaged: {error}") from error
    return found


@torch.inference_mode(False)
def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state of a cache, and its low-rank bases, in a private mapping of the file into memory.

    Raises:
        ValueError: if the content of the file is not what was written.
    """
    check_digest(path, "path")
    tensors, _ = load_file(Path(path), "path", FORMAT, _WHAT)
    own = {name: x for name, x in tensors.items() if not name.startswith(BASES)}
    return own, {name: x for name, x in tensors.items() if name.startswith(BASES)}
