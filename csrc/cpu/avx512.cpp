// The CPU kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define LPA_WIDTH 16
#define LPA_TABLE kernels_avx512
#define LPA_NAME "avx512"
#include "table.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
