// One call of each op of a frozen block as plain numbers and pointers; no torch in here.
#pragma once

#include <cstdint>

#include "../update.h"

namespace lpa::cpu {

// T tokens, H width. Matrices are [T, H] with column stride 1, and of one dtype.
struct AddNorm {
  Matrix x;
  Matrix residual;      // no data where there is none
  const float* delta;   // [R, H], or null
  const int64_t* rows;  // [T], below R; negative where a token is left alone
  const float* weight;  // [H]
  void* r;              // [T, H], contiguous; null where it is x
  void* normed;         // [T, H], contiguous; null for no norm
  float* rstd;          // [T]
  int64_t width;
  float scale;
  double eps;
};

struct AddNormBackward {
  Matrix grad, r;
  Matrix residual;      // no data where there is none
  const float* rstd;    // [T]
  const float* weight;  // [H]
  void* out;            // [T, H], contiguous
  int64_t width;
};

struct Gate {
  Matrix gate, up;  // [T, F], column stride 1; written where there is no `out`
  Matrix grad;      // [T, F], of the backward
  void* out;        // [T, F], contiguous, of the forward; null for the backward
  int64_t width;
  bool silu;
};

}  // namespace lpa::cpu
