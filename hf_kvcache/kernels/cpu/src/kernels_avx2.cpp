// The kernels for AVX2; build.py has the options of the compiler.
#define HFKV_ISA avx2
#include "kernels.inc"
