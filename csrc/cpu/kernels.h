// The CPU kernels, once for each instruction set that they are compiled for; no torch in here.
#pragma once

#include <cstdint>

#include "../update.h"
#include "attention.h"
#include "block.h"

namespace lpa::cpu {

// One call of perturb. T tokens, R rows, H width.
struct Perturb {
  Matrix hidden;        // [T, H], column stride 1
  const float* delta;   // [R, H], rows `delta_stride` apart
  const int64_t* rows;  // [T], below R; negative where a token is left alone
  void* out;            // [T, H], contiguous, of hidden's dtype
  int64_t delta_stride, width;
};

// One call of token_loss_. N rows, V vocabulary.
struct TokenLoss {
  Matrix logits;          // [N, V], column stride 1
  const int64_t* labels;  // [N], each in [0, V) or ignored
  const bool* away;       // [N]
  const float* weight;    // [N], or null to leave the logits alone
  double threshold;
  float* losses;          // [N]
  bool* hits;             // [N]
  int64_t vocabulary;
};

constexpr int64_t kIgnored = -100;  // label of a row that does not count

struct Kernels {
  const char* name;
  // Tokens [begin, end).
  void (*perturb_rows)(const Perturb& call, int64_t begin, int64_t end);
  // Rows [begin, end) of the S*R rows of all sites; does not touch `clipped`.
  void (*update_rows)(const Update& call, const Matrix* grads, int64_t begin, int64_t end);
  // Rows [begin, end) of the logits.
  void (*token_loss_rows)(const TokenLoss& call, int64_t begin, int64_t end);
  // Tokens [begin, end), as the next two.
  void (*add_norm_rows)(const AddNorm& call, int64_t begin, int64_t end);
  void (*add_norm_backward_rows)(const AddNormBackward& call, int64_t begin, int64_t end);
  void (*gate_rows)(const Gate& call, int64_t begin, int64_t end);
  // Floats of scratch that a thread needs for attention.
  int64_t (*attention_floats)(const Attention& call);
  // Pairs [begin, end) of row and key-value head; forward or backward.
  void (*attention_pairs)(const Attention& call, int64_t begin, int64_t end, float* scratch);
};

extern const Kernels kernels_baseline;  // what every CPU of this architecture has
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Those of the widest instruction set that this CPU runs; ATEN_CPU_CAPABILITY caps it, with PyTorch's names.
const Kernels& kernels();

}  // namespace lpa::cpu
