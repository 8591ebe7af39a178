// The CUDA kernel of pgd_update_; no torch in here, so that nvcc alone compiles it.
#pragma once

#include <cuda_runtime_api.h>

#include "../update.h"

namespace lpa::cuda {

// Enqueues the update of all sites on `stream`: one launch for up to kMaxSites of them. Pointers are to device memory,
// `grads` itself to host memory; nothing is allocated or waited for.
constexpr int kMaxSites = 64;
cudaError_t launch_update(const Update& call, const Matrix* grads, cudaStream_t stream);

}  // namespace lpa::cuda
