// One call of pgd_update_ as plain numbers and pointers, shared by the CPU and CUDA kernels; no torch in here.
#pragma once

#include <cstdint>

namespace lpa {

enum class Rule : int32_t { adamw, normalised, sign };
enum class Norm : int32_t { none, l2, linf };
enum class Dtype : int32_t { float32, bfloat16, float16 };

// A matrix of any strides (counted in elements): the gradients [T, H] of one site, or logits [N, V].
struct Matrix {
  void* data;
  int64_t row_stride;
  int64_t column_stride;
  Dtype dtype;
};

// Everything but the gradients. S sites, R rows, H width, K shares (tokens a row), T tokens in each gradient.
struct Update {
  float* delta;        // [S, R, H]
  float* exp_avg;      // [S, R, H]; null for rules without moments
  float* exp_avg_sq;   // [S, R, H]; null for rules without moments
  float* norms;        // [S, R]
  int32_t* clipped;    // [S]
  const int64_t* row_tokens;  // [R, K]
  const float* step;       // one number, as the next
  const float* step_size;
  const float* epsilon;  // one number, or [S, R] if epsilon_per_row
  int64_t sites, rows, width, shares;
  bool epsilon_per_row, maximize;
  Rule rule;
  Norm norm;
  double beta1, beta2, log_beta1, log_beta2, eps, weight_decay;
};

}  // namespace lpa
