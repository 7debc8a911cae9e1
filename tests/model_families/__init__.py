"""Every model family of transformers, tiny, tried in every mode with every cache: `make families`."""
