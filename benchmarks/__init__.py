"""What the caches cost in time and memory (``make bench``), and in accuracy (``fidelity.py``)."""
