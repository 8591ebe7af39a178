// The ops of an attack on the CPU, as torch.ops.lpa_kernels_native.*.
//
// Only the stable part of libtorch is used, so that one build serves every torch from 2.11 on. The schemas are those of
// lpa_kernels/ops/schema.py, defined in Python before this library is loaded.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"
#include "cpu/call.h"
#include "cpu/kernels.h"

namespace lpa::cpu {
namespace {

Tensor perturb(Tensor hidden, Tensor delta, Tensor rows) {
  Perturb call{};
  call.hidden = lines_of(hidden, hidden, "hidden");
  const int64_t tokens = hidden.size(0);
  call.width = hidden.size(1);
  call.rows = rows_of(rows, delta, hidden);
  const Matrix deltas = lines_of(delta, hidden, "delta");
  STD_TORCH_CHECK(deltas.dtype == Dtype::float32, "delta is not float32");
  call.delta = static_cast<const float*>(deltas.data);
  call.delta_stride = deltas.row_stride;
  Tensor out = torch::stable::new_empty(hidden, {tokens, call.width});
  call.out = out.data_ptr();
  over_rows(tokens, call.width, [&](int64_t begin, int64_t end) { kernels().perturb_rows(call, begin, end); });
  return out;
}

void pgd_update_(Tensor delta, std::optional<Tensor> exp_avg, std::optional<Tensor> exp_avg_sq,
                 std::vector<Tensor> grads, Tensor tokens, Tensor step, Tensor step_size, Tensor epsilon,
                 Tensor norms, Tensor clipped, std::string rule, std::string norm, bool maximize, double beta1,
                 double beta2, double eps, double weight_decay) {
  const Update call = update_of(delta, exp_avg, exp_avg_sq, grads, tokens, step, step_size, epsilon, norms, clipped,
                                rule, norm, maximize, beta1, beta2, eps, weight_decay);
  const int64_t last = largest_of(call.row_tokens, call.rows * call.shares);
  std::vector<Matrix> matrices;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(last < grad.size(0), "tokens names token ", last, " of a gradient of ", grad.size(0), " tokens");
    matrices.push_back(matrix_of(grad, "a gradient"));
  }
  over_rows(call.sites * call.rows, call.width, [&](int64_t begin, int64_t end) {
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
  call.logits = lines_of(logits, logits, "logits");
  const int64_t rows = logits.size(0);
  call.vocabulary = logits.size(1);
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
  over_rows(rows, call.vocabulary, [&](int64_t begin, int64_t end) { kernels().token_loss_rows(call, begin, end); });
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
