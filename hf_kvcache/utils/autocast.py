"""Autocast, where a device has it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context without autocast, which would round what is packed before the codec does, and scores of tokens."""
    # The meta device computes nothing, and torch has no autocast for it. Entering a context takes time: once a page.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
