"""Specializations of the encoding kernel for the compile report."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton.encode_side import EncodedSide, describe
from hf_kvcache.kernels.triton.key_mean import EVENTS

_PAGE = 128
_STRIDES = tuple(f"{side}_{stride}" for side in ("keys", "values") for stride in ("sequence", "head", "token"))
_ROTATIONS = ("key_signs", "key_factors", "value_signs", "value_factors")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

#: Codecs, widths of keys and of values, and dtypes: the defaults first.
CASES: tuple[tuple[str, int, int, torch.dtype], ...] = (
    ("unbiased4", 128, 128, torch.bfloat16),
    ("rotated8", 128, 128, torch.bfloat16),
    ("unbiased3", 80, 80, torch.bfloat16),
    ("unbiased2", 64, 64, torch.bfloat16),
    ("kvarn4", 128, 128, torch.bfloat16),
    ("int4", 128, 128, torch.bfloat16),
    ("latent4", 512, 64, torch.bfloat16),
    ("none", 128, 128, torch.bfloat16),
)


def waived(codec: str, dim: int, arch: str) -> dict[str, str]:
    """What the report lets pass: packing is a small part of the time, so a few spills there cost little."""
    if (codec, dim, arch) == ("unbiased3", 80, "sm100"):
        return {"spills": "4 instructions, at a width that is padded to 128"}
    if (codec, dim) == ("unbiased4", 128) and arch not in ("sm90", "gfx942"):
        return {"spills": "2 to 14 of 8,000 instructions, since keys are scaled"}
    return {}


def formats(codec: str, dims: tuple[int, int]) -> tuple[SideFormat, SideFormat, tuple[str, str]]:
    """The formats of both sides of a codec's pages and the methods. Where there is a table, its levels are made up."""
    name, bits = codec[:-1], int(codec[-1]) if codec[-1].isdigit() else 16
    key_dim, value_dim = dims
    table = tuple(i + 0.5 - 2**bits / 2 for i in range(2**bits)) if name == "unbiased" else ()
    dense = SideFormat(value_dim, 16, level="dense", zero=False, dense_dtype=torch.bfloat16)
    if codec == "none":
        return dense, dense, ("dense", "dense")
    if name == "latent":
        return SideFormat(key_dim, bits, group=64, rotation="hadamard"), dense, ("integer", "dense")
    if name == "unbiased":
        keys = SideFormat(key_dim, bits, "table", "channel", _PAGE, True, True, "hadamard", True, table, balanced=True)
        values = SideFormat(
            value_dim, bits, "table", group=value_dim, zero=False, rotation="signed_hadamard", table=table
        )
        return keys, values, ("unbiased_keys", "unbiased_values")
    other, method = name == "kvarn", "kvarn" if name == "kvarn" else "integer"
    rotation: Any = "none" if name == "int" else "hadamard"
    return (
        SideFormat(key_dim, bits, axis="channel", group=_PAGE, other=other, rotation=rotation),
        SideFormat(value_dim, bits, group=value_dim, other=other, rotation=rotation),
        (method, method),
    )


def described(
    codec: str, dims: tuple[int, int], dtype: torch.dtype, architecture: str
) -> tuple[EncodedSide, EncodedSide]:
    """The descriptions of both sides of a case."""
    keys, values, methods = formats(codec, dims)
    layout = PageLayout(keys, values, _PAGE)
    made = [
        describe(layout, side, method, dtype, architecture) for side, method in zip(layout.sides, methods, strict=True)
    ]
    return made[0], made[1]


def arguments(
    keys: EncodedSide, values: EncodedSide, dtype: torch.dtype, due: bool = False
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of the arguments of a case; ``due`` if events on the device say which pages are encoded."""
    element = f"*{_NAMES[dtype]}"
    signature = {"keys": element, "values": element, **dict.fromkeys(_STRIDES, "i32"), "records": "*u8"}
    signature |= dict.fromkeys(("stride", "count", "rows", "heads", "capacity"), "i32")
    constants: dict[str, Any] = {"KEYS": keys, "VALUES": values, "ADDRESSES": False, "EVENTS": EVENTS if due else 0}
    if due:
        signature |= dict.fromkeys(("events", "places"), "*i64")
    else:
        constants |= dict.fromkeys(("events", "places"))
    for name, side in zip(_ROTATIONS, (keys, keys, values, values), strict=True):
        if side.rotated:
            signature[name] = "*bf16" if name.endswith("signs") else "*fp32"
        else:
            constants[name] = None
    if keys.centered:
        signature["key_mean"] = "*fp32"
        signature["key_scale"] = "*fp32"
    else:
        constants["key_mean"] = None
        constants["key_scale"] = None
    return signature, constants


def aligned(signature: dict[str, str]) -> tuple[str, ...]:
    """The arguments that are multiples of 16."""
    return tuple(name for name, kind in signature.items() if kind.startswith("*") or name in (*_STRIDES, "stride"))
