"""A radix tree over token ids: which stored prompts begin like a given one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

Value = TypeVar("Value")


class _Node(Generic[Value]):
    """A node, and the tokens on the way from its parent to it."""

    __slots__ = ("children", "edge", "parent", "value")

    def __init__(self, edge: np.ndarray, parent: _Node[Value] | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[int, _Node[Value]] = {}
        self.value: Value | None = None


class RadixTree(Generic[Value]):
    """Values by sequences of token ids. Every leaf has a value."""

    def __init__(self) -> None:
        self._root: _Node[Value] = _Node(np.zeros(0, np.int64), None)

    def get(self, ids: np.ndarray) -> Value | None:
        """The value of exactly these tokens."""
        node, depth, inside = self._descend(ids)
        return node.value if depth == len(ids) and not inside else None

    def insert(self, ids: np.ndarray, value: Value) -> None:
        """Set the value of these tokens."""
        node, depth, inside = self._descend(ids)
        if inside:
            node = self._split(node, inside)
        if depth < len(ids):
            below: _Node[Value] = _Node(ids[depth:].copy(), node)
            node.children[int(ids[depth])] = below
            node = below
        node.value = value

    def remove(self, ids: np.ndarray) -> None:
        """Forget the value of these tokens, if there is one."""
        node, depth, inside = self._descend(ids)
        if depth < len(ids) or inside:
            return
        node.value = None
        while node.parent is not None and node.value is None and not node.children:
            del node.parent.children[int(node.edge[0])]
            node = node.parent
        if node.parent is not None and node.value is None and len(node.children) == 1:
            self._merge(node)

    def match(self, ids: np.ndarray) -> tuple[int, list[tuple[int, Value]], Iterator[Value]]:
        """How many of the first ``ids`` some stored sequence begins with, and which sequences have how many of them.

        Returns:
            The number; the stored sequences that are a beginning of ``ids``, with their lengths, longest first; and
            those that begin with as many of ``ids`` as the number says, shorter ones before those that continue them.
        """
        node, depth, inside = self._descend(ids)
        path: list[tuple[int, Value]] = []
        at, above = depth, node
        if inside:
            assert node.parent is not None
            at, above = depth - inside, node.parent
        while above.parent is not None:
            if above.value is not None:
                path.append((at, above.value))
            at -= len(above.edge)
            above = above.parent
        return depth, path, self._below(node)

    def _below(self, node: _Node[Value]) -> Iterator[Value]:
        waiting = deque([node])
        while waiting:
            node = waiting.popleft()
            if node.value is not None:
                yield node.value
            waiting.extend(node.children.values())

    def _descend(self, ids: np.ndarray) -> tuple[_Node[Value], int, int]:
        """The node that ``ids`` lead to or towards, how many of them match, and how many of those lie on its edge.

        The last number is 0 where the whole edge matches.
        """
        node, depth = self._root, 0
        while depth < len(ids):
            below = node.children.get(int(ids[depth]))
            if below is None:
                break
            length = min(len(below.edge), len(ids) - depth)
            differ = np.flatnonzero(below.edge[:length] != ids[depth : depth + length])
            same = int(differ[0]) if len(differ) else length
            depth += same
            if same < len(below.edge):
                return below, depth, same
            node = below
        return node, depth, 0

    def _split(self, node: _Node[Value], at: int) -> _Node[Value]:
        """Put a node on the way to ``node``, behind ``at`` tokens of its edge."""
        assert node.parent is not None
        middle: _Node[Value] = _Node(node.edge[:at], node.parent)
        node.parent.children[int(node.edge[0])] = middle
        node.edge, node.parent = node.edge[at:], middle
        middle.children[int(node.edge[0])] = node
        return middle

    def _merge(self, node: _Node[Value]) -> None:
        """Take out a node without a value and with one child."""
        (child,) = node.children.values()
        assert node.parent is not None
        child.edge, child.parent = np.concatenate([node.edge, child.edge]), node.parent
        node.parent.children[int(child.edge[0])] = child
