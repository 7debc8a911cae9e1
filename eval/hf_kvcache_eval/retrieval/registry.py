"""Finding kinds of samples by name: a new kind is one file in ``kinds/`` whose function carries ``@register``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_kvcache.utils.registry import Registry
from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.sample import Sample

Make = Callable[[Place], Sample]


@dataclass(frozen=True)
class Kind:
    """A kind of sample.

    Attributes:
        name: in task names.
        make: makes one sample.
        what: one sentence for reports.
        literal: the answer is a continuation that is scored token by token, instead of strings that the output must
            contain.
    """

    name: str
    make: Make
    what: str
    literal: bool = False


_KINDS: Registry[Kind] = Registry("hf_kvcache_eval.retrieval.kinds")


def register(name: str, what: str, literal: bool = False) -> Callable[[Make], Make]:
    """Decorator: make a function known as the kind ``name``; arguments as in :class:`Kind`."""

    def decorate(make: Make) -> Make:
        _KINDS.add(name, Kind(name, make, what, literal))
        return make

    return decorate


def kinds() -> dict[str, Kind]:
    """Every kind that can be generated."""
    return _KINDS.all()
