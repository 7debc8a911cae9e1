"""The command line: ``hf-kvcache``."""
