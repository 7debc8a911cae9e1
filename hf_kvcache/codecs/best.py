"""The best measured codec of each width, one table for each use.

The README and the reports of the evaluation show the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A codec by name.

    Attributes:
        codec: its registered name, without bits.
        options: the options that it is made with, unless the user gives others.
        rotary: for latents, the codec of the rotary keys that are stored with them, with its bits; else None.
    """

    codec: str
    options: dict[str, Any] = field(default_factory=dict)
    rotary: str | None = None


#: Keys and values of a cache that evicts nothing: what ``codec="auto"`` stands for.
KEYS_AND_VALUES = {
    8: Choice("rotated"),
    4: Choice("unbiased"),
    3: Choice("unbiased"),
    2: Choice("unbiased"),
    1: Choice("unbiased"),
}

#: Keys and values of a cache that evicts. Every token has scales of its own, so that the tokens that are kept can move
#: between pages; scales that a page shares would leave holes. All of these codecs subtract a mean from the keys,
#: because a bias of the keys would take up the few levels that there are.
WITH_EVICTION = {
    8: Choice("rotated", {"key_axis": "token"}),
    4: Choice("rotated", {"key_axis": "token"}),
    3: Choice("rotated", {"key_axis": "token"}),
    2: Choice("turboquant", {"center": True}),
    1: Choice("turboquant", {"center": True}),
}

#: A model's own latents. The rotary keys are one in nine of the stored numbers, and only they decide how scores
#: depend on distance, so they get more bits.
LATENTS = {
    8: Choice("rotated", rotary="bf16"),
    4: Choice("rotated", rotary="int8"),
}
