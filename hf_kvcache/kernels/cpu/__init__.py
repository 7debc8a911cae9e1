"""CPU kernels in C++ behind a C interface: their sources, how they are built, and how they are loaded."""
