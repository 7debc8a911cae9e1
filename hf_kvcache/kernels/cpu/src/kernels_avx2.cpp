#define HFKV_ISA avx2
#include "kernels.inc"
