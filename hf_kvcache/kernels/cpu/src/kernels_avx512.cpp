// The kernels for AVX-512; build.py has the options of the compiler.
#define HFKV_ISA avx512
#include "kernels.inc"
