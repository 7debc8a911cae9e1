"""Reading safetensors files of this package's own formats."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def load_file(path: str | Path, argument: str, kind: str, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file of one format.

    Args:
        path: of the file.
        argument: name of the argument that the path was given as, for error messages.
        kind: the format that the file's metadata has to name.
        what: what such a file holds, and who writes it, for error messages.

    Raises:
        ValueError: if the file is missing, or has another format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{argument}={str(path)!r} cannot be read: {error}") from error
    if metadata.get("format") != kind:
        raise ValueError(f"{argument}={str(path)!r} is no file of {what}")
    return tensors, metadata
