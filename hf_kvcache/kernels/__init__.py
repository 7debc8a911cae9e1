"""Numeric kernels. This package imports nothing of the packages above it.

``reference/`` defines every operation in plain torch. ``cpu/`` and ``triton/`` are the faster backends: they have a
module of the same name for each operation that they implement, and pass the same tests. The modules here choose between
them.
"""
