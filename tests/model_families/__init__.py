"""`make families`: tiny models of every family of transformers, tried in every mode with every cache."""
