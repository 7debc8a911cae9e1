"""Cache specs: one word that names a cache and its setting, for command lines and file names.

    full    unbiased4    rotated4:key_axis=token;group_size=64    random@0.3    window@8    hqq4    full:dtype=bfloat16
    kvpress:snapkv@0.25

``name[@budget][+codec][:option=value;option=value]``: a budget below 1 is a share of the tokens, from 1 on a number of
tokens. ``kvpress:`` in front of a name is part of it: another library's method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_SPEC = re.compile(
    r"(?P<name>(?:kvpress:)?[A-Za-z][\w-]*)(?:@(?P<budget>[\d.]+))?(?:\+(?P<codec>[a-z]+\d*))?(?::(?P<options>.+))?"
)

Value = int | float | bool | str


@dataclass(frozen=True)
class CacheSpec:
    """A parsed spec.

    Attributes:
        text: as it was written.
        name: the cache.
        budget: share (below 1) or number of the tokens to keep; None where the cache keeps all.
        codec: how what is kept is stored, where the name does not say it.
        options: further arguments of the cache.
    """

    text: str
    name: str
    budget: float | int | None = None
    codec: str | None = None
    options: dict[str, Value] = field(default_factory=dict, hash=False)

    @property
    def slug(self) -> str:
        """The spec as part of a file name."""
        return re.sub(r"[^\w@.=+-]", "_", self.text)


def parse(text: str) -> CacheSpec:
    """Parse one spec; ValueError names what is wrong with it."""
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cache={text!r}; accepted: name[@budget][+codec][:option=value;option=value]")
    budget = _budget(text, match["budget"]) if match["budget"] else None
    return CacheSpec(text.strip(), match["name"], budget, match["codec"], _options(text, match["options"] or ""))


def split(text: str) -> list[str]:
    """The specs of a list that is separated by commas or spaces, each once; they are not parsed yet.

    Raises:
        ValueError: if there is none.
    """
    words = list(dict.fromkeys(word for word in re.split(r"[,\s]+", text) if word))
    if not words:
        raise ValueError(f"caches={text!r}; accepted: at least one cache spec")
    return words


def value(text: str) -> Value:
    """``"4" -> 4``, ``"0.5" -> 0.5``, ``"true" -> True``, anything else stays a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _budget(text: str, budget: str) -> float | int:
    try:
        number = float(budget)
    except ValueError:
        raise ValueError(f"budget={budget!r} of cache={text!r} is not a number") from None
    if number <= 0 or (number >= 1 and number != int(number)):
        raise ValueError(f"budget={budget!r} of cache={text!r}; accepted: a share below 1, or a whole number of tokens")
    return number if number < 1 else int(number)


def _options(text: str, options: str) -> dict[str, Value]:
    pairs: Iterable[str] = (option for option in options.split(";") if option)
    parsed: dict[str, Value] = {}
    for pair in pairs:
        name, equals, raw = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option {pair!r} of cache={text!r}; accepted: name=value")
        parsed[name] = value(raw)
    return parsed
