// Stands in for CUDA's float16.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float out = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                             : std::ldexp(float(mantissa), -24);
  return x.bits & 0x8000 ? -out : out;
}
