"""Digests of the first tokens of a prompt, by which a prompt is found without its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

#: A prompt has a digest after every so many tokens.
BLOCK = 64


def digests_at(ids: np.ndarray, lengths: Iterable[int]) -> dict[int, str]:
    """The digest of the first ``n`` of ``ids [T]``, for each ``n`` in ``lengths`` that is not above ``T``."""
    running, done, found = hashlib.sha256(b"hf_kvcache tokens"), 0, {}
    data = np.ascontiguousarray(ids, dtype="<i8")
    for length in sorted({n for n in lengths if 0 < n <= len(ids)}):
        running.update(data[done:length].tobytes())
        done = length
        found[length] = running.copy().hexdigest()
    return found


def prompt_digests(ids: np.ndarray) -> list[str]:
    """The digests after every :data:`BLOCK` tokens, and the one of all tokens last."""
    return list(digests_at(ids, [*range(BLOCK, len(ids), BLOCK), len(ids)]).values())


def name_of(ids: np.ndarray) -> str:
    """The name of a prompt in a folder and in a remote store: the digest of its tokens."""
    return digests_at(ids, [len(ids)])[len(ids)]


class DigestIndex:
    """Prompts of which only the digests are known.

    A prompt that is longer than a given one, or differs from it, is found by the digests of its first blocks.
    """

    def __init__(self) -> None:
        self._whole: dict[str, str] = {}  # name by the digest of the whole prompt
        self._begins: dict[str, dict[str, None]] = {}  # names by the digest of the first blocks
        self._known: dict[str, tuple[int, list[str]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def names(self) -> set[str]:
        """The names of all prompts."""
        return set(self._known)

    def add(self, name: str, seen: int, digests: list[str]) -> None:
        """Add a prompt of ``seen`` tokens with its :func:`prompt_digests`."""
        self.remove(name)
        self._known[name] = (seen, digests)
        self._whole[digests[-1]] = name
        for digest in digests[:-1]:
            self._begins.setdefault(digest, {})[name] = None

    def remove(self, name: str) -> None:
        """Forget a prompt, if it is known."""
        _, digests = self._known.pop(name, (0, []))
        if digests and self._whole.get(digests[-1]) == name:
            del self._whole[digests[-1]]
        for digest in digests[:-1]:
            self._begins[digest].pop(name, None)
            if not self._begins[digest]:
                del self._begins[digest]

    def match(self, ids: np.ndarray) -> list[tuple[int, str, bool]]:
        """Which prompts have how many of the first ``ids``, longest first.

        Returns:
            The number of tokens, the name, and whether these are all tokens of the prompt. Of prompts that go on, only
            those with the most tokens are named.
        """
        if not self._known:
            return []
        wholes = {seen for seen, _ in self._known.values()}
        blocks = range(BLOCK, len(ids) + 1, BLOCK)
        digests = digests_at(ids, [*wholes, *blocks])
        found = [(n, self._whole[d], True) for n, d in digests.items() if d in self._whole]
        for length in reversed(blocks):
            if names := self._begins.get(digests[length]):
                found += [(length, name, False) for name in names]
                break
        return sorted(found, key=lambda item: (-item[0], not item[2]))
