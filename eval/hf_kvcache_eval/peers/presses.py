"""The methods of kvpress that can be measured, by the names of this package's policies."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_kvcache_eval.specs import CacheSpec

#: In front of a method's name in cache specs.
PREFIX = "kvpress:"
#: kvpress's classes and the arguments that make them the method of that name.
PRESSES: dict[str, tuple[str, dict[str, bool]]] = {
    "compactor": ("CompactorPress", {}),
    "expected": ("ExpectedAttentionPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "knorm": ("KnormPress", {}),
    "kvzip": ("KVzipPress", {}),
    "kvzipplus": ("KVzipPress", {"kvzip_plus_normalization": True}),
    "lagkv": ("LagKVPress", {}),
    "leverage": ("LeverageScorePress", {}),
    "pyramidkv": ("PyramidKVPress", {}),
    "random": ("RandomPress", {}),
    "snapkv": ("SnapKVPress", {}),
    "streaming": ("StreamingLLMPress", {}),
    "tova": ("TOVAPress", {}),
}
#: Classes around another one.
WRAPPERS = {"ada": "AdaKVPress", "chunk": "ChunkKVPress", "critical": "CriticalKVPress"}


@dataclass(frozen=True)
class Press:
    """A method of kvpress, as its worker is told of it.

    Attributes:
        name: the class.
        around: the classes around it, the innermost first.
        drop: the share of the tokens that goes.
        options: arguments of the class.
    """

    name: str
    around: list[str]
    drop: float
    options: dict[str, bool] = field(default_factory=dict)


def is_press(name: str) -> bool:
    """Whether a spec's name is that of one of these methods, such as ``"kvpress:ada-snapkv"``."""
    *outer, inner = name.removeprefix(PREFIX).split("-")
    return name.startswith(PREFIX) and inner in PRESSES and set(outer) <= set(WRAPPERS)


def press_of(spec: CacheSpec) -> Press:
    """The method of a spec.

    Raises:
        ValueError: if its budget is no share, or it has a codec or options.
    """
    if spec.budget is None or spec.budget >= 1 or spec.codec is not None or spec.options:
        raise ValueError(f"cache={spec.text!r}; accepted: {spec.name}@share with a share below 1, and no more")
    *outer, inner = spec.name.removeprefix(PREFIX).split("-")
    name, options = PRESSES[inner]
    return Press(name, [WRAPPERS[wrapper] for wrapper in reversed(outer)], 1 - spec.budget, options)
