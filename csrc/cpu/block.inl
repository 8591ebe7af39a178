// The norms and the gate of a frozen block over a range of tokens, written once for every vector width (see simd.h).

#include "block.h"
#include "simd.h"

namespace lpa::cpu {
namespace {

// ---- norms ----

constexpr int64_t kSquares = 512;  // columns whose squares are summed in float32 before they join the total

// The residual stream and its norm, one token. The row that is written lies in the first-level cache when it is read.
template <class T>
void add_norm_row(const AddNorm& call, int64_t token) {
  const int64_t width = call.width;
  const T* x = static_cast<const T*>(call.x.data) + token * call.x.row_stride;
  const T* residual = static_cast<const T*>(call.residual.data) + token * call.residual.row_stride;
  const int64_t row = call.delta ? call.rows[token] : -1;
  const float* delta = row < 0 ? nullptr : call.delta + row * width;
  T* stream = call.r ? static_cast<T*>(call.r) + token * width : nullptr;
  double squares = 0;
  for (int64_t begin = 0; begin < width; begin += kSquares) {
    const int64_t n = width - begin < kSquares ? width - begin : kSquares;
    VFloat part{};
    sweep(n, [&](int64_t j, int64_t k) LPA_LAMBDA {
      const int64_t i = begin + j;
      VFloat y = load(x + i, k);
      if (delta) y += load(delta + i, k);
      if (call.residual.data) y = load(residual + i, k) + y * call.scale;
      if (stream) {
        store(stream + i, y, k);
        y = load(stream + i, k);  // as it is rounded
      }
      part += y * y;
    });
    squares += sum(part);
  }
  if (!call.normed) return;
  const float factor = static_cast<float>(1 / __builtin_sqrt(squares / width + call.eps));
  call.rstd[token] = factor;
  const T* r = stream ? stream : x;
  T* normed = static_cast<T*>(call.normed) + token * width;
  sweep(width, [&](int64_t i, int64_t k) LPA_LAMBDA {
    store(normed + i, load(r + i, k) * factor * load(call.weight + i, k), k);
  });
}

template <class T>
void add_norm_backward_row(const AddNormBackward& call, int64_t token) {
  const int64_t width = call.width;
  const T* grad = static_cast<const T*>(call.grad.data) + token * call.grad.row_stride;
  const T* r = static_cast<const T*>(call.r.data) + token * call.r.row_stride;
  const T* residual = static_cast<const T*>(call.residual.data) + token * call.residual.row_stride;
  T* out = static_cast<T*>(call.out) + token * width;
  double products = 0;
  for (int64_t begin = 0; begin < width; begin += kSquares) {
    const int64_t n = width - begin < kSquares ? width - begin : kSquares;
    VFloat part{};
    sweep(n, [&](int64_t j, int64_t k) LPA_LAMBDA {
      const int64_t i = begin + j;
      part += load(grad + i, k) * load(call.weight + i, k) * load(r + i, k);
    });
    products += sum(part);
  }
  const double factor = call.rstd[token];
  const float inv = static_cast<float>(factor), along = static_cast<float>(products * factor * factor * factor / width);
  sweep(width, [&](int64_t i, int64_t k) LPA_LAMBDA {
    VFloat y = load(grad + i, k) * load(call.weight + i, k) * inv - load(r + i, k) * along;
    if (call.residual.data) y += load(residual + i, k);
    store(out + i, y, k);
  });
}

void add_norm_rows(const AddNorm& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (call.x.dtype == Dtype::float32) add_norm_row<float>(call, token);
    if (call.x.dtype == Dtype::bfloat16) add_norm_row<bfloat16>(call, token);
    if (call.x.dtype == Dtype::float16) add_norm_row<float16>(call, token);
  }
}

void add_norm_backward_rows(const AddNormBackward& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (call.r.dtype == Dtype::float32) add_norm_backward_row<float>(call, token);
    if (call.r.dtype == Dtype::bfloat16) add_norm_backward_row<bfloat16>(call, token);
    if (call.r.dtype == Dtype::float16) add_norm_backward_row<float16>(call, token);
  }
}

// ---- the gate: x sigmoid(t(x)), with t(x) = x for SiLU and 2 sqrt(2/pi) (x + 0.044715 x^3) for GELU by tanh ----

struct Sigmoid {
  VFloat value;  // sigmoid(t(x))
  VFloat slope;  // t'(x)
};

template <bool silu>
LPA_INLINE Sigmoid sigmoid(VFloat x) {
  constexpr float kSlope = 1.5957691216057308f, kCube = 0.044715f;
  VFloat t = x, slope = all(1.0f);
  if (!silu) {
    const VFloat square = x * x;
    t = x * kSlope * (kCube * square + 1.0f);
    slope = kSlope * (3 * kCube * square + 1.0f);
  }
  const VFloat small = exp_negative(-absolute(t));
  return {(t >= 0 ? all(1.0f) : small) / (small + 1.0f), slope};
}

template <class T, bool silu>
void gate_row(const Gate& call, int64_t token) {
  T* gate = static_cast<T*>(call.gate.data) + token * call.gate.row_stride;
  T* up = static_cast<T*>(call.up.data) + token * call.up.row_stride;
  if (call.out) {
    T* out = static_cast<T*>(call.out) + token * call.width;
    sweep(call.width, [&](int64_t i, int64_t k) LPA_LAMBDA {
      const VFloat x = load(gate + i, k);
      store(out + i, x * sigmoid<silu>(x).value * load(up + i, k), k);
    });
  } else {
    const T* grad = static_cast<const T*>(call.grad.data) + token * call.grad.row_stride;
    sweep(call.width, [&](int64_t i, int64_t k) LPA_LAMBDA {
      const VFloat x = load(gate + i, k), g = load(grad + i, k);
      const Sigmoid s = sigmoid<silu>(x);
      store(gate + i, g * load(up + i, k) * s.value * (x * (1.0f - s.value) * s.slope + 1.0f), k);
      store(up + i, g * x * s.value, k);
    });
  }
}

template <class T>
void gate_row(const Gate& call, int64_t token) {
  call.silu ? gate_row<T, true>(call, token) : gate_row<T, false>(call, token);
}

void gate_rows(const Gate& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (call.gate.dtype == Dtype::float32) gate_row<float>(call, token);
    if (call.gate.dtype == Dtype::bfloat16) gate_row<bfloat16>(call, token);
    if (call.gate.dtype == Dtype::float16) gate_row<float16>(call, token);
  }
}

}  // namespace
}  // namespace lpa::cpu
