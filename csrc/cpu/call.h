// What the bindings of the CPU's ops share: runs over rows on all threads, and the rows of delta that a call names.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../arguments.h"

namespace lpa::cpu {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// body(begin, end) for parts of [0, rows), rows of `width` elements.
template <class Body>
void over_rows(int64_t rows, int64_t width, Body body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, body);
}

// The largest of `numbers`; -1 where there are none.
inline int64_t largest_of(const int64_t* numbers, int64_t count) {
  return count ? *std::max_element(numbers, numbers + count) : -1;
}

// For each token of x [tokens, width] the row of delta [rows, width] that it gets, negative for none.
inline const int64_t* rows_of(const Tensor& rows, const Tensor& delta, const Tensor& x) {
  STD_TORCH_CHECK(delta.dim() == 2 && delta.size(1) == x.size(1), "delta is not [rows, ", x.size(1), "]");
  const int64_t* own = data_of<int64_t>(rows, x, ScalarType::Long, x.size(0), "rows");
  const int64_t last = largest_of(own, x.size(0));
  STD_TORCH_CHECK(last < delta.size(0), "rows names row ", last, " of a delta of ", delta.size(0), " rows");
  return own;
}

}  // namespace lpa::cpu
