"""The remote tier as a store uses it: what others have put there, and what happens when it cannot be reached."""

from __future__ import annotations

import threading
import time
import warnings
from contextlib import suppress

import numpy as np

from hf_kvcache.prompts.digests import DigestIndex
from hf_kvcache.prompts.files import PromptFile
from hf_kvcache.prompts.remote import Remote

#: Seconds between two looks at what others have put there, and after a failure.
REFRESH, PAUSE = 1.0, 30.0


class RemoteTier:
    """Prompts that others may have put elsewhere. Errors cost hits and give one warning, until it works again.

    Args:
        remote: where the prompts are.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote, self._lock = remote, threading.Lock()
        self._index = DigestIndex()
        self._missing: dict[str, float] = {}  # prompts that are gone or damaged though listed, and until when
        self._looks_again = self._works_again = 0.0
        self._warned = False
        self.failures = 0

    def __len__(self) -> int:
        return len(self._index.names())

    def match(self, ids: np.ndarray) -> list[tuple[int, str, bool]]:
        """Which prompts there have how many of the first ``ids``: :meth:`.DigestIndex.match`."""
        self._look()
        with self._lock:
            return self._index.match(ids)

    def read(self, name: str) -> bytes | None:
        """The file of a prompt; None if it is gone or cannot be reached."""
        try:
            return self._remote.read(name)
        except FileNotFoundError:
            self.forget(name)
        except Exception as error:  # of any package that a tier is reached by
            self._failed(error)
        return None

    def lacks(self, name: str) -> bool:
        """Whether a prompt is not known to be there, as far as it can be reached."""
        with self._lock:
            return name not in self._index and time.monotonic() >= self._works_again

    def write(self, name: str, prompt: PromptFile) -> None:
        """Put a prompt there, unless it is known to be there."""
        if not self.lacks(name):
            return
        try:
            self._remote.write(name, prompt.content(), {key: prompt.about[key] for key in ("seen", "prompt_digests")})
            with self._lock:
                self._missing.pop(name, None)
                self._index.add(name, prompt.about["seen"], prompt.about["prompt_digests"])
        except Exception as error:
            self._failed(error)

    def forget(self, name: str) -> None:
        """Do not look for a prompt there for a while: it is gone or damaged. It may be written again."""
        with self._lock:
            self._index.remove(name)
            self._missing[name] = time.monotonic() + PAUSE

    def _look(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < max(self._looks_again, self._works_again):
                return
            self._looks_again = now + REFRESH
            known = self._index.names()
            self._missing = {name: until for name, until in self._missing.items() if until > now}
            missing = set(self._missing)
        try:
            names = self._remote.names() - missing
            abouts = self._remote.about(sorted(names - known))
        except Exception as error:
            self._failed(error)
            return
        with self._lock:
            self._warned = False
            for name in known - names:
                self._index.remove(name)
            for name, about in abouts.items():
                with suppress(IndexError, KeyError, TypeError, ValueError):  # no description of a prompt
                    digests = [str(digest) for digest in about["prompt_digests"]]
                    if digests[-1] == name and name not in self._missing:
                        self._index.add(name, int(about["seen"]), digests)

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.failures += 1
            self._works_again = time.monotonic() + PAUSE
            warned, self._warned = self._warned, True
        if not warned:
            what = f"the remote tier of a prompt store fails, and is left out for now: {type(error).__name__}: {error}"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
