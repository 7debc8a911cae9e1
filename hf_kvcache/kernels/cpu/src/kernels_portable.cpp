// The kernels for any CPU; build.py has the options of the compiler.
#define HFKV_ISA portable
#include "kernels.inc"
