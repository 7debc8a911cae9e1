"""Low-rank bases of keys and values, found by calibration, in which a cache can store them."""
