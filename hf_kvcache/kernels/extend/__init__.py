"""Twins of attention that are made for a long block of new queries (a prefill chunk)."""
