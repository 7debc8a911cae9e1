"""Binding a model's config to the attention function of this package, and undoing it.

A bound config has the attention implementation ``hf_kvcache``, and remembers which implementation was set before.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_kvcache.integration import mla

#: The name under which the attention and mask functions are registered.
IMPLEMENTATION = "hf_kvcache"
_DEFAULT_PREVIOUS = "sdpa"
#: Implementations whose masks are not tensors, so that the attention function of this package cannot read them.
_UNREADABLE_MASKS = ("flex_attention",)


class _Bound(str):
    """The name ``hf_kvcache`` as a string that also has the name of the previous implementation.

    It is a subclass of ``str``, so that the binding is kept in copies and pickles of the config, and is not written to
    a saved ``config.json``.
    """

    previous: str

    def __new__(cls, previous: str) -> _Bound:
        bound = super().__new__(cls, IMPLEMENTATION)
        bound.previous = previous
        return bound

    def __eq__(self, other: object) -> bool:
        # Models that compare the implementation's name (Gemma 4, Falcon) behave as if they were not bound.
        return other == IMPLEMENTATION or other == self.previous

    def __ne__(self, other: object) -> bool:
        return other != IMPLEMENTATION and other != self.previous

    # Comparison and hash say nothing of `str`, whose own methods torch.compile cannot trace.
    def __hash__(self) -> int:
        return hash(IMPLEMENTATION)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Bound, (self.previous,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bound:
        return _Bound(self.previous)


def bind(config: PreTrainedConfig) -> None:
    """Make models with this ``config`` use the attention function of this package. Other caches work as before.

    Every cache of this package calls this function when it is built, unless it is built with ``bind=False``.

    Args:
        config: the config object that the model holds (for vision-language models its text part).

    Raises:
        ValueError: if the current implementation makes masks that are not tensors (flex attention).
    """
    current = config._attn_implementation
    current = _DEFAULT_PREVIOUS if current is None else current
    if current in _UNREADABLE_MASKS or current.startswith("paged|"):
        raise ValueError(
            f"attn_implementation={current!r} cannot be combined with a KVCache; accepted: 'sdpa', 'eager' or a "
            "flash attention. Call model.set_attn_implementation('sdpa') first."
        )
    if current != IMPLEMENTATION:
        _set_implementation(config, _Bound(current))
    mla.bind(config)


def unbind(config: PreTrainedConfig) -> None:
    """Undo :func:`bind`: set the attention implementation that was set before.

    Caches in use continue to work, through dense tensors. Latent-attention classes get their own ``expand_kv`` back,
    unless another config of their models is bound.

    Args:
        config: the config object that the model holds.
    """
    mla.unbind(config.get_text_config(decoder=True))
    if config._attn_implementation == IMPLEMENTATION:
        _set_implementation(config, previous_implementation(config))


def is_bound(config: PreTrainedConfig) -> bool:
    """Whether models with this ``config`` use the attention function of this package."""
    return isinstance(config._attn_implementation, _Bound) or config._attn_implementation == IMPLEMENTATION


def previous_implementation(config: PreTrainedConfig) -> str:
    """The attention implementation that was set before ``config`` was bound."""
    current = config._attn_implementation
    if isinstance(current, _Bound):
        return current.previous
    # With from_pretrained(attn_implementation="hf_kvcache") no implementation was set before.
    return _DEFAULT_PREVIOUS if current in (None, IMPLEMENTATION) else current


def _set_implementation(config: PreTrainedConfig, implementation: str) -> None:
    # Given a dict, the setter does not change the sub-configs, such as that of a vision tower.
    config._attn_implementation = {"": implementation}
