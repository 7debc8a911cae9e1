"""Prompts as files in a folder that several processes may use."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_kvcache.cache.files import read_about, replace_file
from hf_kvcache.prompts.namespace import digest_of

_MARKER = "hf_kvcache_prompts.json"
_VERSION = 1
_SUFFIX = ".safetensors"
_LOCK = ".lock"
#: Names that a store gives to the folders of namespaces and to the files of prompts. What has other names is not ours.
_FOLDER = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors|\.([0-9a-f]{64}\.safetensors|namespace\.json)\.[0-9a-f]+\.tmp")
#: The clock of a file system stands still for some milliseconds. A folder that has just changed is listed again.
_CLOCK_NS = 100_000_000


class DiskTier:
    """Files of prompts of one namespace, in a directory with those of others.

    Whoever writes or deletes holds a lock on the directory, so a temporary file that is found meanwhile is one that a
    process left behind when it died. Whoever reads needs no lock: a file has all of its content, or is not there.

    Args:
        directory: an empty or missing folder, or one of an earlier store.
        namespace: what the prompts belong to.
        budget: bytes of all files in the directory.

    Raises:
        ValueError: if the directory holds something else, or is of a newer version.
    """

    def __init__(self, directory: Path, namespace: dict[str, Any], budget: int) -> None:
        self.root, self.budget, self._namespace = directory, budget, namespace
        self.folder = directory / digest_of(namespace)
        _claim(directory)
        self._lock = FileLock(directory / _LOCK, mode=0o600)
        with self._lock:
            self._drop_temporary()
            self._make_folder()
        self._listed: tuple[int, int] | None = None
        self.evictions = 0

    def path(self, name: str) -> Path:
        """The file of a prompt."""
        return self.folder / f"{name}{_SUFFIX}"

    def names(self) -> set[str] | None:
        """The names of all prompts; None if none has come or gone since the last call."""
        now = time.time_ns()
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:  # someone has deleted it; the next prompt makes it again
            self._listed = None
            return set()
        if self._listed is not None and self._listed[0] == changed and self._listed[1] > changed + _CLOCK_NS:
            return None
        self._listed = changed, now
        return {
            entry.name.removesuffix(_SUFFIX)
            for entry in os.scandir(self.folder)
            if entry.name.endswith(_SUFFIX) and not entry.name.startswith(".")
        }

    def about(self, name: str) -> dict[str, Any]:
        """What the file of a prompt says of it; raises ValueError if it is damaged or gone."""
        return read_about(self.path(name))

    def identity(self, name: str) -> tuple[int, int, int] | None:
        """What differs between two files that had the same name one after the other; None if there is none."""
        try:
            found = os.stat(self.path(name))
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def write(self, name: str, size: int, fill: Callable[[Any], Any], instead: list[str]) -> bool:
        """Write a prompt, and make room for it before.

        Args:
            name: of the prompt.
            size: bytes that the file will have.
            fill: is called with the open file.
            instead: prompts that are no longer needed once the file is there.

        Returns:
            Whether the file is there; False if it does not fit into the budget.
        """
        if not self.folder.exists():
            _claim(self.root)
        with self._lock:
            if self.path(name).exists():
                return True
            self._make_folder()
            self._drop_temporary()
            if not self._make_room(size):
                return False
            replace_file(self.path(name), fill, 0o600)
            for other in instead:
                if other != name:
                    self.delete(other)
        return True

    def delete(self, name: str) -> None:
        """Delete a prompt, if it is there."""
        with suppress(OSError):
            os.unlink(self.path(name))

    def touch(self, name: str) -> None:
        """Make a prompt the one that was used last."""
        with suppress(OSError):
            os.utime(self.path(name))

    @property
    def used(self) -> int:
        """Bytes of all files of prompts in the directory, of other namespaces too."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When a file was used last, its size and its path."""
        for folder in list(os.scandir(self.root)) if self.root.exists() else ():
            if _FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                for entry in list(os.scandir(folder.path)):
                    with suppress(OSError):  # another process may have deleted it
                        if _FILE.fullmatch(entry.name):
                            found = entry.stat(follow_symlinks=False)
                            yield found.st_mtime_ns, found.st_size, Path(entry.path)

    def _make_folder(self) -> None:
        _private_folder(self.folder)
        about = self.folder / "namespace.json"
        if not about.exists():
            content = json.dumps(self._namespace, default=str).encode()
            replace_file(about, lambda file: file.write(content), 0o600)

    def _make_room(self, size: int) -> bool:
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        if size > self.budget:
            return False
        for _, freed, path in files:
            if used + size <= self.budget:
                break
            try:
                os.unlink(path)
            except OSError:  # Windows keeps a file that is mapped
                continue
            used, self.evictions = used - freed, self.evictions + 1
        return used + size <= self.budget

    def _drop_temporary(self) -> None:
        for _, _, path in self._files():
            if path.name.endswith(".tmp"):
                with suppress(OSError):
                    os.unlink(path)


def _claim(directory: Path) -> None:
    """Make the directory, or check that an earlier store has made it."""
    marker = directory / _MARKER
    # Another process may be making the marker at this moment.
    begun = (_LOCK, _MARKER, f".{_MARKER}")
    if not directory.exists() or (directory.is_dir() and all(p.name.startswith(begun) for p in directory.iterdir())):
        _private_folder(directory)
        content = json.dumps({"format": "hf_kvcache prompts", "version": _VERSION}).encode()
        replace_file(marker, lambda file: file.write(content), 0o600)
    try:
        found = json.loads(marker.read_text())
        if found["format"] != "hf_kvcache prompts":
            raise ValueError(found["format"])
    except (KeyError, NotADirectoryError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"directory={str(directory)!r} is no folder of a PromptStore: {error}; accepted: a missing or empty "
            "folder, or one that a PromptStore has made"
        ) from error
    if found["version"] != _VERSION:
        raise ValueError(f"directory={str(directory)!r} has version {found['version']!r}; accepted: {_VERSION}")
    if os.name == "posix" and directory.stat().st_mode & 0o077:
        try:
            _private_folder(directory)
        except OSError as error:
            raise ValueError(
                f"directory={str(directory)!r} is open to others, who could put prompts there: {error}; accepted: a "
                "folder of one's own"
            ) from error


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
