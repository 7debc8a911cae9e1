"""One file a kind of sample."""
