"""What the package knows of transformers' own code."""
