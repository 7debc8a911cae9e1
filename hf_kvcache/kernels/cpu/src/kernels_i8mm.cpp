// The kernels for NEON with the matrix products of bytes of I8MM; build.py has the options of the compiler.
#define HFKV_ISA i8mm
#include "kernels.inc"
