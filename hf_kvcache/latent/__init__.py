"""Low-rank bases of keys and values, found by calibration, in which a cache can store them."""

from hf_kvcache.latent.calibration import calibrate
from hf_kvcache.latent.projection import LayerProjection, Projection, SideProjection

__all__ = ["LayerProjection", "Projection", "SideProjection", "calibrate"]
