// The kernels for AVX-512 with VNNI and AMX; build.py has the options of the compiler.
#define HFKV_ISA amx
#include "kernels.inc"
