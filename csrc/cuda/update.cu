// pgd_update_ on CUDA: one pass over delta, its moments and the gradients of all sites in one launch.
//
// A row belongs to one warp (narrow rows, four to a block) or to one block. Its new delta stays in registers until
// the norm is known, so that every byte of state is read once and written once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>

#include "update.h"

namespace lpa::cuda {
namespace {

constexpr int kVector = 4;        // floats in 16 bytes
constexpr int kChunks = 4;        // vectors that a thread keeps in registers
constexpr int kMaxThreads = 1024;
constexpr int kNarrowRows = 4;    // rows of a block where a row is one warp's

struct Gradient {
  const void* data;
  int64_t row_stride, column_stride;
  Dtype dtype;
  bool vector;  // 4 neighbours can be read at once
};

struct Gradients {  // a kernel argument, so that no pointer table has to be copied to the device
  Gradient site[kMaxSites];
};

template <int V>
struct alignas(4 * V) Numbers {
  float x[V];
};

template <int V>
__device__ Numbers<V> load(const float* p) {
  Numbers<V> out;
  if constexpr (V == 4) {
    *reinterpret_cast<float4*>(out.x) = *reinterpret_cast<const float4*>(p);
  } else {
    out.x[0] = *p;
  }
  return out;
}

template <int V>
__device__ void store(float* p, const Numbers<V>& value) {
  if constexpr (V == 4) {
    *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(value.x);
  } else {
    *p = value.x[0];
  }
}

__device__ float element(const Gradient& grad, int64_t index) {
  switch (grad.dtype) {
    case Dtype::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(grad.data)[index]);
    case Dtype::float16: return __half2float(static_cast<const __half*>(grad.data)[index]);
    default: return static_cast<const float*>(grad.data)[index];
  }
}

template <int V>
__device__ void add_token(Numbers<V>& out, const Gradient& grad, int64_t token, int column) {
  if (token < 0) return;
  const int64_t index = token * grad.row_stride + column * grad.column_stride;
  if (V == 4 && grad.vector) {
    if (grad.dtype == Dtype::float32) {
      const Numbers<V> raw = load<V>(static_cast<const float*>(grad.data) + index);
      for (int i = 0; i < V; ++i) out.x[i] += raw.x[i];
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(grad.data) + index);
      const uint16_t bits[4] = {uint16_t(raw.x), uint16_t(raw.x >> 16), uint16_t(raw.y), uint16_t(raw.y >> 16)};
      for (int i = 0; i < V; ++i) {
        out.x[i] += grad.dtype == Dtype::float16 ? __half2float(__ushort_as_half(bits[i]))
                                                 : __uint_as_float(static_cast<uint32_t>(bits[i]) << 16);
      }
    }
  } else {
    for (int i = 0; i < V; ++i) out.x[i] += element(grad, index + i * grad.column_stride);
  }
}

// The sum of the row's token gradients; an entry that is not finite counts as 0.
template <int V>
__device__ Numbers<V> gradient(const Gradient& grad, const int64_t (&tokens)[2], int column, float sign) {
  Numbers<V> out{};
  add_token(out, grad, tokens[0], column);
  add_token(out, grad, tokens[1], column);
  for (int i = 0; i < V; ++i) out.x[i] = isfinite(out.x[i]) ? out.x[i] * sign : 0.0f;
  return out;
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Largest {  // NaN if either is
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// `x` of all threads of the row, combined; every thread gets the result. All threads of the block take part.
template <class Combine>
__device__ float over_row(float x, Combine combine) {
  for (int lane = 16; lane; lane /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, lane));
  if (blockDim.x == 32) return x;
  __shared__ float warps[kMaxThreads / 32];
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) x = combine(x, warps[warp]);
  return x;
}

// chunks is the number of vectors a thread holds; 0 for rows of any width, whose delta is read again to project it.
template <Rule rule, int V, int chunks>
__global__ void __launch_bounds__(kMaxThreads, 1) update_kernel(const __grid_constant__ Update call,
                                                             const __grid_constant__ Gradients grads, int64_t first) {
  constexpr bool kept = chunks > 0;
  constexpr int kHeld = kept ? chunks : 1;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;  // a whole warp or a whole block
  const int64_t site = first + blockIdx.y, index = site * call.rows + row, offset = index * call.width;
  const Gradient& grad = grads.site[blockIdx.y];
  const int64_t own = row * call.shares;
  const int64_t tokens[2] = {call.row_tokens[own], call.shares == 2 ? call.row_tokens[own + 1] : -1};
  const bool live = tokens[0] >= 0 || tokens[1] >= 0;

  float* __restrict__ delta = call.delta + offset;
  float* __restrict__ exp_avg = call.exp_avg + offset;
  float* __restrict__ exp_avg_sq = call.exp_avg_sq + offset;
  const int width = static_cast<int>(call.width), begin = threadIdx.x * V, stride = blockDim.x * V;
  const float step_size = *call.step_size, sign = call.maximize ? -1.0f : 1.0f;
  Numbers<V> held[kHeld];  // the new delta (for Rule::normalised the gradient, first)

  // body(chunk, column) for each of this thread's vectors.
  const auto each = [&](auto body) {
    if constexpr (kept) {
#pragma unroll
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int column = begin + chunk * stride;
        if (column < width) body(chunk, column);
      }
    } else {
      for (int column = begin; column < width; column += stride) body(0, column);
    }
  };

  float scale = 0, correction = 0, decay = 1;
  if (rule == Rule::adamw) {
    const float step = *call.step;
    scale = step_size / -expm1f(step * static_cast<float>(call.log_beta1));
    correction = rsqrtf(-expm1f(step * static_cast<float>(call.log_beta2)));
    decay = 1.0f - step_size * static_cast<float>(call.weight_decay);
  }
  if (rule == Rule::normalised && live) {
    float power = 1, length = 0;
    for (int attempt = 0; attempt < 2; ++attempt) {
      float squares = 0;
      each([&](int chunk, int column) {
        if (!kept || attempt == 0) held[chunk] = gradient<V>(grad, tokens, column, sign);
        for (int i = 0; i < V; ++i) squares += (held[chunk].x[i] * power) * (held[chunk].x[i] * power);
      });
      squares = over_row(squares, Sum());
      length = sqrtf(squares);
      if (squares > 1e-24f && squares < 1e36f) break;
      power = squares > 1 ? 0x1p-64f : 0x1p64f;  // squares that leave float32's range: once more in other units
    }
    scale = length > 0 ? step_size * power / length : 0.0f;
  }

  const bool linf = call.norm == Norm::linf;
  float part = 0;
  each([&](int chunk, int column) {
    Numbers<V> d = load<V>(delta + column);
    if (live) {
      const Numbers<V> g =
          kept && rule == Rule::normalised ? held[chunk] : gradient<V>(grad, tokens, column, sign);
      if (rule == Rule::adamw) {
        const float beta1 = call.beta1, rest1 = 1 - call.beta1, beta2 = call.beta2, rest2 = 1 - call.beta2;
        Numbers<V> m = load<V>(exp_avg + column), v = load<V>(exp_avg_sq + column);
        for (int i = 0; i < V; ++i) {
          m.x[i] = m.x[i] * beta1 + g.x[i] * rest1;
          v.x[i] = v.x[i] * beta2 + g.x[i] * g.x[i] * rest2;
          d.x[i] = d.x[i] * decay - scale * m.x[i] / (sqrtf(v.x[i]) * correction + static_cast<float>(call.eps));
        }
        store(exp_avg + column, m);
        store(exp_avg_sq + column, v);
      } else if (rule == Rule::normalised) {
        for (int i = 0; i < V; ++i) d.x[i] -= scale * g.x[i];
      } else {
        for (int i = 0; i < V; ++i) d.x[i] -= g.x[i] > 0 ? step_size : (g.x[i] < 0 ? -step_size : 0.0f);
      }
    }
    for (int i = 0; i < V; ++i) part = linf ? Largest()(part, fabsf(d.x[i])) : part + d.x[i] * d.x[i];
    held[chunk] = d;
    if (!kept && live) store(delta + column, d);
  });

  const float length = linf ? over_row(part, Largest()) : sqrtf(over_row(part, Sum()));
  const float radius = call.epsilon[call.epsilon_per_row ? index : 0];
  const bool outside = live && call.norm != Norm::none && length > radius;
  if (threadIdx.x == 0) {
    call.norms[index] = length;
    if (outside) atomicAdd(call.clipped + site, 1);
  }
  if (!live || (!kept && !outside)) return;
  const float shrink = outside && !linf ? radius / length : 1.0f, box = outside && linf ? radius : INFINITY;
  each([&](int chunk, int column) {
    Numbers<V> d = kept ? held[chunk] : load<V>(delta + column);
    for (int i = 0; i < V; ++i) {
      const float x = d.x[i] * shrink;
      d.x[i] = x > box ? box : (x < -box ? -box : x);  // a NaN stays one; fminf would hide it
    }
    store(delta + column, d);
  });
}

template <Rule rule>
cudaError_t launch(const Update& call, const Gradients& grads, int64_t first, int64_t count, bool vector,
                   cudaStream_t stream) {
  const int64_t vectors = vector ? call.width / kVector : call.width;
  int threads = 32;
  while (threads < kMaxThreads && int64_t{threads} * kChunks < vectors) threads *= 2;
  const bool kept = vector && int64_t{threads} * kChunks >= vectors;
  const dim3 block(threads, threads == 32 ? kNarrowRows : 1);
  const dim3 grid((call.rows + block.y - 1) / block.y, count);
  if (kept) {
    update_kernel<rule, kVector, kChunks><<<grid, block, 0, stream>>>(call, grads, first);
  } else if (vector) {
    update_kernel<rule, kVector, 0><<<grid, block, 0, stream>>>(call, grads, first);
  } else {
    update_kernel<rule, 1, 0><<<grid, block, 0, stream>>>(call, grads, first);
  }
  return cudaGetLastError();
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

cudaError_t launch_update(const Update& call, const Matrix* grads, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  const bool vector = call.width % kVector == 0 && aligned(call.delta, 16) && aligned(call.exp_avg, 16) &&
                      aligned(call.exp_avg_sq, 16);
  for (int64_t first = 0; first < call.sites; first += kMaxSites) {
    const int64_t count = std::min<int64_t>(kMaxSites, call.sites - first);
    Gradients batch{};
    for (int64_t i = 0; i < count; ++i) {
      const Matrix& grad = grads[first + i];
      const uintptr_t bytes = grad.dtype == Dtype::float32 ? 16 : 8;
      batch.site[i] = {grad.data, grad.row_stride, grad.column_stride, grad.dtype,
                       grad.column_stride == 1 && grad.row_stride % kVector == 0 && aligned(grad.data, bytes)};
    }
    cudaError_t status = cudaSuccess;
    if (call.rule == Rule::adamw) {
      status = launch<Rule::adamw>(call, batch, first, count, vector, stream);
    } else if (call.rule == Rule::normalised) {
      status = launch<Rule::normalised>(call, batch, first, count, vector, stream);
    } else {
      status = launch<Rule::sign>(call, batch, first, count, vector, stream);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace lpa::cuda
