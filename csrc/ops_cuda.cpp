// pgd_update_ on CUDA, as torch.ops.lpa_kernels_native.pgd_update_.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "arguments.h"
#include "cuda/update.h"

namespace lpa::cuda {
namespace {

// Checks shapes and pointers on the host, reads nothing from the device: a call can be captured in a CUDA graph. Token
// numbers are therefore not checked against the gradients.
void pgd_update_(Tensor delta, std::optional<Tensor> exp_avg, std::optional<Tensor> exp_avg_sq,
                 std::vector<Tensor> grads, Tensor tokens, Tensor step, Tensor step_size, Tensor epsilon,
                 Tensor norms, Tensor clipped, std::string rule, std::string norm, bool maximize, double beta1,
                 double beta2, double eps, double weight_decay) {
  const Update call = update_of(delta, exp_avg, exp_avg_sq, grads, tokens, step, step_size, epsilon, norms, clipped,
                                rule, norm, maximize, beta1, beta2, eps, weight_decay);
  std::vector<Matrix> matrices;
  for (const Tensor& grad : grads) matrices.push_back(matrix_of(grad, "a gradient"));
  const torch::stable::accelerator::DeviceGuard guard(delta.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(delta.get_device_index(), &stream));
  STD_CUDA_CHECK(launch_update(call, matrices.data(), static_cast<cudaStream_t>(stream)));
}

}  // namespace
}  // namespace lpa::cuda

STABLE_TORCH_LIBRARY_IMPL(lpa_kernels_native, CUDA, library) {
  library.impl("pgd_update_", TORCH_BOX(&lpa::cuda::pgd_update_));
}
