// The CPU kernels for any CPU of the architecture that the compiler builds for.
#define LPA_WIDTH 4
#define LPA_TABLE kernels_baseline
#define LPA_NAME "default"
#include "table.inl"
