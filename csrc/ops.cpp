// The ops of an attack on the CPU, as torch.ops.lpa_kernels_native.*.
//
// Only the stable part of libtorch is used, so that one build serves every torch from 2.11 on. The schemas are those of
// lpa_kernels/ops/schema.py, defined in Python before this library is loaded.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"
#include "cpu/kernels.h"

namespace lpa::cpu {
namespace {

Tensor perturb(Tensor hidden, Tensor delta, Tensor rows) {
  Perturb call{};
  call.hidden = matrix_of(hidden, "hidden");
  const int64_t tokens = hidden.size(0);
  call.width = hidden.size(1);
  STD_TORCH_CHECK(hidden.stride(1) == 1 || call.width <= 1, "the last stride of hidden is not 1");
  STD_TORCH_CHECK(delta.dim() == 2 && delta.size(1) == call.width, "delta is not [rows, ", call.width, "]");
  STD_TORCH_CHECK(delta.scalar_type() == ScalarType::Float && delta.device() == hidden.device(),
                  "delta is not float32, or not where hidden is");
  STD_TORCH_CHECK(delta.stride(1) == 1 || call.width <= 1, "the last stride of delta is not 1");
  call.delta = static_cast<const float*>(delta.data_ptr());
  call.delta_stride = delta.stride(0);
  call.rows = data_of<int64_t>(rows, hidden, ScalarType::Long, tokens, "rows");
  const int64_t last = tokens ? *std::max_element(call.rows, call.rows + tokens) : -1;
  STD_TORCH_CHECK(last < delta.size(0), "rows names row ", last, " of a delta of ", delta.size(0), " rows");
  Tensor out = torch::stable::new_empty(hidden, {tokens, call.width});
  call.out = out.data_ptr();
  torch::stable::parallel_for(0, tokens, grain_of(call.width), [&](int64_t begin, int64_t end) {
    kernels().perturb_rows(call, begin, end);
  });
  return out;
}

void pgd_update_(Tensor delta, std::optional<Tensor> exp_avg, std::optional<Tensor> exp_avg_sq,
                 std::vector<Tensor> grads, Tensor tokens, Tensor step, Tensor step_size, Tensor epsilon,
                 Tensor norms, Tensor clipped, std::string rule, std::string norm, bool maximize, double beta1,
                 double beta2, double eps, double weight_decay) {
  const Update call = update_of(delta, exp_avg, exp_avg_sq, grads, tokens, step, step_size, epsilon, norms, clipped,
                                rule, norm, maximize, beta1, beta2, eps, weight_decay);
  const int64_t last = call.rows ? *std::max_element(call.row_tokens, call.row_tokens + call.rows * call.shares) : -1;
  std::vector<Matrix> matrices;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(last < grad.size(0), "tokens names token ", last, " of a gradient of ", grad.size(0), " tokens");
    matrices.push_back(matrix_of(grad, "a gradient"));
  }
  torch::stable::parallel_for(0, call.sites * call.rows, grain_of(call.width), [&](int64_t begin, int64_t end) {
    kernels().update_rows(call, matrices.data(), begin, end);
  });
  if (call.norm == Norm::none) return;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t* own = call.row_tokens + row * call.shares;
    if (std::all_of(own, own + call.shares, [](int64_t token) { return token < 0; })) continue;
    for (int64_t site = 0; site < call.sites; ++site) {
      const int64_t index = site * call.rows + row;
      call.clipped[site] += call.norms[index] > call.epsilon[call.epsilon_per_row ? index : 0];
    }
  }
}

std::tuple<Tensor, Tensor> token_loss_(Tensor logits, Tensor labels, Tensor away, std::optional<Tensor> weight,
                                       double threshold) {
  TokenLoss call{};
  call.logits = matrix_of(logits, "logits");
  const int64_t rows = logits.size(0);
  call.vocabulary = logits.size(1);
  STD_TORCH_CHECK(logits.stride(1) == 1 || call.vocabulary <= 1, "the last stride of logits is not 1");
  call.labels = data_of<int64_t>(labels, logits, ScalarType::Long, rows, "labels");
  call.away = data_of<bool>(away, logits, ScalarType::Bool, rows, "away");
  if (weight) call.weight = data_of<float>(*weight, logits, ScalarType::Float, rows, "weight");
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = call.labels[row];
    STD_TORCH_CHECK(label == kIgnored || (label >= 0 && label < call.vocabulary), "labels[", row, "] is ", label,
                    "; expected -100 or 0 to ", call.vocabulary - 1);
  }
  Tensor losses = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor hits = torch::stable::new_empty(logits, {rows}, ScalarType::Bool);
  call.threshold = threshold;
  call.losses = static_cast<float*>(losses.data_ptr());
  call.hits = static_cast<bool*>(hits.data_ptr());
  torch::stable::parallel_for(0, rows, grain_of(call.vocabulary), [&](int64_t begin, int64_t end) {
    kernels().token_loss_rows(call, begin, end);
  });
  return {losses, hits};
}

std::string cpu_kernels() { return kernels().name; }

}  // namespace
}  // namespace lpa::cpu

STABLE_TORCH_LIBRARY_IMPL(lpa_kernels_native, CPU, library) {
  library.impl("perturb", TORCH_BOX(&lpa::cpu::perturb));
  library.impl("pgd_update_", TORCH_BOX(&lpa::cpu::pgd_update_));
  library.impl("token_loss_", TORCH_BOX(&lpa::cpu::token_loss_));
}

STABLE_TORCH_LIBRARY_FRAGMENT(lpa_kernels_native, library) { library.def("cpu_kernels() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(lpa_kernels_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_kernels", TORCH_BOX(&lpa::cpu::cpu_kernels));
}
