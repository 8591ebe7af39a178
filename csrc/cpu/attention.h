// One call of attention or of its backward as plain numbers and pointers; no torch in here.
#pragma once

#include <cstdint>

#include "../update.h"

namespace lpa::cpu {

// [T, heads, D], the entries of a head side by side; strides are counted in elements.
struct Heads {
  void* data;
  int64_t token_stride, head_stride;
};

// B rows, of Tq queries and Tk keys in all.
struct Attention {
  Heads q, k, v, out;              // out is written by the forward and read by the backward
  Heads grad, d_q, d_k, d_v;       // of the backward: the gradient of out, and where its results go
  float* lse;                      // [heads, Tq]
  const float* cos;                // [P, half]; null where nothing is rotated
  const float* sin;
  const int32_t *q_places, *k_places;  // [T, 2], branch and position
  const int32_t *q_starts, *k_starts;  // [B + 1]
  int64_t heads, kv_heads, width, half, queries, longest_q, longest_k;
  float scale, softcap;
  int32_t window;
  bool backward;
  Dtype dtype;
};

}  // namespace lpa::cpu
