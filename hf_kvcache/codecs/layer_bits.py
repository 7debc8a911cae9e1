"""Widths by layer: what a user gives as ``bits=`` for mixed precision, and the file that a calibration writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from hf_kvcache.codecs.best import KEYS_AND_VALUES

_FORMAT = "hf_kvcache bits 1"
_SIDES = {"keys", "values"}
_ACCEPTED = (
    "a width, {'keys': 8, 'values': 4}, {'layers': {0: 8, '1-3': 4}, 'default': 2}, a list with one of these for each "
    "layer of the model, or a file of `hf-kvcache calibrate --method bits`"
)


class Widths(NamedTuple):
    """Bits of the keys and of the values of a layer."""

    keys: int
    values: int

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments of a cache or codec."""
        return {"bits": self.keys} if self.keys == self.values else {"key_bits": self.keys, "value_bits": self.values}


@dataclass(frozen=True)
class LayerBits:
    """Widths for the layers of one model, as a calibration found them.

    Attributes:
        layers: the widths by the index of the layer in the model; only layers that store keys and values.
        fingerprint: what the model's config says of the model.
        measured: figures of the calibration by name.
    """

    layers: dict[int, Widths]
    fingerprint: dict[str, Any] = field(repr=False)
    measured: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file, which ``bits=`` takes."""
        about = asdict(self) | {"format": _FORMAT}
        about["layers"] = {index: widths._asdict() for index, widths in self.layers.items()}
        Path(path).write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerBits:
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: if the file is missing, is of another kind, or lacks a part.
        """
        accepted = "accepted: what LayerBits.save() and `hf-kvcache calibrate --method bits` write"
        try:
            about = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"bits={str(path)!r} cannot be read: {error}; {accepted}") from error
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise ValueError(f"bits={str(path)!r} is no file of bits; {accepted}")
        try:
            layers = {int(index): Widths(**widths) for index, widths in about["layers"].items()}
            return cls(layers, about["fingerprint"], about["measured"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"bits={str(path)!r} is damaged: {error}; {accepted}") from error


#: What caches take as ``bits=``.
Bits = int | str | PathLike[str] | Mapping[str, Any] | Sequence[Any] | LayerBits


def widths_by_layer(bits: Any, count: int, storing: Collection[int]) -> dict[int, Widths]:
    """The widths of each layer that stores keys and values, by its index in the model.

    Args:
        bits: the argument of a cache, other than one width; a file has been read.
        count: number of layers of the model.
        storing: indices of those that store keys and values.

    Raises:
        ValueError: for an index that is not in ``storing``, a layer without a width, or a width that does not exist.
    """
    if isinstance(bits, LayerBits):
        bits = {"layers": bits.layers}
    if isinstance(bits, Mapping):
        if set(bits) == _SIDES:
            return dict.fromkeys(sorted(storing), _widths("bits", bits))
        return _of_mapping(bits, count, storing)
    if not isinstance(bits, Sequence) or isinstance(bits, str):
        raise ValueError(f"bits={bits!r}; accepted: {_ACCEPTED}")
    if len(bits) != count:
        raise ValueError(f"bits= has {len(bits)} entries; accepted: {count}, one for each layer of the model")
    given = {index: entry for index, entry in enumerate(bits) if entry is not None}
    for index in given:
        if index not in storing:
            raise ValueError(f"bits[{index}]={bits[index]!r}: the layer stores no keys and values; accepted: None")
    _refuse_missing(set(storing) - set(given))
    return {index: _widths(f"bits[{index}]", entry) for index, entry in given.items()}


def model_layer(name: str, index: Any, count: int, storing: Collection[int]) -> int:
    """``index`` from the start of the model, where a negative one counts from its end.

    Raises:
        ValueError: if the model has no such layer, or it stores no keys and values.
    """
    if isinstance(index, bool) or not isinstance(index, Integral) or not -count <= int(index) < count:
        raise ValueError(f"{name}: layer {index!r}; accepted: whole numbers from {-count} to {count - 1}")
    found = int(index) % count
    if found not in storing:
        raise ValueError(
            f"{name}: layer {index!r} stores no keys and values of its own; accepted: {shown(storing)}, or the same "
            f"minus {count}"
        )
    return found


def shown(layers: Collection[int]) -> str:
    """Indices as ranges: ``"0-3, 7"``."""
    ranges: list[list[int]] = []
    for index in sorted(layers):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _of_mapping(bits: Mapping[str, Any], count: int, storing: Collection[int]) -> dict[int, Widths]:
    given = bits.get("layers", {})
    if set(bits) - {"layers", "default"} or not isinstance(given, Mapping):
        raise ValueError(f"bits={bits!r}; accepted: {_ACCEPTED}")
    found: dict[int, Widths] = {}
    for name, entry in given.items():
        widths = _widths(f"bits['layers'][{name!r}]", entry)
        for index in _indices(name, count, storing):
            if index in found:
                raise ValueError(f"bits['layers'][{name!r}]: layer {index} has widths already; accepted: one entry")
            found[index] = widths
    rest = set(storing) - set(found)
    if "default" in bits:
        found |= dict.fromkeys(rest, _widths("bits['default']", bits["default"]))
    else:
        _refuse_missing(rest)
    return dict(sorted(found.items()))


def _indices(name: Any, count: int, storing: Collection[int]) -> list[int]:
    """The layers of ``3``, ``-1``, ``"3"`` or ``"1-3"``; a range leaves out those that store nothing."""
    where = f"bits['layers'][{name!r}]"
    if not isinstance(name, str):
        return [model_layer(where, name, count, storing)]
    parts = name.split("-")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        first, last = (int(part) for part in parts)
        inside = [index for index in range(first, last + 1) if index in storing] if last < count else []
        if not inside:
            raise ValueError(f"{where} names no layer that stores keys and values; accepted: parts of {shown(storing)}")
        return inside
    if not name.removeprefix("-").isdecimal():
        raise ValueError(f"{where}; accepted: a layer (0, -1), or a range ('1-3')")
    return [model_layer(where, int(name), count, storing)]


def _refuse_missing(layers: Collection[int]) -> None:
    if layers:
        raise ValueError(f"bits= says nothing of layers {shown(layers)}; accepted: a width for each, or a 'default'")


def _widths(name: str, entry: Any) -> Widths:
    """One width for both sides, or one for each."""
    sides = entry if isinstance(entry, Mapping | Widths) else {"keys": entry, "values": entry}
    if isinstance(sides, Widths):
        sides = sides._asdict()
    if set(sides) != _SIDES:
        raise ValueError(f"{name}={entry!r}; accepted: a width, or {{'keys': a width, 'values': a width}}")
    for width in sides.values():
        if isinstance(width, bool) or not isinstance(width, int) or width not in KEYS_AND_VALUES:
            raise ValueError(f"{name}={entry!r}; accepted: widths of {sorted(KEYS_AND_VALUES)}")
    return Widths(sides["keys"], sides["values"])
