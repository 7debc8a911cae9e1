"""What a model's cache will hold, from its config alone: no weights are read and no memory is taken.

:func:`plan` runs the model for a few tokens on the ``meta`` device, to see what it gives to a cache. Then it gives as
much to real caches on that device, so that their own arithmetic says what they would hold.
"""

from hf_kvcache.planning.formula import Textbook, textbook
from hf_kvcache.planning.plan import CachePlan, Plan, plan
from hf_kvcache.planning.sizes import parse_bytes, parse_count

__all__ = ["CachePlan", "Plan", "Textbook", "parse_bytes", "parse_count", "plan", "textbook"]
