"""Checks while a model runs: does it read the cache, and does it drop the cache on the way?"""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_kvcache.integration.architecture import architecture, recomputing
from hf_kvcache.integration.masks import mask_is_expected
from hf_kvcache.integration.versions import RELEASE
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.own import OwnLayer

logger = logging.get_logger(__name__)


class ReadCheck:
    """Checks whether the model reads the handles that ``update`` returns. After the first success it checks no more.

    Args:
        options: the settings that all layers of the cache share. Masks are recorded as made for this object.
    """

    def __init__(self, options: LayerOptions) -> None:
        self._options = options
        #: The number of the layer that was updated last, and whether its handles had to be read.
        self._updated = (0, False)
        #: Whether the model is known to read the handles.
        self.passed = False

    def check(self, layers: list[Any], layer_idx: int) -> None:
        """Before the update of a layer, raise RuntimeError if the handles of the update before it were not read."""
        latest, had_to_be_read = self._updated
        layer, expected = layers[layer_idx], mask_is_expected(self._options)
        # If no mask was made before, update() was called by hand, and its handles need not be read.
        self._updated = layer_idx, expected and isinstance(layer, OwnLayer) and layer.get_seq_length() > 0
        if not had_to_be_read or not expected:
            return
        if not layers[latest].is_unread():
            self.passed = True
            return
        config = self._options.config
        known = None if config is None else architecture(config)
        raise RuntimeError(
            f"layer {latest}: attention did not read the handles on all keys and values that update() returned: "
            f"{'the model' if known is None else known.model.__name__} of transformers {RELEASE} uses "
            "a cache in a way that this package does not support, and the result would be wrong. Use a DynamicCache, "
            "and please report the model"
        )

    def copy(self) -> ReadCheck:
        """A copy for a fork of the cache."""
        other = object.__new__(ReadCheck)
        other.__dict__.update(self.__dict__)
        return other


def drop_limit(config: PreTrainedConfig) -> int | None:
    """The number of tokens after which ``generate`` drops a shorter cache and reads all tokens again; None: never."""
    return None if (drops := recomputing(config)) is None else drops[0]


def warn_if_dropped(config: PreTrainedConfig, length: int) -> None:
    """Warn if the code that drops the cache asks for the length of the cache.

    ``get_seq_length`` calls this function, and the caller of ``get_seq_length`` is found on the stack.

    Args:
        config: the config of the model.
        length: number of tokens that the cache has seen.
    """
    known, asking = recomputing(config), sys._getframe(2)
    # A wrapper of get_seq_length may stand between it and its caller.
    before = asking if asking.f_back is None else asking.f_back
    if known is not None and known[1] in (asking.f_code, before.f_code):
        logger.warning(
            f"{config.model_type!r} changes its rotary embedding after {known[0]} tokens: transformers "
            f"{RELEASE} drops the cache that generate() was given, reads all tokens again, and continues with a "
            f"DynamicCache of its own. This cache ends with {length} tokens. To continue with a cache of this package, "
            f"build a new one and call generate() with all tokens: a prompt of more than {known[0]} tokens is kept"
        )
