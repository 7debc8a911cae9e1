#define HFKV_ISA vnni
#include "isa.inc"
