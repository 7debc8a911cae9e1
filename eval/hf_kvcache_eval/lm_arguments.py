"""The arguments of lm-eval's model ``hf-kvcache``: whose each of them is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from hf_kvcache_eval.specs import CacheSpec, parse

#: Named by HFLM, or passed on by it to ``from_pretrained``.
_HFLM = frozenset(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"} | {
    "attn_implementation",
    "device_map",
    "token",
    "variant",
}


def sort_out(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into HFLM's and the cache's."""
    model = {name: value for name, value in arguments.items() if name in _HFLM}
    return model, {name: value for name, value in arguments.items() if name not in _HFLM}


def cache_spec(cache: str, budget: float | int | None, options: Mapping[str, Any]) -> CacheSpec:
    """The spec ``cache`` with a budget and options that were given beside it.

    Raises:
        ValueError: for what is no spec, or what is said twice.
    """
    if not isinstance(cache, str):
        raise ValueError(f"cache={cache!r}; accepted: a cache spec, such as 'full' or 'rotated4'")
    spec = parse(cache)
    if budget is not None and spec.budget is not None:
        raise ValueError(f"budget={budget!r} beside cache={cache!r}, which has one")
    if twice := sorted(set(options) & set(spec.options)):
        raise ValueError(f"{twice[0]}={options[twice[0]]!r} beside cache={cache!r}, which has it")
    for name, value in options.items():
        if not isinstance(value, int | float | bool | str):
            raise ValueError(f"{name}={value!r} of cache={cache!r}; accepted: a number, true or false, or a word")
    if budget is None and not options:
        return spec
    budget = spec.budget if budget is None else budget
    words = [f"{name}={_word(value)}" for name, value in {**spec.options, **options}.items()]
    return parse(
        spec.name
        + (f"@{budget}" if budget is not None else "")
        + (f"+{spec.codec}" if spec.codec else "")
        + (f":{';'.join(words)}" if words else "")
    )


def _word(value: int | float | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
