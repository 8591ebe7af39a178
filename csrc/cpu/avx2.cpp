// The CPU kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LPA_WIDTH 8
#define LPA_TABLE kernels_avx2
#define LPA_NAME "avx2"
#include "table.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
