"""The ways between host and device that storage and eviction use, so that they can be counted.

A read-back waits until the device has finished all that was asked of it before. An upload does not: it is not blocking.
"""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels.device_table import to_device as to_device


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """``tensor`` as an array, once the device has computed it. On a CPU it shares the tensor's memory."""
    return tensor.cpu().numpy()


def rows_of(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """The sequences ``rows`` of ``tensor [B, ...]``: itself if these are all, in order; else a view or a copy."""
    if is_run(rows):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        return tensor if stop - start == tensor.shape[0] else tensor[start:stop]
    return tensor[to_device(rows, tensor.device)]


def tokens_of(x: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    """``x [b, h, n, ...]`` at the ascending ``tokens`` of its third axis: a view if these are a run."""
    if is_run(tokens):
        return x[:, :, int(tokens[0]) : int(tokens[-1]) + 1]
    return x[:, :, to_device(tokens, x.device)]


def is_run(numbers: np.ndarray) -> bool:
    """Whether ``numbers [n]`` are some in a row, ascending by one."""
    count = len(numbers)
    if count == 1:
        return True  # the rows of a single sequence, asked for often
    return count > 0 and int(numbers[-1]) - int(numbers[0]) == count - 1 and bool((np.diff(numbers) == 1).all())


def ascending_on(device: torch.device, numbers: np.ndarray) -> torch.Tensor:
    """int64 ``numbers [b, n]``, ascending in every row, on ``device``; without an upload if all rows are one run."""
    rows, count = numbers.shape
    if rows and count:
        first, last = int(numbers[0, 0]), int(numbers[0, -1])
        if last - first == count - 1 and (numbers[:, [0, -1]] == [first, last]).all():
            return torch.arange(first, last + 1, device=device).expand(rows, -1)
    return to_device(numbers, device)


def front(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where the True of ``mask [..., n]`` stand, in their order, int64 ``[..., count]``; zeros behind the last of them.

    ``count`` is at least the number of True in any row. Unlike ``nonzero``, this does not wait for the device.
    """
    # One place more, the first, takes all that is False.
    places = torch.zeros(*mask.shape[:-1], count + 1, dtype=torch.int64, device=mask.device)
    number = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    places.scatter_(-1, mask.cumsum(-1) * mask, number)
    return places[..., 1:]
