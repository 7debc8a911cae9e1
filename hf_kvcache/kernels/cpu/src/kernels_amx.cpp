#define HFKV_ISA amx
#include "kernels.inc"
