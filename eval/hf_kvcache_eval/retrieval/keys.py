"""Keys that facts are filed under: a color and an animal."""

from __future__ import annotations

from random import Random

_FIRST = ("amber", "black", "blue", "brown", "golden", "green", "gray", "orange", "pink", "purple", "red", "white")
_SECOND = ("badger", "bear", "camel", "crow", "deer", "eagle", "falcon", "fox", "goat", "horse", "lion", "otter")


def draw_keys(rng: Random, count: int) -> list[str]:
    """``count`` keys that share no word."""
    return [f"{a}-{b}" for a, b in zip(rng.sample(_FIRST, count), rng.sample(_SECOND, count), strict=True)]


def draw_numbers(rng: Random, count: int, digits: int) -> list[str]:
    """``count`` different numbers of ``digits`` digits."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]
