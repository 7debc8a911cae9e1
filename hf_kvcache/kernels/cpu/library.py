"""Loads the compiled CPU kernels and mirrors their C structs (``src/api.h``)."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint8, c_void_p
from functools import lru_cache
from pathlib import Path

from hf_kvcache.kernels.cpu.build import LIBRARY

ABI_VERSION = 20
#: Environment variable that names another library file (a sanitizer build).
VARIABLE = "HF_KVCACHE_NATIVE_LIBRARY"
#: Environment variable that names the instruction set to use in place of the best one.
ISA_VARIABLE = "HF_KVCACHE_ISA"
#: All instruction sets that kernels are written for, best first.
ISAS = ("avx512-amx", "avx512-vnni", "avx2", "neon-i8mm", "neon-dotprod", "portable")


class Side(Structure):
    """``HfkvSide``."""

    _fields_ = (
        *((name, c_int32) for name in ("dim", "bits", "level", "axis", "group", "has_zero", "has_other", "offset")),
        ("step", c_float),
        ("levels", c_uint8 * 64),
        *((name, c_int64) for name in ("codes", "scale", "zero", "other")),
        ("rotation", c_int32),
        ("matrix", c_void_p),
        ("signs", c_void_p),
    )


class Layout(Structure):
    """``HfkvLayout``."""

    _fields_ = (
        ("keys", Side),
        ("values", Side),
        ("page_size", c_int32),
        ("record_bytes", c_int64),
        ("bias", c_int64),
    )


class Token(Structure):
    """``HfkvToken``."""

    _fields_ = (
        *((name, c_void_p) for name in ("first", "second")),
        *((name, c_int64) for name in ("first_batch", "first_head", "first_token")),
        *((name, c_int64) for name in ("second_batch", "second_head", "second_token")),
        ("positions", c_void_p),
        ("positions_batch", c_int64),
        ("lengths", c_void_p),
        *((name, c_int32) for name in ("count", "ragged")),
    )


class Attend(Structure):
    """``HfkvAttend``."""

    _fields_ = (
        ("layout", POINTER(Layout)),
        ("query", c_void_p),
        *((name, c_int64) for name in ("query_batch", "query_head", "query_token")),
        *((name, c_void_p) for name in ("output", "log_sum_exp")),
        *((name, c_int32) for name in ("batch", "query_heads", "heads", "length")),
        *((name, c_void_p) for name in ("addresses", "counts", "first", "positions")),
        ("row_stride", c_int64),
        ("columns", c_int32),
        *((name, c_void_p) for name in ("key_mean", "key_scale")),
        *((name, c_void_p) for name in ("dense_keys", "dense_values")),
        *((name, c_int32) for name in ("dense_level", "slots")),
        *((name, c_int64) for name in ("keys_batch", "keys_head", "keys_token")),
        *((name, c_int64) for name in ("values_batch", "values_head", "values_token")),
        *((name, c_void_p) for name in ("dense_positions", "dense_unused")),
        *((name, c_int64) for name in ("positions_batch", "unused_batch")),
        ("token", Token),
        *((name, c_int64) for name in ("start", "window")),
        ("causal", c_int32),
        *((name, c_float) for name in ("inner_scale", "softcap")),
        *((name, c_void_p) for name in ("sink_logits", "page_sums", "dense_sums")),
        ("threads", c_int32),
    )


class Latent(Structure):
    """``HfkvLatent``."""

    _fields_ = (
        ("layout", POINTER(Layout)),
        ("query", c_void_p),
        ("query_level", c_int32),
        *((name, c_int64) for name in ("query_batch", "query_head", "query_token")),
        *((name, c_void_p) for name in ("output", "log_sum_exp")),
        *((name, c_int32) for name in ("batch", "heads", "length")),
        *((name, c_void_p) for name in ("addresses", "counts", "first", "positions")),
        ("row_stride", c_int64),
        ("columns", c_int32),
        *((name, c_void_p) for name in ("dense_latents", "dense_rotary")),
        *((name, c_int32) for name in ("dense_level", "slots")),
        *((name, c_int64) for name in ("latents_batch", "latents_token", "rotary_batch", "rotary_token")),
        *((name, c_void_p) for name in ("dense_positions", "dense_unused")),
        *((name, c_int64) for name in ("positions_batch", "unused_batch")),
        ("token", Token),
        *((name, c_int64) for name in ("start", "window")),
        ("causal", c_int32),
        ("mask", c_void_p),
        *((name, c_int64) for name in ("mask_batch", "mask_head", "mask_query", "mask_start", "mask_width")),
        *((name, c_float) for name in ("inner_scale", "softcap")),
        ("sink_logits", c_void_p),
        ("threads", c_int32),
    )


class LatentPicked(Structure):
    """``HfkvLatentPicked``."""

    _fields_ = (("attend", Latent), ("places", c_void_p), ("count", c_int64), ("queries", c_int32))


class Project(Structure):
    """``HfkvProject``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "out")),
        *((name, c_int32) for name in ("level", "transposed", "batch", "heads", "length", "n", "width")),
        *((name, c_int64) for name in ("x_batch", "x_head", "x_token", "out_batch", "out_head", "out_token")),
        *((name, c_int64) for name in ("weight_head", "weight_row")),
        ("threads", c_int32),
    )


class LatentCall(Structure):
    """``HfkvLatentStep``: the projections and the attention of one decode step."""

    _fields_ = (("absorb", Project), ("attend", Latent), ("expand", Project))


class Choose(Structure):
    """``HfkvChoose``."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "codes", "scales", "limits", "missing", "chosen")),
        *((name, c_void_p) for name in ("addresses", "first", "counts", "table", "table_counts", "sinks")),
        *(
            (name, c_int64)
            for name in ("query_batch", "query_head", "codes_row", "scales_row", "missing_row", "table_row")
        ),
        *((name, c_int32) for name in ("rows", "heads", "queries", "width", "vectors", "columns", "spans", "count")),
        ("size_weights", c_float * 2),
        *((name, c_float) for name in ("scaling", "reach", "part_log")),
        *((name, c_int32) for name in ("sink_count", "band", "shared", "threads")),
    )


class Grid(Structure):
    """``HfkvGrid``."""

    _fields_ = (("count", c_int32), ("levels", c_float * 16), ("edges", c_float * 16))


class Vectors(Structure):
    """``HfkvVectors``."""

    _fields_ = (("at", c_void_p), *((name, c_int64) for name in ("batch", "head", "token")))


class EncodeSide(Structure):
    """``HfkvEncodeSide``."""

    _fields_ = (("method", c_int32), ("grid", Grid), ("x", Vectors))


class Encode(Structure):
    """``HfkvEncode``."""

    _fields_ = (
        ("layout", POINTER(Layout)),
        ("keys", EncodeSide),
        ("values", EncodeSide),
        *((name, c_int32) for name in ("level", "heads", "rows")),
        ("pages", c_int64),
        *((name, c_void_p) for name in ("key_mean", "key_scale", "addresses")),
        ("threads", c_int32),
    )


class KeyMean(Structure):
    """``HfkvKeyMean``."""

    _fields_ = (
        ("layout", POINTER(Layout)),
        ("keys", Vectors),
        *((name, c_int32) for name in ("level", "batch", "heads")),
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("key_scale", "mean")),
        ("threads", c_int32),
    )


class KeyScale(Structure):
    """``HfkvKeyScale``."""

    _fields_ = (
        *((name, Vectors) for name in ("query", "keys")),
        *((name, c_int32) for name in ("level", "batch", "query_heads", "heads", "dim")),
        ("tokens", c_int64),
        ("scale", c_void_p),
        ("threads", c_int32),
    )


#: The functions that take one struct and return whether memory ran out.
_CALLS: dict[str, type[Structure]] = {
    "hfkv_attend": Attend,
    "hfkv_latent_attend": Latent,
    "hfkv_project": Project,
    "hfkv_latent_step": LatentCall,
    "hfkv_attend_picked": LatentPicked,
    "hfkv_encode": Encode,
    "hfkv_key_mean": KeyMean,
    "hfkv_key_scale": KeyScale,
    "hfkv_choose": Choose,
}


def load() -> ctypes.CDLL:
    """The library.

    Raises:
        OSError: if there is none, or it cannot be loaded.
        ValueError: if ``HF_KVCACHE_ISA`` names an instruction set that this machine lacks.
    """
    library, reason = _load()
    if library is None:
        raise OSError(reason)
    return library


def reason_missing() -> str | None:
    """Why there is no library; None if there is one."""
    return _load()[1]


def isa() -> str:
    """The instruction set in use: ``"portable"``; ``"avx2"``, ``"avx512-vnni"`` or ``"avx512-amx"`` on x86-64;
    ``"neon-dotprod"`` or ``"neon-i8mm"`` on ARM.
    """
    return load().hfkv_isa().decode()


def set_isa(name: str) -> None:
    """Use another instruction set (for tests and benchmarks).

    Raises:
        ValueError: if this CPU lacks it or it was not compiled.
    """
    if load().hfkv_set_isa(name.encode()):
        raise ValueError(f"name={name!r} is not available here; accepted: {', '.join(available_isas())}")


def available_isas() -> list[str]:
    """The instruction sets that can be used here, best first."""
    return _available(load())


def _available(library: ctypes.CDLL) -> list[str]:
    current = library.hfkv_isa()
    names = [name for name in ISAS if library.hfkv_set_isa(name.encode()) == 0]
    library.hfkv_set_isa(current)
    return names


def _use_forced(library: ctypes.CDLL) -> None:
    """Use the instruction set that the environment names; raises ValueError if it cannot be used here."""
    name = os.environ.get(ISA_VARIABLE, "")
    if name and library.hfkv_set_isa(name.encode(errors="replace")):
        raise ValueError(
            f"{ISA_VARIABLE}={name!r}; accepted: {', '.join(ISAS)}; this machine has {', '.join(_available(library))}"
        )


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = Path(os.environ.get(VARIABLE) or LIBRARY)
    if not path.exists():
        if VARIABLE in os.environ:
            return None, f"{VARIABLE} names {path.name}, which does not exist"
        return None, f"{path.name} was not built: no C++ compiler when the package was installed"
    try:
        library = _open(path)
    except OSError as error:
        return None, str(error)
    if not hasattr(library, "hfkv_abi_version"):
        return None, f"{path.name} is no library of this package's kernels"
    library.hfkv_abi_version.restype = c_int32
    if library.hfkv_abi_version() != ABI_VERSION:
        return None, f"{path.name} has ABI {library.hfkv_abi_version()}, this package wants {ABI_VERSION}: rebuild it"
    library.hfkv_isa.restype = c_char_p
    library.hfkv_set_isa.argtypes = [c_char_p]
    for name, call in _CALLS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [POINTER(call)], c_int32
    library.hfkv_decode_side.argtypes = [POINTER(Layout), c_int32, c_void_p, c_int64, c_void_p, c_int32]
    library.hfkv_decode_side.restype = None
    _use_forced(library)
    return library, None


def _open(path: Path) -> ctypes.CDLL:
    import torch  # noqa: F401  brings the OpenMP runtime into the process, whose symbols the library looks up

    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A torch that keeps its OpenMP to itself, or has none: then the system's.
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
