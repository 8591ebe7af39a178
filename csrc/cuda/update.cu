// pgd_update_ on CUDA: one pass over delta, its moments and the gradients of all sites of a dtype in one launch.
//
// A row belongs to one warp (narrow rows, four to a block) or to one block. Each thread issues all loads of its part
// before it uses the first, and none but the gradients' waits for another. A row of up to 8192 floats stays in
// registers until its norm is known, so that every byte of state is read once and written once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "update.h"

namespace lpa::cuda {
namespace {

constexpr int kVector = 4;        // floats in 16 bytes
constexpr int kChunks = 4;        // vectors that a thread holds at once
constexpr int kMaxThreads = 512;  // leaves a thread 128 registers
constexpr int kNarrowRows = 4;    // rows of a block where a row is one warp's

struct Gradient {
  const void* data;
  int64_t row_stride, column_stride;
};

struct Gradients {  // a kernel argument, so that no pointer table has to be copied to the device
  Gradient site[kMaxSites];
};

struct Coefficients {  // as the device computes with them
  float beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay, sign;
};

// Neighbours in memory, read and written at once.
template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T x[V];
};

template <class T, int V>
using Held = Vector<T, V>[kChunks];

// The columns of a thread: those of vector k start at `of(k)`.
struct Columns {
  int first, step, width;
  __device__ int of(int k) const { return first + k * step; }
  __device__ bool hold(int k) const { return of(k) < width; }
};

__device__ float as_float(float x) { return x; }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float as_float(__half x) { return __half2float(x); }

// Columns of one row; zeros past its end.
template <class T, int V>
__device__ void load(Held<T, V>& out, const T* row, Columns at, int64_t column_stride = 1) {
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    out[k] = Vector<T, V>{};
    if (at.hold(k)) out[k] = *reinterpret_cast<const Vector<T, V>*>(row + at.of(k) * column_stride);
  }
}

template <int V>
__device__ void store(float* row, const Held<float, V>& values, Columns at) {
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    if (at.hold(k)) *reinterpret_cast<Vector<float, V>*>(row + at.of(k)) = values[k];
  }
}

// body(x, k, i) for every number x = values[k].x[i].
template <int V, class Body>
__device__ void each(Held<float, V>& values, Body body) {
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
#pragma unroll
    for (int i = 0; i < V; ++i) body(values[k].x[i], k, i);
  }
}

// The sum of the row's token gradients, times `sign`; an entry that is not finite counts as 0.
template <class T, int V>
__device__ void gradient(Held<float, V>& out, const Gradient& grad, const int64_t (&tokens)[2], Columns at,
                         float sign) {
  Held<T, V> raw[2]{};
#pragma unroll
  for (int share = 0; share < 2; ++share) {
    if (tokens[share] < 0) continue;
    const T* row = static_cast<const T*>(grad.data) + tokens[share] * grad.row_stride;
    load<T, V>(raw[share], row, at, V == 1 ? grad.column_stride : 1);
  }
  each<V>(out, [&](float& x, int k, int i) {
    const float sum = as_float(raw[0][k].x[i]) + as_float(raw[1][k].x[i]);
    x = isfinite(sum) ? sum * sign : 0.0f;
  });
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

// `kept` is for rows that their threads hold whole. Those of other rows hold a span of them at a time, and read delta
// again to project it.
template <class T, Rule rule, int V, bool kept>
__global__ void __launch_bounds__(kMaxThreads, 1)
    update_kernel(const __grid_constant__ Update call, const __grid_constant__ Coefficients c,
                  const __grid_constant__ Gradients grads, int64_t first) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.rows) return;  // a whole warp or a whole block
  const int64_t site = first + blockIdx.y, index = site * call.rows + row, offset = index * call.width;
  const int width = static_cast<int>(call.width), step = static_cast<int>(blockDim.x) * V;
  const int begin = static_cast<int>(threadIdx.x) * V, end = kept ? 1 : width;
  const int64_t* const own = call.row_tokens + row * call.shares;
  const int64_t tokens[2] = {own[0], call.shares == 2 ? own[1] : -1};
  const bool live = tokens[0] >= 0 || tokens[1] >= 0;
  const Gradient& grad = grads.site[blockIdx.y];

  const float step_size = *call.step_size, t = *call.step;
  const float radius = call.epsilon[call.epsilon_per_row ? index : 0];
  float* const delta = call.delta + offset;
  Held<float, V> d, g, m, v;
  float scale = 0;
  if (rule == Rule::normalised) {
    if (kept) load<float, V>(d, delta, {begin, step, width});
    float power = 1, length = 0;
    for (int attempt = 0; live && attempt < 2; ++attempt) {
      float squares = 0;
      for (int base = 0; base < end; base += kChunks * step) {
        const Columns at{base + begin, step, width};
        if (!kept || attempt == 0) gradient<T, V>(g, grad, tokens, at, c.sign);
        each<V>(g, [&](float x, int, int) { squares += (x * power) * (x * power); });
      }
      squares = over_row(squares, Sum());
      length = sqrtf(squares);
      if (squares > 1e-24f && squares < 1e36f) break;
      power = squares > 1 ? 0x1p-64f : 0x1p64f;  // squares that leave float32's range: once more in other units
    }
    scale = length > 0 ? step_size * power / length : 0.0f;
  }

  const bool linf = call.norm == Norm::linf;
  float part = 0;
  for (int base = 0; base < end; base += kChunks * step) {
    const Columns at{base + begin, step, width};
    if (!kept || rule != Rule::normalised) {
      load<float, V>(d, delta, at);
      if (rule == Rule::adamw) {
        load<float, V>(m, call.exp_avg + offset, at);
        load<float, V>(v, call.exp_avg_sq + offset, at);
      }
      gradient<T, V>(g, grad, tokens, at, c.sign);
    }
    float correction = 0, decay = 1;
    if (rule == Rule::adamw) {  // here, because it waits for step and step_size
      scale = step_size / -expm1f(t * c.log_beta1);
      correction = rsqrtf(-expm1f(t * c.log_beta2));
      decay = 1.0f - step_size * c.weight_decay;
    }
    if (live) {
      each<V>(d, [&](float& x, int k, int i) {
        const float slope = g[k].x[i];
        if (rule == Rule::adamw) {
          float &mean = m[k].x[i], &square = v[k].x[i];
          mean = mean * c.beta1 + slope * c.rest1;
          square = square * c.beta2 + slope * slope * c.rest2;
          x = x * decay - scale * mean / (sqrtf(square) * correction + c.eps);
        } else if (rule == Rule::normalised) {
          x -= scale * slope;
        } else {
          x -= slope > 0 ? step_size : (slope < 0 ? -step_size : 0.0f);
        }
      });
      if (rule == Rule::adamw) {
        store<V>(call.exp_avg + offset, m, at);
        store<V>(call.exp_avg_sq + offset, v, at);
      }
      if (!kept) store<V>(delta, d, at);
    }
    each<V>(d, [&](float x, int k, int) {
      if (!at.hold(k)) return;  // a step with eps = 0 makes NaN of the zeros there
      part = linf ? Largest()(part, fabsf(x)) : part + x * x;
    });
  }

  const float length = linf ? over_row(part, Largest()) : sqrtf(over_row(part, Sum()));
  const bool outside = live && call.norm != Norm::none && length > radius;
  if (threadIdx.x == 0) {
    call.norms[index] = length;
    if (outside) atomicAdd(call.clipped + site, 1);
  }
  if (!live || (!kept && !outside)) return;
  const float shrink = outside && !linf ? radius / length : 1.0f, box = outside && linf ? radius : INFINITY;
  for (int base = 0; base < end; base += kChunks * step) {
    const Columns at{base + begin, step, width};
    if (!kept) load<float, V>(d, delta, at);
    each<V>(d, [&](float& x, int, int) {
      x *= shrink;
      x = x > box ? box : (x < -box ? -box : x);  // a NaN stays one; fminf would hide it
    });
    store<V>(delta, d, at);
  }
}

template <class T, Rule rule>
cudaError_t launch(const Update& call, const Gradients& grads, int64_t first, int64_t count, bool vector,
                   cudaStream_t stream) {
  const int64_t vectors = vector ? call.width / kVector : call.width;
  int threads = 32;
  while (threads < kMaxThreads && int64_t{threads} * kChunks < vectors) threads *= 2;
  const bool kept = int64_t{threads} * kChunks >= vectors;
  const Coefficients c{static_cast<float>(call.beta1),     static_cast<float>(1 - call.beta1),
                       static_cast<float>(call.log_beta1), static_cast<float>(call.beta2),
                       static_cast<float>(1 - call.beta2), static_cast<float>(call.log_beta2),
                       static_cast<float>(call.eps),       static_cast<float>(call.weight_decay),
                       call.maximize ? -1.0f : 1.0f};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads, threads == 32 ? kNarrowRows : 1);
  config.gridDim = dim3((call.rows + config.blockDim.y - 1) / config.blockDim.y, count);
  config.stream = stream;
  const auto kernel = vector ? (kept ? update_kernel<T, rule, kVector, true> : update_kernel<T, rule, kVector, false>)
                             : update_kernel<T, rule, 1, false>;
  return cudaLaunchKernelEx(&config, kernel, call, c, grads, first);
}

template <class T>
cudaError_t launch(const Update& call, const Gradients& grads, int64_t first, int64_t count, bool vector,
                   cudaStream_t stream) {
  switch (call.rule) {
    case Rule::adamw: return launch<T, Rule::adamw>(call, grads, first, count, vector, stream);
    case Rule::normalised: return launch<T, Rule::normalised>(call, grads, first, count, vector, stream);
    default: return launch<T, Rule::sign>(call, grads, first, count, vector, stream);
  }
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether rows of delta, its moments and this gradient can be read a vector at a time.
bool in_vectors(const Update& call, const Matrix& grad) {
  const uintptr_t bytes = kVector * (grad.dtype == Dtype::float32 ? 4 : 2);
  return call.width % kVector == 0 && aligned(call.delta, 16) && aligned(call.exp_avg, 16) &&
         aligned(call.exp_avg_sq, 16) && grad.column_stride == 1 && grad.row_stride % kVector == 0 &&
         aligned(grad.data, bytes);
}

}  // namespace

cudaError_t launch_update(const Update& call, const Matrix* grads, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  for (int64_t first = 0, count; first < call.sites; first += count) {
    const Dtype dtype = grads[first].dtype;
    const bool vector = in_vectors(call, grads[first]);
    Gradients batch{};
    for (count = 0; count < kMaxSites && first + count < call.sites; ++count) {
      const Matrix& grad = grads[first + count];
      if (grad.dtype != dtype || in_vectors(call, grad) != vector) break;
      batch.site[count] = {grad.data, grad.row_stride, grad.column_stride};
    }
    const auto run = dtype == Dtype::float32    ? launch<float>
                     : dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>
                                                : launch<__half>;
    const cudaError_t status = run(call, batch, first, count, vector, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace lpa::cuda
