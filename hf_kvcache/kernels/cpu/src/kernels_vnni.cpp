// The kernels for AVX-512 with VNNI; build.py has the options of the compiler.
#define HFKV_ISA vnni
#include "kernels.inc"
