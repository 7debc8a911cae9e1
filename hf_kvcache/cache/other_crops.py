"""Whether transformers' own layers can return to earlier tokens."""

from __future__ import annotations

from typing import Any


def check_crop(index: int, layer: Any, tokens_to_remove: int) -> None:
    """Raise RuntimeError if a layer of transformers' own cannot remove its newest tokens.

    transformers raises some of these errors in the middle of a ``crop``, when other layers have been cropped already.
    A recurrent state it leaves as it is without an error: the state of the tokens that were removed.

    Args:
        index: of the layer.
        layer: a layer of a hybrid model, or one of chunked attention.
        tokens_to_remove: minus the number of tokens to remove; 0 only confirms.
    """
    if tokens_to_remove and _holds(layer, "recurrent_states"):
        raise RuntimeError(
            f"crop({tokens_to_remove!r}): layer {index} ({type(layer).__name__}) has a recurrent state, which cannot "
            "return to an earlier token; accepted: 0, or reset()"
        )
    recording = getattr(layer, "record_past", True)
    window = getattr(layer, "sliding_window", None)
    full = window is not None and layer.get_seq_length() >= window
    if not recording and (full or hasattr(layer, "conv_states")):
        raise RuntimeError(
            f"crop({tokens_to_remove!r}): layer {index} ({type(layer).__name__}) does not track past states. Call "
            "activate_past_recording() before the tokens are added."
        )


def _holds(layer: Any, name: str) -> bool:
    """Whether a layer has states of that name: a tensor, or several by number."""
    states = getattr(layer, name, None)
    return any(state is not None for state in states.values()) if isinstance(states, dict) else states is not None
