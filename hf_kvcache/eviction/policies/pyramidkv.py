"""PyramidKV: SnapKV's score, and more tokens for the lower layers than for the upper (arXiv:2406.02069)."""

from __future__ import annotations

from hf_kvcache.eviction.policies.snapkv import SnapKV
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import between


@register("pyramidkv")
class PyramidKV(SnapKV):
    """What a layer keeps beside an average window falls linearly with its depth, to ``1 / beta`` of the mean at last.

    No layer is given more than all tokens: what the lower ones could not hold goes to the upper, whose share then falls
    less. So all layers together keep the whole budget.

    Args:
        window: as of :class:`SnapKV`, in each layer by what that keeps.
        kernel: as of :class:`SnapKV`.
        beta: the steepness; 1 gives all layers the same.

    Raises:
        ValueError: as :class:`SnapKV`, and if ``beta`` is below 1.
    """

    def __init__(self, window: int = 64, kernel: int = 5, beta: float = 20) -> None:
        super().__init__(window, kernel)
        self.beta = between("beta", beta, 1, float("inf"))

    def layer_quota(self, quota: int, evicting_index: int, num_evicting: int, least: int, most: int) -> int:
        mirrored = num_evicting - 1 - evicting_index
        if evicting_index == mirrored:
            return quota
        if evicting_index > mirrored:
            # What one layer has beyond the mean its counterpart lacks: the sum is exact in spite of rounding.
            return 2 * quota - self.layer_quota(quota, mirrored, num_evicting, least, most)
        spare = max(quota - max(self.recent(quota), least), 0)
        steepest = min(spare * (1 - 1 / self.beta), max(most - quota, 0))
        # Rounded down, so that the counterpart loses at most what it has.
        return quota + int(steepest * (1 - 2 * evicting_index / (num_evicting - 1)))
