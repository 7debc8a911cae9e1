"""Tests of the CPU kernels in C++, for every instruction set that this CPU has."""
