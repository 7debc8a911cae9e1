"""transformers' layer contract: one class for each kind of attention layer."""
