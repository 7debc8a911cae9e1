"""What a running model may do that a cache cannot follow: not read it, or drop it on the way."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_kvcache.integration.architecture import architecture, recomputing
from hf_kvcache.integration.masks import mask_is_expected
from hf_kvcache.integration.versions import RELEASE
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.options import LayerOptions

logger = logging.get_logger(__name__)


class ReadCheck:
    """Whether attention reads the handles that ``update`` returns; looked at until it once has.

    Args:
        options: what the layers of the cache share; masks are made for them.
    """

    def __init__(self, options: LayerOptions) -> None:
        self._options = options
        #: The layer updated last, and whether it held anything before.
        self._updated = (0, False)
        #: Whether it is known that the model reads them.
        self.passed = False

    def look(self, layers: list[Any], layer_idx: int) -> None:
        """Before the update of a layer, raise RuntimeError if the model has not read what the last one returned."""
        latest, had = self._updated
        layer, expected = layers[layer_idx], mask_is_expected(self._options)
        # Without a mask before it, update() is called by hand, and nobody has to read what it returns.
        self._updated = layer_idx, expected and isinstance(layer, KVCacheLayer) and layer.get_seq_length() > 0
        if not had or not expected:
            return
        if not layers[latest].is_unread():
            self.passed = True
            return
        config = self._options.config
        known = None if config is None else architecture(config)
        raise RuntimeError(
            f"layer {latest}: attention did not read the handles on all keys and values that update() returned: "
            f"{'the model' if known is None else known.model.__name__} of transformers {RELEASE} uses "
            "a cache in another way than this package takes it to, and the result would be wrong. Use a DynamicCache, "
            "and please report it"
        )

    def copy(self) -> ReadCheck:
        """The check of a fork, as far as this one."""
        other = object.__new__(ReadCheck)
        other.__dict__.update(self.__dict__)
        return other


def length_kept_until(config: PreTrainedConfig) -> int | None:
    """Tokens up to which transformers drops a cache on the way to more; None: at no length."""
    return None if (drops := recomputing(config)) is None else drops[0]


def warn_if_dropped(config: PreTrainedConfig, length: int) -> None:
    """Warn if the length of a cache is asked for by the code that drops the cache next.

    Args:
        config: of the model.
        length: tokens that the cache has seen; ``get_seq_length`` is what calls this.
    """
    known, asking = recomputing(config), sys._getframe(2)
    # A wrapper of get_seq_length may stand between it and who asks.
    before = asking if asking.f_back is None else asking.f_back
    if known is not None and known[1] in (asking.f_code, before.f_code):
        logger.warning(
            f"{config.model_type!r} changes its rotary embedding behind {known[0]} tokens: transformers "
            f"{RELEASE} drops the cache that generate() was given, reads all tokens again, and goes on with a "
            f"DynamicCache of its own. This cache ends with {length} tokens. To go on with one, build a new cache "
            f"and call generate() with all tokens: a prompt of more than {known[0]} is kept"
        )
