"""Kascade (arXiv:2512.16391): a few anchor layers attend to everything, and the layers behind read what they chose."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from hf_kvcache.sparse.anchors import check_anchors, read_anchors
from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.registry import register
from hf_kvcache.utils.validation import whole


@register("kascade")
class Kascade(Selector):
    """The pages with the largest attention probabilities in an anchor layer, for this layer and those behind it.

    An anchor layer reads everything. The layers up to the next anchor read the pages that it chose, head by head.

    Args:
        anchors: numbers of the anchor layers in the model, ascending; or a file that
            :func:`~hf_kvcache.sparse.anchors.write_anchors` wrote. None takes the first layer that is not dense, and
            every ``spacing``-th one after it.
        spacing: distance of the anchors where they are not given.
    """

    exact = True
    shared = True

    def __init__(self, anchors: Sequence[int] | str | PathLike[str] | None = None, spacing: int = 6) -> None:
        self.spacing = whole("spacing", spacing, 1)
        if isinstance(anchors, str | PathLike):
            anchors = read_anchors(anchors)
        self.anchors = None if anchors is None else check_anchors(anchors)

    def leaders(self, sparse: Sequence[int]) -> dict[int, int]:
        """For each of the layers ``sparse``, ascending, the anchor whose choice it reads; an anchor is its own.

        Raises:
            ValueError: if an anchor is none of these layers, or the first of them has no anchor before it.
        """
        anchors = list(sparse)[:: self.spacing] if self.anchors is None else list(self.anchors)
        unknown = [anchor for anchor in anchors if anchor not in sparse]
        if unknown or (sparse and anchors[0] != sparse[0]):
            raise ValueError(
                f"anchors={anchors!r}; accepted: some of the layers {list(sparse)}, which are not dense and have no "
                "sliding window, the first of them among these"
            )
        return {layer: max(anchor for anchor in anchors if anchor <= layer) for layer in sparse}
