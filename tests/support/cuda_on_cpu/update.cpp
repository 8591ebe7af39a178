// pgd_update_ of csrc/cuda as a C function that tests call, with what UBSan finds as a failed launch.
#include "cuda/update.cu"

#define LPA_UNDEFINED(name, why) \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort() { on_cpu::fail(why); }
LPA_UNDEFINED(type_mismatch_v1, "an access that is null or not aligned")
LPA_UNDEFINED(pointer_overflow, "a pointer that leaves its object or starts at null")
LPA_UNDEFINED(out_of_bounds, "an index beyond an array")
LPA_UNDEFINED(shift_out_of_bounds, "a shift by too much")
LPA_UNDEFINED(add_overflow, "an integer sum that overflows")
LPA_UNDEFINED(sub_overflow, "an integer difference that overflows")
LPA_UNDEFINED(mul_overflow, "an integer product that overflows")
LPA_UNDEFINED(negate_overflow, "a negation that overflows")

// Tensors as pointers, settings as numbers; `grads` is [sites, 4]: data, strides of rows and columns, dtype. Returns
// null, or why a launch failed.
extern "C" const char* pgd_update(int order, float* delta, float* exp_avg, float* exp_avg_sq, const int64_t* grads,
                                  const int64_t* tokens, const float* step, const float* step_size,
                                  const float* epsilon, float* norms, int32_t* clipped, int64_t sites, int64_t rows,
                                  int64_t width, int64_t shares, int per_row, int maximize, int rule, int norm,
                                  double beta1, double beta2, double eps, double weight_decay) {
  const lpa::Update call{delta, exp_avg, exp_avg_sq, norms, clipped, tokens, step, step_size, epsilon,
                         sites, rows, width, shares, per_row != 0, maximize != 0, lpa::Rule(rule), lpa::Norm(norm),
                         beta1, beta2, std::log(beta1), std::log(beta2), eps, weight_decay};
  std::vector<lpa::Matrix> matrices;
  for (int64_t i = 0; i < sites; ++i) {
    const int64_t* grad = grads + 4 * i;
    matrices.push_back({reinterpret_cast<void*>(grad[0]), grad[1], grad[2], lpa::Dtype(grad[3])});
  }
  on_cpu::order = on_cpu::Order(order);
  on_cpu::error = nullptr;
  on_cpu::generator.seed(1);
  if (setjmp(on_cpu::host)) return on_cpu::error;
  return lpa::cuda::launch_update(call, matrices.data(), nullptr) == cudaSuccess ? nullptr : on_cpu::error;
}
