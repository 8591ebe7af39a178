// Checks the arguments of ops and turns them into plain numbers and pointers; the same for the CPU and CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "update.h"

namespace lpa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, name, " has a dtype that is none of float32, bfloat16, float16");
  }
}

// The matrix's memory; its last two strides are free.
inline Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions; expected 2");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor, name)};
}

// The same of a matrix whose columns lie side by side, where `beside` lives.
inline Matrix lines_of(const Tensor& tensor, const Tensor& beside, const char* name) {
  const Matrix matrix = matrix_of(tensor, name);
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, "the last stride of ", name, " is not 1");
  STD_TORCH_CHECK(tensor.device() == beside.device(), name, " is on another device than the first argument");
  return matrix;
}

// The memory of a contiguous tensor of one dtype that lives where `beside` does.
template <class T>
T* data_of(const Tensor& tensor, const Tensor& beside, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype; see the schema in lpa_kernels.ops");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " entries; expected ", numel);
  STD_TORCH_CHECK(tensor.device() == beside.device(), name, " is on another device than the first argument");
  return static_cast<T*>(tensor.data_ptr());
}

inline Update update_of(const Tensor& delta, const std::optional<Tensor>& exp_avg,
                        const std::optional<Tensor>& exp_avg_sq, const std::vector<Tensor>& grads,
                        const Tensor& tokens, const Tensor& step, const Tensor& step_size, const Tensor& epsilon,
                        const Tensor& norms, const Tensor& clipped, const std::string& rule, const std::string& norm,
                        bool maximize, double beta1, double beta2, double eps, double weight_decay) {
  STD_TORCH_CHECK(delta.dim() == 3, "delta has ", delta.dim(), " dimensions; expected [sites, rows, width]");
  Update call{};
  call.sites = delta.size(0);
  call.rows = delta.size(1);
  call.width = delta.size(2);
  STD_TORCH_CHECK(call.width < int64_t{1} << 30, "delta is ", call.width, " wide; expected less than 2^30");
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == call.rows, "tokens must be [", call.rows, ", 1 or 2]");
  call.shares = tokens.size(1);
  STD_TORCH_CHECK(call.shares == 1 || call.shares == 2, "tokens has ", call.shares, " columns; expected 1 or 2");
  if (rule == "adamw") {
    call.rule = Rule::adamw;
  } else if (rule == "normalised") {
    call.rule = Rule::normalised;
  } else {
    STD_TORCH_CHECK(rule == "sign", "rule='", rule, "'; the native kernels have adamw, normalised and sign");
    call.rule = Rule::sign;
  }
  if (norm == "none") {
    call.norm = Norm::none;
  } else if (norm == "l2") {
    call.norm = Norm::l2;
  } else {
    STD_TORCH_CHECK(norm == "linf", "norm='", norm, "'; the native kernels have l2, linf and none");
    call.norm = Norm::linf;
  }
  const int64_t rows = call.sites * call.rows;
  call.delta = data_of<float>(delta, delta, ScalarType::Float, rows * call.width, "delta");
  if (call.rule == Rule::adamw) {
    STD_TORCH_CHECK(exp_avg && exp_avg_sq, "rule='adamw' needs exp_avg and exp_avg_sq");
    call.exp_avg = data_of<float>(*exp_avg, delta, ScalarType::Float, rows * call.width, "exp_avg");
    call.exp_avg_sq = data_of<float>(*exp_avg_sq, delta, ScalarType::Float, rows * call.width, "exp_avg_sq");
  }
  call.row_tokens = data_of<int64_t>(tokens, delta, ScalarType::Long, call.rows * call.shares, "tokens");
  call.step = data_of<float>(step, delta, ScalarType::Float, 1, "step");
  call.step_size = data_of<float>(step_size, delta, ScalarType::Float, 1, "step_size");
  call.epsilon_per_row = epsilon.dim() != 0;
  call.epsilon = data_of<float>(epsilon, delta, ScalarType::Float, call.epsilon_per_row ? rows : 1, "epsilon");
  call.norms = data_of<float>(norms, delta, ScalarType::Float, rows, "norms");
  call.clipped = data_of<int32_t>(clipped, delta, ScalarType::Int, call.sites, "clipped");
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == call.sites, "there are ", grads.size(), " grads and ",
                  call.sites, " sites");
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(1) == call.width, "a gradient is not [tokens, ", call.width, "]");
    STD_TORCH_CHECK(grad.device() == delta.device(), "a gradient is on another device than delta");
  }
  call.maximize = maximize;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.log_beta1 = std::log(beta1);
  call.log_beta2 = std::log(beta2);
  call.eps = eps;
  call.weight_decay = weight_decay;
  return call;
}

}  // namespace lpa
