"""Numbers of sequences as arguments of users."""

from __future__ import annotations

import numpy as np
import torch


def check_rows(argument: str, rows: torch.Tensor, batch: int) -> np.ndarray:
    """The numbers of sequences in ``rows`` as an array on the host, none negative.

    Args:
        argument: name of the user's argument, for errors.
        rows: numbers of sequences, or a bool mask ``[B]``.
        batch: how many sequences there are; -1 before the first update, when any numbers do.

    Raises:
        ValueError: if a number is not that of a sequence.
    """
    rows = torch.as_tensor(rows, device="cpu")
    if rows.dtype == torch.bool:
        rows = rows.nonzero().flatten()
    if rows.is_floating_point():
        raise ValueError(f"{argument}={rows.tolist()!r}: accepted: whole numbers or booleans")
    indices = rows.cpu().numpy().astype(np.int64)
    if batch < 0:
        return indices
    if indices.ndim != 1 or ((indices < -batch) | (indices >= batch)).any():
        raise ValueError(
            f"{argument}={indices.tolist()!r} is not a list of sequences of this cache; accepted: 0 to {batch - 1}"
        )
    return np.where(indices < 0, indices + batch, indices)
