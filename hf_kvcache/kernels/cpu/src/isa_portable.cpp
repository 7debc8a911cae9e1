#define HFKV_ISA portable
#include "isa.inc"
