"""Prompts that several machines share: on a file system of fsspec, or in Redis."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Protocol

_SUFFIX = ".safetensors"
_ABOUT = ".json"


class Remote(Protocol):
    """Files of one namespace by name, each with a short description. All methods may raise any error."""

    def names(self) -> set[str]:
        """The names of all files."""

    def about(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """The descriptions of files; those that are gone or cannot be read are left out."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def write(self, name: str, content: bytes, about: dict[str, Any]) -> None:
        """Write a file. It has a name once all of its content is there."""


def remote_of(url: str, namespace: str) -> Remote:
    """The remote that a URL names.

    Raises:
        ValueError: if the URL has no known scheme.
        ImportError: if the package for it is not installed.
    """
    scheme, separator, _ = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not separator:
        raise ValueError(f"remote={url!r}; accepted: a URL such as 's3://bucket/folder' or 'redis://host:6379/0', None")
    return RedisRemote(url, namespace) if scheme in ("redis", "rediss", "unix") else FileRemote(url, namespace)


def _readable(found: dict[str, bytes]) -> dict[str, Any]:
    """Descriptions as values. One that another machine is writing, or died over, is left out."""
    values = {}
    for name, content in found.items():
        with suppress(ValueError):
            values[name] = json.loads(content)
    return values


class FileRemote:
    """A folder of any file system that fsspec knows."""

    def __init__(self, url: str, namespace: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(f"remote={url!r} needs fsspec: pip install hf_kvcache[prompts]") from error
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise ValueError(f"remote={url!r}; accepted: a URL that fsspec knows: {error}") from error
        self._folder = f"{root.rstrip('/')}/{namespace}"

    def names(self) -> set[str]:
        self._fs.invalidate_cache(self._folder)
        try:
            found = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:
            return set()
        return {path.rsplit("/", 1)[-1].removesuffix(_ABOUT) for path in found if path.endswith(_ABOUT)}

    def about(self, names: list[str]) -> dict[str, dict[str, Any]]:
        paths = {f"{self._folder}/{name}{_ABOUT}": name for name in names}
        found = self._fs.cat(list(paths), on_error="omit") if paths else {}
        return _readable({path.rsplit("/", 1)[-1].removesuffix(_ABOUT): content for path, content in found.items()})

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self._folder}/{name}{_SUFFIX}")

    def write(self, name: str, content: bytes, about: dict[str, Any]) -> None:
        self._fs.makedirs(self._folder, exist_ok=True)
        # The description comes last: without it nobody looks for the file.
        self._fs.pipe_file(f"{self._folder}/{name}{_SUFFIX}", content)
        self._fs.pipe_file(f"{self._folder}/{name}{_ABOUT}", json.dumps(about).encode())


class RedisRemote:
    """A Redis server. When a file is dropped is up to the server (``maxmemory-policy``)."""

    def __init__(self, url: str, namespace: str) -> None:
        try:
            import redis
        except ImportError as error:
            raise ImportError(f"remote={url!r} needs the package redis: pip install hf_kvcache[prompts]") from error
        try:
            self._server: Any = redis.Redis.from_url(url, socket_timeout=30, socket_connect_timeout=2)
        except ValueError as error:
            raise ValueError(f"remote={url!r}; accepted: a URL such as 'redis://host:6379/0': {error}") from error
        self._key = f"hf_kvcache:{namespace}"

    def names(self) -> set[str]:
        return {name.decode() for name in self._server.hkeys(self._key)}

    def about(self, names: list[str]) -> dict[str, dict[str, Any]]:
        found = self._server.hmget(self._key, names) if names else []
        return _readable({name: content for name, content in zip(names, found, strict=True) if content is not None})

    def read(self, name: str) -> bytes:
        content = self._server.get(f"{self._key}:{name}")
        if content is None:
            self._server.hdel(self._key, name)  # the server has dropped the file
            raise FileNotFoundError(name)
        return content

    def write(self, name: str, content: bytes, about: dict[str, Any]) -> None:
        self._server.set(f"{self._key}:{name}", content)
        self._server.hset(self._key, name, json.dumps(about))
