"""Other libraries in the same comparison, each in an environment of its own."""
