#define HFKV_ISA avx512
#include "isa.inc"
