// Stands in for CUDA's bfloat16.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
