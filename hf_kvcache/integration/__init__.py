"""Everything that depends on transformers' own model code."""
