// The ops of a frozen block on the CPU, as torch.ops.lpa_kernels_native.*; see ops.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"
#include "cpu/kernels.h"

namespace lpa::cpu {
namespace {

// A matrix of the shape and dtype of `like`.
Matrix like(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1) &&
                      tensor.scalar_type() == like.scalar_type(),
                  name, " has another shape or dtype than the first argument");
  return lines_of(tensor, like, name);
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
  if (residual) call.residual = like(*residual, x, "residual");
  const bool attacked = delta && delta->size(0) > 0;
  if (attacked) {
    STD_TORCH_CHECK(rows && delta->dim() == 2 && delta->size(1) == call.width, "delta is not [rows, ", call.width, "]");
    call.delta = data_of<float>(*delta, x, ScalarType::Float, delta->size(0) * call.width, "delta");
    call.rows = data_of<int64_t>(*rows, x, ScalarType::Long, tokens, "rows");
    const int64_t last = tokens ? *std::max_element(call.rows, call.rows + tokens) : -1;
    STD_TORCH_CHECK(last < delta->size(0), "rows names row ", last, " of a delta of ", delta->size(0), " rows");
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
    torch::stable::parallel_for(0, tokens, grain_of(call.width), [&](int64_t begin, int64_t end) {
      kernels().add_norm_rows(call, begin, end);
    });
  }
  return {r, normed, rstd};
}

Tensor add_norm_backward(Tensor grad, Tensor r, Tensor rstd, Tensor weight, std::optional<Tensor> residual) {
  AddNormBackward call{};
  call.r = lines_of(r, r, "r");
  const int64_t tokens = r.size(0);
  call.width = r.size(1);
  call.grad = like(grad, r, "grad");
  if (residual) call.residual = like(*residual, r, "residual");
  call.rstd = data_of<float>(rstd, r, ScalarType::Float, tokens, "rstd");
  call.weight = data_of<float>(weight, r, ScalarType::Float, call.width, "weight");
  Tensor out = torch::stable::new_empty(r, {tokens, call.width});
  call.out = out.data_ptr();
  torch::stable::parallel_for(0, tokens, grain_of(call.width), [&](int64_t begin, int64_t end) {
    kernels().add_norm_backward_rows(call, begin, end);
  });
  return out;
}

Gate gate_of(const Tensor& gate, const Tensor& up, const std::string& activation) {
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", "activation='", activation,
                  "'; the native kernels have silu and gelu_tanh");
  Gate call{};
  call.gate = lines_of(gate, gate, "gate");
  call.up = like(up, gate, "up");
  call.width = gate.size(1);
  call.silu = activation == "silu";
  return call;
}

Tensor swiglu(Tensor gate, Tensor up, std::string activation) {
  Gate call = gate_of(gate, up, activation);
  Tensor out = torch::stable::new_empty(gate, {gate.size(0), call.width});
  call.out = out.data_ptr();
  torch::stable::parallel_for(0, gate.size(0), grain_of(call.width), [&](int64_t begin, int64_t end) {
    kernels().gate_rows(call, begin, end);
  });
  return out;
}

void swiglu_backward_(Tensor gate, Tensor up, Tensor grad, std::string activation) {
  Gate call = gate_of(gate, up, activation);
  call.grad = like(grad, gate, "grad");
  torch::stable::parallel_for(0, gate.size(0), grain_of(call.width), [&](int64_t begin, int64_t end) {
    kernels().gate_rows(call, begin, end);
  });
}

}  // namespace
}  // namespace lpa::cpu

STABLE_TORCH_LIBRARY_IMPL(lpa_kernels_native, CPU, library) {
  library.impl("add_norm", TORCH_BOX(&lpa::cpu::add_norm));
  library.impl("add_norm_backward", TORCH_BOX(&lpa::cpu::add_norm_backward));
  library.impl("swiglu", TORCH_BOX(&lpa::cpu::swiglu));
  library.impl("swiglu_backward_", TORCH_BOX(&lpa::cpu::swiglu_backward_));
}
