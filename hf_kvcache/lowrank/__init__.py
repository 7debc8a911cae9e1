"""Low-rank bases of keys and values, found by calibration, in which a cache can store them."""

from hf_kvcache.lowrank.calibration import calibrate
from hf_kvcache.lowrank.projection import LayerProjection, Projection, SideProjection

__all__ = ["LayerProjection", "Projection", "SideProjection", "calibrate"]
