#define HFKV_ISA portable
#include "kernels.inc"
