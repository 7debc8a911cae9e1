"""Reading and writing safetensors files of this package's own formats."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

#: Tensors begin at multiples of this many bytes, a cache line, where :func:`write_file` puts them.
_ALIGNMENT = 64
_PAD = "pad."
_DIGEST = "digest"
#: Bytes that are read at a time for the digest.
_BLOCK = 1 << 22
#: The longest header that is read, in bytes. The format itself has the same limit.
_HEADER_LIMIT = 100_000_000
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def load_file(path: str | Path, argument: str, kind: str, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file of one format.

    The tensors are parts of a private mapping of the file into memory: reading the file copies nothing, and writing to
    the tensors does not change the file.

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
            names = [name for name in file.keys() if not name.startswith(_PAD)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file, and has errors of its own
        raise ValueError(f"{argument}={str(path)!r} cannot be read: {error}") from error
    if metadata.get("format") != kind:
        raise ValueError(f"{argument}={str(path)!r} is no file of {what}")
    return tensors, metadata


def write_file(
    write: Callable[[memoryview], Any], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> int:
    """Write a safetensors file with a digest of all that is in it, each tensor at a multiple of 64 bytes.

    Args:
        write: is called with one part of the file after another.
        tensors: by name; those on another device are copied to the host one at a time.
        metadata: strings by name.

    Returns:
        The number of bytes written.
    """
    fields, size = _fields(tensors)
    digest = _header_digest(fields, metadata)
    for name in fields:
        digest.update(_content(name, fields, tensors))
    header = _header(fields, metadata, digest.hexdigest())
    write(memoryview(header))
    for name in fields:
        write(_content(name, fields, tensors))
    return len(header) + size


def file_size(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """The number of bytes that :func:`write_file` writes."""
    fields, size = _fields(tensors)
    return len(_header(fields, metadata, hashlib.sha256().hexdigest())) + size


def _fields(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, dict[str, Any]], int]:
    """What the header says of each tensor and of the gaps between them, and the number of bytes behind the header."""
    fields: dict[str, dict[str, Any]] = {}
    size = 0

    def add(name: str, dtype: str, shape: list[int], count: int) -> None:
        nonlocal size
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + count]}
        size += count

    for name, tensor in tensors.items():
        add(name, _DTYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size())
        if gap := -size % _ALIGNMENT:
            add(f"{_PAD}{len(fields)}", "U8", [gap], gap)
    return fields, size


def _header(fields: Mapping[str, Any], metadata: Mapping[str, str], digest: str) -> bytes:
    header = json.dumps({"__metadata__": {**metadata, _DIGEST: digest}, **fields}).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The fields and the metadata in the header of a safetensors file, and the length of the header in bytes.

    Raises:
        ValueError: if the file has no such header.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_LIMIT, os.fstat(file.fileno()).st_size):
            raise ValueError(f"{str(path)!r} is no safetensors file, or truncated")
        try:
            fields = json.loads(file.read(length))
            metadata = fields.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise TypeError
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} has no readable header") from error
    return fields, metadata, 8 + length


def check_digest(path: str | os.PathLike[str], argument: str) -> None:
    """Raise ValueError unless the content of a file that :func:`write_file` wrote is what was written.

    Args:
        path: of the file.
        argument: name of the argument that the path was given as, for error messages.
    """
    try:
        fields, metadata, start = read_header(path)
        written = metadata.pop(_DIGEST, None)
        digest = _header_digest(fields, metadata)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            block = memoryview(bytearray(_BLOCK))
            while count := file.readinto(block):
                digest.update(block[:count])
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}={str(path)!r} cannot be read: {error}") from error
    if written != digest.hexdigest():
        raise ValueError(
            f"{argument}={str(path)!r} is damaged: its content has the SHA-256 digest {digest.hexdigest()[:16]}..., "
            f"written was {str(written)[:16]}..."
        )


def _header_digest(fields: Mapping[str, Any], metadata: Mapping[str, str]) -> Any:
    return hashlib.sha256(json.dumps([fields, metadata], sort_keys=True).encode())


def _content(name: str, fields: Mapping[str, dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> memoryview:
    """The bytes of one field."""
    if name not in tensors:
        return memoryview(bytes(fields[name]["shape"][0]))
    flat = tensors[name].detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    if flat.stride(0) != 1:  # a single element may have any stride
        flat = flat.clone()
    return flat.view(torch.uint8).numpy().data
