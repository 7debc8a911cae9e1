"""Which layers choose pages for the layers behind them: numbers in a small file, and how they are found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

_KIND = "hf_kvcache anchors"


def check_anchors(anchors: Any) -> tuple[int, ...]:
    """``anchors`` as a tuple; raises ValueError unless they are ascending numbers of layers, at least one."""
    found = list(anchors) if isinstance(anchors, Sequence) and not isinstance(anchors, str) else []
    whole = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in found)
    if not found or not whole or sorted(set(found)) != found:
        raise ValueError(f"anchors={anchors!r}; accepted: numbers of layers, ascending, at least one")
    return tuple(found)


def write_anchors(path: str | PathLike[str], anchors: Sequence[int], about: dict[str, Any] | None = None) -> None:
    """Write anchors to a file.

    Args:
        path: of the file, which is replaced.
        anchors: numbers of layers, ascending.
        about: how they were found, as values for JSON.
    """
    described = {"kind": _KIND, "anchors": list(check_anchors(anchors)), "about": about or {}}
    Path(path).write_text(json.dumps(described, indent=1) + "\n")


def read_anchors(path: str | PathLike[str]) -> tuple[int, ...]:
    """The anchors in a file of :func:`write_anchors`; raises ValueError for any other file."""
    try:
        described = json.loads(Path(path).read_text())
        if described["kind"] != _KIND:
            raise KeyError("kind")
        return check_anchors(described["anchors"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"anchors={str(path)!r} is no file of anchors ({error}); see docs/sparse.md") from error


def choose_anchors(overlap: torch.Tensor, count: int, first: int = 0) -> tuple[int, ...]:
    """The layers whose choices serve the layers behind them best, by dynamic programming.

    Args:
        overlap: ``[L, L]``: at ``[a, l]`` how much of the attention of layer ``l`` the pages hold that layer ``a``
            picks.
        count: number of anchors.
        first: the first layer that is not dense; it is the first anchor.

    Returns:
        The anchors, ascending, with the largest sum over the layers of the overlap with their anchor.
    """
    layers = overlap.shape[0]
    if not 1 <= count <= layers - first:
        raise ValueError(f"count={count!r}; accepted: 1 to {layers - first}, the layers that are not dense")
    # gain[a, s]: the overlap of the layers a .. s - 1 with anchor a.
    gain = torch.zeros(layers, layers + 1, dtype=torch.float64, device="cpu")
    gain[:, 1:] = overlap.double().triu().cumsum(1)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
        (first, 1): (0.0, (first,))
    }  # by the latest anchor and how many there are: the gain before it
    for latest in range(first + 1, layers):
        for used in range(2, count + 1):
            before = [
                (total + float(gain[anchor, latest]), chosen)
                for (anchor, number), (total, chosen) in best.items()
                if number == used - 1 and anchor < latest
            ]
            if before:
                total, chosen = max(before)
                best[latest, used] = total, (*chosen, latest)
    ends = [(total + float(gain[a, layers]), chosen) for (a, used), (total, chosen) in best.items() if used == count]
    return max(ends)[1]
