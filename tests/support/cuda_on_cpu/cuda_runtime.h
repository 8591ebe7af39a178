// Stands in for CUDA's runtime, so that g++ compiles a kernel's own source and the kernel runs on a CPU.
//
// Blocks run one after another. The threads of a block are fibers that give way at barriers and shuffles alone, in one
// of five orders, so that a result which hangs on their order shows. What CUDA leaves undefined fails the launch: a
// barrier that a thread does not reach, a shuffle that a lane is missing from, an access that is not aligned.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using std::isfinite;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(int64_t x, int64_t y = 1) : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

namespace on_cpu {

enum class Order { first_to_last, last_to_first, random, first_warp_alone, last_warp_alone };
enum class State { ready, at_barrier, at_shuffle, gone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  int shuffled;  // how often
  int by;        // of the shuffle where it waits
};

constexpr size_t kStack = 64 << 10, kPoisoned = 8 << 10;  // of a fiber, in bytes; poisoned where a kernel's frame lies
constexpr unsigned kWarp = 32, kMaxThreads = 1024;

inline Order order = Order::first_to_last;
inline const char* error = nullptr;  // why the last launch failed
inline Fiber fibers[kMaxThreads];
inline uint32_t lanes[2][kMaxThreads];
inline unsigned now = 0;  // the fiber that runs
inline bool in_kernel = false;
inline std::jmp_buf host;  // where host code goes that fails
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 generator;

inline void give_way(State state) {
  fibers[now].state = state;
  swapcontext(&fibers[now].context, &scheduler);
}

inline void enter() {
  body();
  give_way(State::gone);
}

[[noreturn]] inline void fail(const char* why) {
  error = why;
  if (!in_kernel) std::longjmp(host, 1);
  give_way(State::gone);
  __builtin_unreachable();
}

inline void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  std::memset(fiber.stack.get() + kStack - kPoisoned, 'K', kPoisoned);  // as floats 1.3e7, so that what is read unset shows
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, enter, 0);
  fiber.state = State::ready;
  fiber.shuffled = 0;
}

// Lets each fiber that is ready run until it gives way; says whether any ran.
inline bool run_ready(unsigned count) {
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == Order::last_to_first || order == Order::last_warp_alone) std::reverse(turns.begin(), turns.end());
  if (order == Order::random) std::shuffle(turns.begin(), turns.end(), generator);
  const bool alone = order == Order::first_warp_alone || order == Order::last_warp_alone;
  unsigned warp = kMaxThreads;
  for (unsigned i : turns) {
    if (fibers[i].state != State::ready || (alone && warp != kMaxThreads && i / kWarp != warp)) continue;
    now = i;
    warp = i / kWarp;
    threadIdx.x = i % blockDim.x;
    threadIdx.y = i / blockDim.x;
    in_kernel = true;
    swapcontext(&scheduler, &fibers[i].context);
    in_kernel = false;
    if (error) return true;
  }
  return warp != kMaxThreads;
}

// Lets on each warp whose lanes have all come to the same shuffle.
inline void finish_shuffles(unsigned count) {
  for (Fiber* warp = fibers; warp < fibers + count; warp += kWarp) {
    if (warp->state != State::at_shuffle) continue;
    const auto same = [&](const Fiber& f) { return f.state == State::at_shuffle && f.by == warp->by; };
    if (!std::all_of(warp, warp + kWarp, same)) continue;
    for (Fiber* f = warp; f < warp + kWarp; ++f) f->state = State::ready;
  }
}

inline void run_block() {
  const unsigned count = blockDim.x * blockDim.y;
  for (unsigned i = 0; i < count; ++i) start(fibers[i]);
  const auto all = [&](State state) {
    return std::all_of(fibers, fibers + count, [&](const Fiber& f) { return f.state == state; });
  };
  while (!error && !all(State::gone)) {
    finish_shuffles(count);
    if (run_ready(count)) continue;
    if (!all(State::at_barrier)) {
      error = "threads wait at a barrier or a shuffle that others of them do not reach";
    }
    for (unsigned i = 0; i < count; ++i) fibers[i].state = State::ready;
  }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::give_way(on_cpu::State::at_barrier); }

// Lanes put their values by turns into two places, so that none is overwritten before all have read it.
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  if (mask != 0xffffffffu || by < 0 || by >= int(on_cpu::kWarp)) on_cpu::fail("a shuffle of other than whole warps");
  const unsigned me = on_cpu::now;
  on_cpu::Fiber& fiber = on_cpu::fibers[me];
  uint32_t* const place = on_cpu::lanes[fiber.shuffled++ % 2];
  std::memcpy(place + me, &x, sizeof x);
  fiber.by = by;
  on_cpu::give_way(on_cpu::State::at_shuffle);
  std::memcpy(&x, place + (me ^ static_cast<unsigned>(by)), sizeof x);
  return x;
}

template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... rest) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const uint64_t threads = uint64_t{blockDim.x} * blockDim.y;
  if (!threads || threads > on_cpu::kMaxThreads || threads % on_cpu::kWarp || !gridDim.x || !gridDim.y ||
      gridDim.x > 0x7fffffffu || gridDim.y > 65535) {
    on_cpu::error = "a launch that CUDA refuses";
    return cudaErrorInvalidConfiguration;
  }
  on_cpu::body = [&] { kernel(rest...); };
  const bool reversed = on_cpu::order == on_cpu::Order::last_to_first;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y;
  for (uint64_t i = 0; i < blocks && !on_cpu::error; ++i) {
    const uint64_t block = reversed ? blocks - 1 - i : i;
    blockIdx.x = static_cast<unsigned>(block % gridDim.x);
    blockIdx.y = static_cast<unsigned>(block / gridDim.x);
    on_cpu::run_block();
  }
  return on_cpu::error ? cudaErrorLaunchFailure : cudaSuccess;
}
