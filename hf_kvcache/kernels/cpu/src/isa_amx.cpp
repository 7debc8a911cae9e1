#define HFKV_ISA amx
#include "isa.inc"
