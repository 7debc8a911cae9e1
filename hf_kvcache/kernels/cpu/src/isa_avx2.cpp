#define HFKV_ISA avx2
#include "isa.inc"
