"""What the caches cost in time and memory (``make bench``); their cost in accuracy is measured in `eval`."""
