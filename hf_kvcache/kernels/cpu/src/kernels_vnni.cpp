#define HFKV_ISA vnni
#include "kernels.inc"
