// The kernels for NEON with the dot products of bytes of Armv8.2; build.py has the options of the compiler.
#define HFKV_ISA dotprod
#include "kernels.inc"
