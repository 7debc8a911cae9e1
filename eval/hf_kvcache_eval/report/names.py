"""What the names of caches and tasks say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_kvcache_eval.specs import parse

FULL = "full"
#: Methods that lose tokens without looking at them: what every method has to beat.
BASELINES = ("random", "window", "streaming")


def family(cache: str) -> str:
    """The cache's name without digits, budget, codec and options: what shares a color and a marker."""
    return re.sub(r"\d+", "", _name(cache)).strip("-_") or cache


def is_full(cache: str) -> bool:
    """Whether this is the reference: the full cache in the model's own dtype."""
    return cache == FULL


def is_noise_floor(cache: str) -> bool:
    """Whether this is the full cache in another dtype, whose loss is rounding and nothing else."""
    return cache != FULL and _name(cache) == FULL


def is_baseline(cache: str) -> bool:
    """Whether this method drops tokens blindly."""
    return _name(cache) in BASELINES


def kept_share(cache: str) -> tuple[str, float] | None:
    """What evicts, and the share of the tokens it keeps; None for caches without such a budget.

    A codec and options belong to the first: ``"snapkv@0.3+int4"`` is ``("snapkv+int4", 0.3)``.
    """
    try:
        spec = parse(cache)
    except ValueError:
        return None
    if spec.budget is None or spec.budget >= 1:
        return None
    return cache.replace(f"@{cache.partition('@')[2].partition('+')[0].partition(':')[0]}", "", 1), spec.budget


def reads_share(cache: str) -> bool:
    """Whether the share in the name is what a step reads, of tokens that all stay."""
    return _name(cache) == "sparse"


def keeps_dimensions(cache: str) -> bool:
    """Whether the share in the name is of the head dimension, with all tokens kept."""
    return _name(cache) == "latent"


def blind(cache: str) -> str:
    """The method that chooses at random what ``cache`` chooses, in the form of :func:`kept_share`."""
    if not reads_share(cache):
        return "random"
    if "selector=" not in cache:  # that of the cache by default
        name, _, options = cache.partition(":")
        return f"{name}:selector=random" + (f";{options}" if options else "")
    return re.sub(r"selector=[^;]*", "selector=random", cache)


@dataclass(frozen=True)
class TaskName:
    """A task's name in parts: ``base@length:variant``.

    Attributes:
        text: the whole name.
        base: what is asked.
        length: tokens of the context; None where the name says none.
        variant: behind the colon: ``"aware"`` where the question stands in the compressed context, ``"forced"`` where
            the answer is given; both as ``"aware:forced"``.
    """

    text: str
    base: str
    length: int | None = None
    variant: str = ""

    @classmethod
    def of(cls, text: str) -> TaskName:
        """The parts of ``text``; a name of another form is all base."""
        match = re.fullmatch(r"(?P<base>[^@:]+)@(?P<length>\d+)(?::(?P<variant>.+))?", text)
        if match is None:
            return cls(text, text)
        return cls(text, match["base"], int(match["length"]), match["variant"] or "")

    @property
    def aware(self) -> bool:
        """Whether the question stands in the compressed context."""
        return "aware" in self.variant.split(":")

    @property
    def order(self) -> tuple[str, str, int]:
        """Sorts lengths of one task together and by size."""
        return self.base, self.variant, self.length or 0


def _name(cache: str) -> str:
    try:
        return parse(cache).name
    except ValueError:  # a store may hold what this version cannot parse; it is still shown
        return cache
