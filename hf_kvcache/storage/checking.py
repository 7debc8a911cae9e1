"""Checks of tensors that are to be restored: they are made before anything is filled with the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_kvcache.storage.paged import PagedStorage

#: What files of earlier versions lack, and need not have.
_LATER = {"key_scale"}


def check_like(state: dict[str, torch.Tensor], empty: dict[str, torch.Tensor], optional: tuple[str, ...]) -> None:
    """Raise ValueError unless ``state`` has the names, dtypes and shapes that a layer saves.

    Args:
        state: tensors by name.
        empty: what an empty layer saves; a size of 0 there stands for any size.
        optional: beginnings of names that ``state`` may have besides.
    """
    missing, extra = sorted(set(empty) - set(state) - _LATER), sorted(set(state) - set(empty))
    extra = [name for name in extra if not name.startswith(optional)]
    if missing or extra:
        raise ValueError(f"no {missing[0]!r}" if missing else f"{extra[0]!r}, which such a layer does not have")
    for name, like in empty.items():
        found = state.get(name)
        if found is None:
            continue
        fits = found.dim() == like.dim() and all(b in (0, a) for a, b in zip(found.shape, like.shape, strict=True))
        if not fits or found.dtype != like.dtype:
            accepted = ["any" if size == 0 else size for size in like.shape]
            raise ValueError(
                f"{name!r} is {found.dtype} {list(found.shape)}; accepted: {like.dtype} "
                f"[{', '.join(map(str, accepted))}]"
            )


def check_storage(storage: PagedStorage, state: dict[str, torch.Tensor], seen: int) -> None:
    """Raise ValueError unless indices, counts and positions can be those of ``seen`` tokens."""
    size, pages = storage.page_size, len(state["records"])
    table, counts, first = (state[name] for name in ("table", "counts", "first"))
    used = table >= 0
    lengths, positions = state["dense.lengths"], state["dense.positions"]
    in_use = torch.arange(positions.shape[1], device="cpu") < lengths[:, None]
    ends = first + counts
    scattered, places = state["scattered"], state["positions"]
    for name, fits in {
        "table": table.shape == counts.shape == first.shape and bool(((table >= -1) & (table < pages)).all()),
        "counts": bool(((counts[used] > 0) & (counts[used] <= size)).all() and (counts[~used] == 0).all()),
        "first": bool((first[used] >= 0).all() and (ends[used] <= seen).all()),
        "scattered": len(scattered) == len(places) and bool(((scattered >= 0) & (scattered < pages)).all()),
        "positions": not len(places) or places.shape[1] == size,
        "ahead": 0 <= int(state["ahead"]) <= table.shape[1],
        "dense.values": state["dense.values"].shape[2] == state["dense.keys"].shape[2],
        "dense.lengths": bool(((lengths >= 0) & (lengths <= state["dense.keys"].shape[2])).all()),
        "dense.positions": positions.shape[1] == state["dense.keys"].shape[2]
        and bool(((positions >= 0) & (positions < seen))[in_use].all()),
    }.items():
        if not fits:
            raise ValueError(f"{name!r} holds what {seen} tokens cannot have, or does not go with the other tensors")
