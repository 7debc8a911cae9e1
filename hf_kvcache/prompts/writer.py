"""Writing prompts in the background."""

from __future__ import annotations

import atexit
import queue
import threading
import traceback
import weakref
from collections.abc import Callable

#: Tasks that may wait. Whoever adds one more waits too, so that what waits stays small.
_WAITING = 16


class BackgroundWriter:
    """Does one task after the other in a thread, which begins with the first task and ends with :meth:`close`."""

    def __init__(self) -> None:
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, task: Callable[[], None]) -> None:
        """Do ``task`` later. It must raise nothing."""
        # Held until the task is in the queue, so that no other thread closes the writer in between.
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # a forked process has no threads of its parent
                self._thread = threading.Thread(target=_work, args=(self._tasks,), daemon=True, name="hf_kvcache")
                self._thread.start()
                own = weakref.ref(self)
                atexit.register(_close, own)
            self._tasks.put(task)

    @property
    def idle(self) -> bool:
        """Whether no task waits or is being done."""
        return not self._tasks.unfinished_tasks

    def flush(self) -> None:
        """Wait until all tasks are done."""
        if self._thread is not None and self._thread.is_alive():
            self._tasks.join()

    def close(self) -> None:
        """Do all tasks, and end the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None and thread.is_alive():
                self._tasks.put(None)
                thread.join()


def _close(writer: weakref.ref[BackgroundWriter]) -> None:
    if (found := writer()) is not None:
        found.close()


def _work(tasks: queue.Queue[Callable[[], None] | None]) -> None:
    while True:
        task = tasks.get()
        try:
            if task is None:
                return
            task()
        except Exception:  # a warning that is made an error must not end the thread
            traceback.print_exc()
        finally:
            tasks.task_done()
