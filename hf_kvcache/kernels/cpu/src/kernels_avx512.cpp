#define HFKV_ISA avx512
#include "kernels.inc"
