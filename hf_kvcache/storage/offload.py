"""Where the pages of a cache lie outside of the device that reads them: in the host's memory, or in files."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hf_kvcache.storage.fetching import DeviceBuffers
from hf_kvcache.storage.slabs import Slab

if sys.platform != "win32":
    import fcntl
    import resource

#: Name of the argument's value that stands for the host's memory.
CPU = "cpu"
_PREFIX, _LOCK = "hf_kvcache-pages-", "lock"
#: For how long pages are asked for ahead after one had to be waited for.
_SECONDS = 10.0
#: Bytes of pinned memory that are not worth another piece.
_LEAST_PINNED = 1 << 20
#: The buffers of each thread by their device, as long as a cache uses them.
_OF_THREAD = threading.local()
_ACCEPTED = "None, 'cpu', or the path of a folder that exists"


class OffloadTarget(ABC):
    """Makes slabs outside of a device. All layers of a cache, and its forks, share one."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._buffers: weakref.WeakSet[DeviceBuffers] = weakref.WeakSet()
        self._lock = threading.Lock()  # of the set

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether pages of layers on ``device`` are to lie here."""

    def in_place(self, device: torch.device) -> bool:
        """Whether kernels on ``device`` read the pages where they lie, so that nothing has to be fetched."""
        return device.type == "cpu"

    @abstractmethod
    def slabs(self, pages: int, record_bytes: int, device: torch.device) -> list[Slab]:
        """Memory for at least so many pages, which are read on ``device``.

        Raises:
            OSError: if there is no room on the disk.
        """

    def buffers(self, device: torch.device) -> DeviceBuffers:
        """This thread's buffers on ``device``, into which the pages of all layers of all caches are fetched in turn."""
        known: dict[torch.device, DeviceBuffers] = self._of_thread.__dict__.setdefault("buffers", {})
        if device not in known:
            # Of all targets: prompts in a store have one each, and would each hold the pages of two layers.
            shared = _OF_THREAD.__dict__.setdefault("buffers", weakref.WeakValueDictionary())
            known[device] = shared[device] = shared.get(device) or self._new_buffers(device)
            with self._lock:
                self._buffers.add(known[device])
        return known[device]

    def _new_buffers(self, device: torch.device) -> DeviceBuffers:
        return DeviceBuffers(device)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers of all threads; other caches may use them too."""
        with self._lock:
            return sum(buffers.nbytes for buffers in self._buffers)

    def reads_disk(self) -> bool:
        """Whether pages that are read in place may have to come from a disk first."""
        return False

    def check_process(self) -> None:  # noqa: B027
        """Raise RuntimeError if the pages belong to another process, which may change them."""


class HostMemory(OffloadTarget):
    """The host's memory, pinned for a GPU. Layers on a CPU have their pages there anyway."""

    def __repr__(self) -> str:
        return repr(CPU)

    def serves(self, device: torch.device) -> bool:
        return device.type not in ("cpu", "meta")

    @torch.inference_mode(False)
    def slabs(self, pages: int, record_bytes: int, device: torch.device) -> list[Slab]:
        pinned = device.type == "cuda"
        counts = _powers_of_two(pages, record_bytes) if pinned else [pages]
        return [
            Slab(torch.empty(n, record_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned), pinned=pinned)
            for n in counts
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return HostMemory, ()


class MappedFiles(OffloadTarget):
    """Files in a new folder, mapped into memory, one for each slab.

    The folder goes with the last pool that has pages in it, and at the latest when the process ends. What a process
    left that was killed, the next one that is given the same folder deletes.

    Args:
        folder: in which the new folder is made.

    Raises:
        ValueError: if there is no such folder, or nothing can be made in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        if sys.platform == "win32":
            raise ValueError(f"offload={folder!r}: files are mapped on POSIX systems only; accepted here: None, 'cpu'")
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"offload={str(folder)!r}: no such folder; accepted: {_ACCEPTED}")
        try:
            _remove_abandoned(self.folder)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.folder.resolve()))  # 0700
            lock = _lock(self.path)
        except OSError as error:
            raise ValueError(
                f"offload={str(folder)!r}: no files can be made there ({error.strerror}); accepted: {_ACCEPTED}, to "
                "which this user may write"
            ) from error
        self._numbers, self._process = itertools.count(), os.getpid()
        self._faults, self._asks_until = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, 0.0
        weakref.finalize(self, _remove, self.path, lock, self._process)

    def __repr__(self) -> str:
        return repr(str(self.folder))

    def serves(self, device: torch.device) -> bool:
        return device.type != "meta"

    def reads_disk(self) -> bool:
        # To ask for pages takes about a microsecond each, even if they are there. So it is done only for a while after
        # the process had to wait for some part of a file.
        faults, now = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, time.monotonic()
        if faults > self._faults:
            self._faults, self._asks_until = faults, now + _SECONDS
        return now < self._asks_until

    def check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"offload={str(self.folder)!r}: a forked process cannot go on with the cache of its parent, since both "
                "would write to the same files; accepted: KVCache.load() of a saved cache, or a pickled cache"
            )

    @torch.inference_mode(False)
    def slabs(self, pages: int, record_bytes: int, device: torch.device) -> list[Slab]:
        self.check_process()
        size, path = pages * record_bytes, self.path / f"{next(self._numbers)}.pages"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # All blocks of the disk now: a write to a mapped page that finds none would end the process.
            _allocate(file, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"offload={str(self.folder)!r}: no room for {size:,} bytes of pages ({error.strerror})",
            ) from error
        finally:
            os.close(file)
        # Unlike Python's, torch's mappings keep no file open: a process may have more slabs than files.
        try:
            records = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            path.unlink(missing_ok=True)
            message = f"offload={str(self.folder)!r}: {size:,} bytes of pages cannot be mapped ({error})"
            raise OSError(errno.ENOMEM, message) from error
        slab = Slab(records.view(pages, record_bytes), path)
        weakref.finalize(slab, path.unlink, missing_ok=True)  # with its pool, also if it never had a page
        return [slab]

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFiles, (str(self.folder),)


def offload_target(offload: str | os.PathLike[str] | None) -> OffloadTarget | None:
    """What the argument ``offload`` of a cache stands for; raises ValueError unless None, ``"cpu"`` or a folder."""
    if offload is None:
        return None
    if isinstance(offload, str) and offload == CPU:
        return HostMemory()
    if not isinstance(offload, str | os.PathLike):
        raise ValueError(f"offload={offload!r}; accepted: {_ACCEPTED}")
    return MappedFiles(offload)


def _powers_of_two(pages: int, record_bytes: int) -> list[int]:
    """Numbers of pages that fill powers of two of bytes, ``pages`` of them at least.

    Torch rounds pinned memory up to these, so what one piece would leave unused is cut off in several.
    """
    counts, left, least = [], pages, max(_LEAST_PINNED, record_bytes)
    while left > 0:
        size = left * record_bytes
        below, above = 1 << (size.bit_length() - 1), 1 << (size - 1).bit_length()
        # The last eighth, and what is small anyway, is rounded up.
        counts.append((above if left <= pages // 8 or below < least else below) // record_bytes)
        left -= counts[-1]
    return counts


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    block = bytes(1 << 20)  # macOS
    for start in range(0, size, len(block)):
        os.write(file, block[: size - start])


def _lock(path: Path) -> int:
    """Lock a folder for as long as the process lives; returns the open file. A folder without a lock is a new one."""
    new = path / f"{_LOCK}.new"
    file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    new.rename(path / _LOCK)
    return file


def _remove_abandoned(folder: Path) -> None:
    """Remove the folders of processes that died, whose locks are free."""
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # of another user, or gone
            file = os.open(path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(file)


def _remove(path: Path, lock: int, process: int) -> None:
    """Remove a folder, unless this process is a child of the one that made it."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
