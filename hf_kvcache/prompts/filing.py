"""Writing the prompts of a shelf to its disk and its remote tier, in the background."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable

from hf_kvcache.cache.base import KVCache
from hf_kvcache.prompts.catalog import Catalog
from hf_kvcache.prompts.digests import name_of
from hf_kvcache.prompts.disk import DiskTier
from hf_kvcache.prompts.entry import Entry
from hf_kvcache.prompts.files import PromptFile
from hf_kvcache.prompts.remote_tier import RemoteTier
from hf_kvcache.prompts.writer import BackgroundWriter


class Filing:
    """Decides what is written, and writes it.

    Whoever holds the lock of the shelf may wait until a prompt is written. So the background thread does not wait for
    the lock: it leaves notes of what it has done, which the next one who holds the lock reads. All methods but
    :meth:`add`, :meth:`flush` and :meth:`close` are called with the lock, or by the background thread.

    Args:
        catalog: the prompts of the shelf.
        disk: files; None for none.
        remote: files elsewhere; None for none.
        private: whether files hold digests of the tokens in their place.
        replaceable: whether a longer prompt can always stand in for one that it begins with.

    Attributes:
        failures: prompts that could not be written to the disk.
    """

    def __init__(
        self, catalog: Catalog, disk: DiskTier | None, remote: RemoteTier | None, private: bool, replaceable: bool
    ) -> None:
        self._catalog, self._disk, self._remote = catalog, disk, remote
        self._private, self._replaceable = private, replaceable
        self._writer = BackgroundWriter()
        self._notes: deque[Callable[[], None]] = deque()
        self.failures = 0

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written."""
        return self._writer.idle

    def lacks_file(self, entry: Entry) -> bool:
        """Whether an entry is to be written to the disk, and does not wait for that already."""
        if self._disk is None or entry.file is not None or not entry.written.is_set():
            return False
        return not (self._replaceable and self._catalog.is_covered(entry))

    def is_wanted_elsewhere(self, entry: Entry) -> bool:
        """Whether an entry is to be written to the remote tier, and does not wait for that already."""
        return self._remote is not None and entry.written.is_set() and self._remote.lacks(name_of(entry.ids))

    def task(self, entry: Entry, cache: KVCache) -> Callable[[], None] | None:
        """What writes an entry; None if another thread has asked for it before. It is given to :meth:`add`."""
        if not entry.written.is_set():
            return None
        to_disk = self.lacks_file(entry)
        entry.written.clear()
        replaced = [x.file for x in self._catalog.beginnings(entry.ids) if x.file is not None and x is not entry]
        return lambda: self._write(entry, cache, replaced if self._replaceable else [], to_disk)

    def add(self, task: Callable[[], None]) -> None:
        """Do a task later. Waits while many others wait."""
        self._writer.add(task)

    def _write(self, entry: Entry, cache: KVCache, replaced: list[str], to_disk: bool) -> None:
        name, catalog = name_of(entry.ids), self._catalog
        try:
            prompt = PromptFile(cache, entry.ids, self._private)
            if self._disk is not None and to_disk:
                if name in catalog.damaged:
                    self._disk.delete(name)
                if self._disk.write(name, prompt.size, prompt.write, replaced):
                    self._notes.append(lambda: catalog.note_good(name))
                    self._notes.append(lambda: catalog.note_written(name, entry, replaced))
        except Exception as error:
            self.note_failure(error)
            return
        finally:
            entry.written.set()
            self._notes.append(lambda: catalog.forget_if_gone(entry))
        if self._remote is not None:
            self._remote.write(name, prompt)

    def note_failure(self, error: Exception) -> None:
        """Count a prompt that could not be written, and warn."""

        def count() -> None:
            self.failures += 1

        self._notes.append(count)
        what = f"a prompt could not be written to the disk: {type(error).__name__}: {error}"
        warnings.warn(what, RuntimeWarning, stacklevel=3)

    def read_notes(self) -> None:
        """Take note of what the background thread has done."""
        while self._notes:
            self._notes.popleft()()

    def flush(self) -> None:
        """Wait until all prompts are written."""
        self._writer.flush()

    def close(self) -> None:
        """Write all prompts, and end the background thread."""
        self._writer.close()
