"""Numeric kernels, one folder per operation; each imports nothing above this package.

``reference.py`` in each folder is the definition in plain torch. Faster twins stand beside it and pass the same tests.
"""
