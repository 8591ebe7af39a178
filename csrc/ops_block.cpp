// The ops of a frozen block on the CPU, as torch.ops.lpa_kernels_native.*; see ops.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "arguments.h"
#include "cpu/call.h"
#include "cpu/kernels.h"

namespace lpa::cpu {
namespace {

// A matrix of the shape and dtype of `first`.
Matrix like(const Tensor& first, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == first.size(0) && tensor.size(1) == first.size(1) &&
                      tensor.scalar_type() == first.scalar_type(),
                  name, " has another shape or dtype than the first argument");
  return lines_of(tensor, first, name);
}

std::tuple<Tensor, Tensor, Tensor> add_norm(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> low,
                                            std::optional<Tensor> up, std::optional<Tensor> delta,
                                            std::optional<Tensor> rows, std::optional<Tensor> weight, double scale,
                                            double eps) {
  STD_TORCH_CHECK(!low && !up, "LoRA's product is not taken here: add it to x first");
  AddNorm call{};
  call.x = lines_of(x, x, "x");
  const int64_t tokens = x.size(0);
  call.width = x.size(1);
  if (residual) call.residual = like(x, *residual, "residual");
  const bool attacked = delta && delta->size(0) > 0;
  if (attacked) {
    STD_TORCH_CHECK(rows, "delta is given without rows");
    call.rows = rows_of(*rows, *delta, x);
    call.delta = data_of<float>(*delta, x, ScalarType::Float, delta->size(0) * call.width, "delta");
  }
  const bool added = residual || attacked;
  Tensor r = added ? torch::stable::new_empty(x, {tokens, call.width}) : torch::stable::new_empty(x, {0});
  Tensor normed = weight ? torch::stable::new_empty(x, {tokens, call.width}) : torch::stable::new_empty(x, {0});
  Tensor rstd = torch::stable::new_empty(x, {weight ? tokens : 0}, ScalarType::Float);
  if (added) call.r = r.data_ptr();
  if (weight) {
    call.weight = data_of<float>(*weight, x, ScalarType::Float, call.width, "weight");
    call.normed = normed.data_ptr();
    call.rstd = static_cast<float*>(rstd.data_ptr());
  }
  call.scale = static_cast<float>(scale);
  call.eps = eps;
  if (added || weight) {
    over_rows(tokens, call.width, [&](int64_t begin, int64_t end) { kernels().add_norm_rows(call, begin, end); });
  }
  return {r, normed, rstd};
}

Tensor add_norm_backward(Tensor grad, Tensor r, Tensor rstd, Tensor weight, std::optional<Tensor> residual) {
  AddNormBackward call{};
  call.r = lines_of(r, r, "r");
  const int64_t tokens = r.size(0);
  call.width = r.size(1);
  call.grad = like(r, grad, "grad");
  if (residual) call.residual = like(r, *residual, "residual");
  call.rstd = data_of<float>(rstd, r, ScalarType::Float, tokens, "rstd");
  call.weight = data_of<float>(weight, r, ScalarType::Float, call.width, "weight");
  Tensor out = torch::stable::new_empty(r, {tokens, call.width});
  call.out = out.data_ptr();
  over_rows(tokens, call.width,
            [&](int64_t begin, int64_t end) { kernels().add_norm_backward_rows(call, begin, end); });
  return out;
}

Gate gate_of(const Tensor& gate, const Tensor& up, const std::string& activation) {
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", "activation='", activation,
                  "'; the native kernels have silu and gelu_tanh");
  Gate call{};
  call.gate = lines_of(gate, gate, "gate");
  call.up = like(gate, up, "up");
  call.width = gate.size(1);
  call.silu = activation == "silu";
  return call;
}

Tensor swiglu(Tensor gate, Tensor up, std::string activation) {
  Gate call = gate_of(gate, up, activation);
  Tensor out = torch::stable::new_empty(gate, {gate.size(0), call.width});
  call.out = out.data_ptr();
  over_rows(gate.size(0), call.width, [&](int64_t begin, int64_t end) { kernels().gate_rows(call, begin, end); });
  return out;
}

void swiglu_backward_(Tensor gate, Tensor up, Tensor grad, std::string activation) {
  Gate call = gate_of(gate, up, activation);
  call.grad = like(gate, grad, "grad");
  over_rows(gate.size(0), call.width, [&](int64_t begin, int64_t end) { kernels().gate_rows(call, begin, end); });
}

Heads heads_of(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.scalar_type() == like.scalar_type(), name,
                  " is not [tokens, heads, width] of q's dtype");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(tensor.size(i) == like.size(i), name, " has ", tensor.size(i), " entries in dimension ", i,
                    "; expected ", like.size(i));
  }
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1, "the last stride of ", name, " is not 1");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// The starts of `rows` rows of `tokens` tokens; returns those of the longest row.
int64_t longest_of(const int32_t* starts, int64_t rows, int64_t tokens, const char* name) {
  int64_t longest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(starts[i + 1] >= starts[i], name, " does not ascend at row ", i);
    longest = std::max<int64_t>(longest, starts[i + 1] - starts[i]);
  }
  STD_TORCH_CHECK(starts[0] == 0 && starts[rows] == tokens, name, " goes from ", starts[0], " to ", starts[rows],
                  "; expected 0 to ", tokens);
  return longest;
}

const int32_t* places_of(const Tensor& places, const Tensor& x, int64_t positions, const char* name) {
  const int32_t* data = data_of<int32_t>(places, x, ScalarType::Int, 2 * x.size(0), name);
  for (int64_t i = 0; i < x.size(0); ++i) {
    STD_TORCH_CHECK(data[2 * i + 1] >= 0 && data[2 * i + 1] < positions, name, " has position ", data[2 * i + 1],
                    " at token ", i, "; expected 0 to ", positions - 1);
  }
  return data;
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
                       const std::optional<Tensor>& sin, const Tensor& q_places, const Tensor& k_places,
                       const Tensor& q_starts, const Tensor& k_starts, double scale, double softcap, int64_t window) {
  Attention call{};
  call.dtype = dtype_of(q, "q");
  call.q = heads_of(q, q, "q");
  call.k = heads_of(k, k, "k");
  call.v = heads_of(v, k, "v");
  call.queries = q.size(0);
  call.heads = q.size(1);
  call.kv_heads = k.size(1);
  call.width = q.size(2);
  STD_TORCH_CHECK(k.size(2) == call.width && k.scalar_type() == q.scalar_type() && call.kv_heads > 0 &&
                      call.heads % call.kv_heads == 0,
                  "the heads of q, ", call.heads, " x ", call.width, ", do not fit those of k, ", k.size(1), " x ",
                  k.size(2));
  int64_t positions = int64_t{1} << 30;
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "one of cos and sin is given without the other");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 2 && 2 * cos->size(1) <= call.width, "cos is not [positions, ", call.width / 2, "]");
    positions = cos->size(0);
    call.half = cos->size(1);
    call.cos = data_of<float>(*cos, q, ScalarType::Float, positions * call.half, "cos");
    call.sin = data_of<float>(*sin, q, ScalarType::Float, positions * call.half, "sin");
  }
  call.q_places = places_of(q_places, q, positions, "q_places");
  call.k_places = places_of(k_places, k, positions, "k_places");
  const int64_t rows = q_starts.numel() - 1;
  STD_TORCH_CHECK(rows >= 0, "q_starts is empty; expected the start of each row and the end of the last");
  call.q_starts = data_of<int32_t>(q_starts, q, ScalarType::Int, rows + 1, "q_starts");
  call.k_starts = data_of<int32_t>(k_starts, q, ScalarType::Int, rows + 1, "k_starts");
  call.longest_q = longest_of(call.q_starts, rows, q.size(0), "q_starts");
  call.longest_k = longest_of(call.k_starts, rows, k.size(0), "k_starts");
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap);
  STD_TORCH_CHECK(window >= 0, "window is ", window, "; expected 0 for none, or how far a query sees");
  call.window = static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX));
  return call;
}

void run(const Attention& call, int64_t rows) {
  torch::stable::parallel_for(0, rows * call.kv_heads, 1, [&](int64_t begin, int64_t end) {
    const size_t line = 64, floats = kernels().attention_floats(call);  // a vector in two cache lines costs twice
    const std::unique_ptr<void, decltype(&std::free)> memory(
        std::aligned_alloc(line, (floats * sizeof(float) + line - 1) / line * line), &std::free);
    STD_TORCH_CHECK(memory, "no memory for ", floats, " floats");
    kernels().attention_pairs(call, begin, end, static_cast<float*>(memory.get()));
  });
}

// The longest rows, which the schema names, are found here again: memory goes by them.
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> cos,
                                     std::optional<Tensor> sin, Tensor q_places, Tensor k_places, Tensor q_starts,
                                     Tensor k_starts, int64_t, int64_t, double scale, double softcap,
                                     int64_t window) {
  Attention call = attention_of(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, scale, softcap, window);
  Tensor out = torch::stable::new_empty(q, {call.queries, call.heads, call.width});
  Tensor lse = torch::stable::new_empty(q, {call.heads, call.queries}, ScalarType::Float);
  call.out = heads_of(out, q, "out");
  call.lse = static_cast<float*>(lse.data_ptr());
  run(call, q_starts.numel() - 1);
  return {out, lse};
}

void attention_backward_(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_q, Tensor d_k,
                         Tensor d_v, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor q_places,
                         Tensor k_places, Tensor q_starts, Tensor k_starts, int64_t, int64_t, double scale,
                         double softcap, int64_t window) {
  Attention call = attention_of(q, k, v, cos, sin, q_places, k_places, q_starts, k_starts, scale, softcap, window);
  call.backward = true;
  call.grad = heads_of(grad, q, "grad");
  call.out = heads_of(out, q, "out");
  call.d_q = heads_of(d_q, q, "d_q");
  call.d_k = heads_of(d_k, k, "d_k");
  call.d_v = heads_of(d_v, v, "d_v");
  call.lse = data_of<float>(lse, q, ScalarType::Float, call.heads * call.queries, "lse");
  run(call, q_starts.numel() - 1);
}

}  // namespace
}  // namespace lpa::cpu

STABLE_TORCH_LIBRARY_IMPL(lpa_kernels_native, CPU, library) {
  library.impl("add_norm", TORCH_BOX(&lpa::cpu::add_norm));
  library.impl("add_norm_backward", TORCH_BOX(&lpa::cpu::add_norm_backward));
  library.impl("swiglu", TORCH_BOX(&lpa::cpu::swiglu));
  library.impl("swiglu_backward_", TORCH_BOX(&lpa::cpu::swiglu_backward_));
  library.impl("attention", TORCH_BOX(&lpa::cpu::attention));
  library.impl("attention_backward_", TORCH_BOX(&lpa::cpu::attention_backward_));
}
