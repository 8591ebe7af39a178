// The ops of an attack over a range of rows, written once for every vector width (see simd.h).

#include "kernels.h"
#include "simd.h"

namespace lpa::cpu {
namespace {

// ---- perturb ----

template <class T>
void perturb_row(const Perturb& call, int64_t token) {
  const T* x = static_cast<const T*>(call.hidden.data) + token * call.hidden.row_stride;
  T* out = static_cast<T*>(call.out) + token * call.width;
  if (call.rows[token] < 0) {
    __builtin_memcpy(out, x, call.width * sizeof(T));
    return;
  }
  const float* delta = call.delta + call.rows[token] * call.delta_stride;
  sweep(call.width, [&](int64_t i, int64_t k) LPA_LAMBDA { store(out + i, load(x + i, k) + load(delta + i, k), k); });
}

void perturb_rows(const Perturb& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (call.hidden.dtype == Dtype::float32) perturb_row<float>(call, token);
    if (call.hidden.dtype == Dtype::bfloat16) perturb_row<bfloat16>(call, token);
    if (call.hidden.dtype == Dtype::float16) perturb_row<float16>(call, token);
  }
}

// ---- pgd_update_ ----

constexpr int64_t kBlock = 512;  // columns whose gradient is held in float32 at once, in the first-level cache

// out[i] = columns [begin, begin + n) of one row of a matrix; added to what is there if `add`.
template <class T>
LPA_INLINE void read_row(const Matrix& matrix, int64_t row, int64_t begin, int64_t n, bool add, float* out) {
  const T* p = static_cast<const T*>(matrix.data) + row * matrix.row_stride + begin * matrix.column_stride;
  if (matrix.column_stride == 1) {
    sweep(n, [&](int64_t i, int64_t k) LPA_LAMBDA {
      const VFloat x = load(p + i, k);
      store(out + i, add ? load(out + i, k) + x : x, k);
    });
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float x = load(p + i * matrix.column_stride, 1)[0];
      out[i] = add ? out[i] + x : x;
    }
  }
}

// The sum of a row's token gradients in float32.
void read_gradient(const Update& call, const Matrix& grad, const int64_t* tokens, int64_t begin, int64_t n,
                   float* out) {
  bool add = false;
  for (int64_t k = 0; k < call.shares; ++k) {
    if (tokens[k] < 0) continue;
    if (grad.dtype == Dtype::float32) read_row<float>(grad, tokens[k], begin, n, add, out);
    if (grad.dtype == Dtype::bfloat16) read_row<bfloat16>(grad, tokens[k], begin, n, add, out);
    if (grad.dtype == Dtype::float16) read_row<float16>(grad, tokens[k], begin, n, add, out);
    add = true;
  }
}

// An entry that is not finite counts as 0; sign is -1 to climb.
LPA_INLINE VFloat clean(VFloat g, float sign) {
  return (bits(g) & 0x7f800000u) == 0x7f800000u ? VFloat{} : g * sign;
}

// Numbers that every row of a call shares.
struct Constants {
  float sign, step_size;
  float scale;       // step_size / (1 - beta1^step)
  float correction;  // 1 / sqrt(1 - beta2^step)
  float beta1, rest1, beta2, rest2, eps, decay;
};

Constants constants_of(const Update& call) {
  Constants c{};
  const double step = *call.step, size = *call.step_size;
  c.sign = call.maximize ? -1.0f : 1.0f;
  c.step_size = *call.step_size;
  if (call.rule != Rule::adamw) return c;
  c.scale = static_cast<float>(size / -__builtin_expm1(step * call.log_beta1));
  c.correction = static_cast<float>(1 / __builtin_sqrt(-__builtin_expm1(step * call.log_beta2)));
  c.beta1 = static_cast<float>(call.beta1);
  c.rest1 = static_cast<float>(1 - call.beta1);
  c.beta2 = static_cast<float>(call.beta2);
  c.rest2 = static_cast<float>(1 - call.beta2);
  c.eps = static_cast<float>(call.eps);
  c.decay = static_cast<float>(1 - size * call.weight_decay);
  return c;
}

// The norm of a row, gathered a vector at a time.
struct RowNorm {
  bool largest_entry;  // linf; otherwise Euclidean
  VFloat part{}, total{};
  VInt nan{};

  LPA_INLINE void add(VFloat x) {
    if (largest_entry) {
      total = larger(total, absolute(x));
      nan |= x != x;  // which `larger` forgets
    } else {
      part += x * x;
    }
  }
  LPA_INLINE void end_block() {  // two levels of sums lose less than one long one
    total += part;
    part = VFloat{};
  }
  float value() const {
    if (!largest_entry) return static_cast<float>(__builtin_sqrt(sum(total)));
    for (int64_t i = 0; i < W; ++i) {
      if (nan[i]) return __builtin_nanf("");
    }
    return largest(total);
  }
};

// ||g||_2 of a row. Squares of gradients below 1e-19 vanish in float32; those rows are measured again in double.
double gradient_length(const Update& call, const Matrix& grad, const int64_t* tokens) {
  float buffer[kBlock];
  VFloat total{};
  for (int64_t begin = 0; begin < call.width; begin += kBlock) {
    const int64_t n = call.width - begin < kBlock ? call.width - begin : kBlock;
    read_gradient(call, grad, tokens, begin, n, buffer);
    VFloat part{};
    sweep(n, [&](int64_t i, int64_t k) LPA_LAMBDA {
      const VFloat g = clean(load(buffer + i, k), 1.0f);
      part += g * g;
    });
    total += part;
  }
  double squares = sum(total);
  if (squares > 1e-24 && squares < 1e36) return __builtin_sqrt(squares);
  squares = 0;
  for (int64_t begin = 0; begin < call.width; begin += kBlock) {
    const int64_t n = call.width - begin < kBlock ? call.width - begin : kBlock;
    read_gradient(call, grad, tokens, begin, n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      const double g = __builtin_isfinite(buffer[i]) ? buffer[i] : 0.0f;
      squares += g * g;
    }
  }
  return __builtin_sqrt(squares);
}

// Moves one row, writes it and its moments, and gathers its norm.
template <Rule rule>
void move_row(const Update& call, const Constants& c, const Matrix& grad, const int64_t* tokens, int64_t offset,
              RowNorm& norm) {
  float buffer[kBlock];
  double scale = c.sign;  // for Rule::normalised: 1 / ||g||, 0 where the norm is 0
  if (rule == Rule::normalised) {
    const double length = gradient_length(call, grad, tokens);
    scale = length > 0 ? c.step_size / length : 0.0;
  }
  for (int64_t begin = 0; begin < call.width; begin += kBlock) {
    const int64_t n = call.width - begin < kBlock ? call.width - begin : kBlock;
    read_gradient(call, grad, tokens, begin, n, buffer);
    float* delta = call.delta + offset + begin;
    float* first_moment = rule == Rule::adamw ? call.exp_avg + offset + begin : nullptr;
    float* second_moment = rule == Rule::adamw ? call.exp_avg_sq + offset + begin : nullptr;
    sweep(n, [&](int64_t i, int64_t k) LPA_LAMBDA {
      const VFloat g = clean(load(buffer + i, k), c.sign);
      VFloat d = load(delta + i, k);
      if (rule == Rule::adamw) {
        const VFloat m = load(first_moment + i, k) * c.beta1 + g * c.rest1;
        const VFloat v = load(second_moment + i, k) * c.beta2 + g * g * c.rest2;
        store(first_moment + i, m, k);
        store(second_moment + i, v, k);
        d = d * c.decay - m * c.scale / (square_root(v) * c.correction + c.eps);
      } else if (rule == Rule::normalised) {
        d -= g * static_cast<float>(scale);
      } else {
        const VFloat up = g > 0 ? all(c.step_size) : VFloat{};
        d -= g < 0 ? all(-c.step_size) : up;
      }
      store(delta + i, d, k);
      norm.add(first(d, k));
    });
    norm.end_block();
  }
}

void update_rows(const Update& call, const Matrix* grads, int64_t begin, int64_t end) {
  const Constants c = constants_of(call);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t site = index / call.rows, row = index % call.rows, offset = index * call.width;
    const int64_t* tokens = call.row_tokens + row * call.shares;
    bool live = false;
    for (int64_t k = 0; k < call.shares; ++k) live |= tokens[k] >= 0;
    float* delta = call.delta + offset;
    RowNorm norm{call.norm == Norm::linf};
    if (!live) {
      for (int64_t i = 0; i < call.width; i += kBlock) {
        const int64_t n = call.width - i < kBlock ? call.width - i : kBlock;
        sweep(n, [&](int64_t j, int64_t k) LPA_LAMBDA { norm.add(load(delta + i + j, k)); });
        norm.end_block();
      }
    } else if (call.rule == Rule::adamw) {
      move_row<Rule::adamw>(call, c, grads[site], tokens, offset, norm);
    } else if (call.rule == Rule::normalised) {
      move_row<Rule::normalised>(call, c, grads[site], tokens, offset, norm);
    } else {
      move_row<Rule::sign>(call, c, grads[site], tokens, offset, norm);
    }
    const float length = norm.value();
    call.norms[index] = length;
    const float radius = call.epsilon[call.epsilon_per_row ? index : 0];
    if (!live || call.norm == Norm::none || !(length > radius)) continue;
    if (call.norm == Norm::l2) {  // the row was written a moment ago and is still in the cache
      const float shrink = radius / length;
      sweep(call.width, [&](int64_t i, int64_t k) LPA_LAMBDA { store(delta + i, load(delta + i, k) * shrink, k); });
    } else {
      sweep(call.width, [&](int64_t i, int64_t k) LPA_LAMBDA {
        const VFloat d = load(delta + i, k), low = d < -radius ? all(-radius) : d;
        store(delta + i, d > radius ? all(radius) : low, k);
      });
    }
  }
}

// ---- token_loss_ ----

constexpr int64_t kLogits = 2048;  // read twice from the first-level cache: for the maximum, then for the sum

// Logsumexp on the way: the largest logit so far, and the sum of exp(z - top).
struct LogSum {
  float top = -__builtin_huge_valf();
  double total = 0;

  template <class T>
  LPA_INLINE void add(const T* z, int64_t n) {
    VFloat tops[4] = {all(top), all(top), all(top), all(top)};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      for (int64_t j = 0; j < 4; ++j) tops[j] = larger(load(z + i + j * W, W), tops[j]);
    }
    float above = largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
    for (; i < n; ++i) {
      const float x = load(z + i, 1)[0];
      above = x > above ? x : above;
    }
    if (above > top) {
      total *= __builtin_exp(static_cast<double>(top) - above);
      top = above;
    }
    const float base = top < -__FLT_MAX__ ? -__FLT_MAX__ : top;  // all -inf so far: exp(-inf - base) is 0, not NaN
    VFloat part{};
    sweep(n, [&](int64_t j, int64_t k) LPA_LAMBDA { part += first(exp_negative(load(z + j, k) - base), k); });
    total += sum(part);
  }
};

template <class T>
void token_loss_row(const TokenLoss& call, int64_t row) {
  T* z = static_cast<T*>(call.logits.data) + row * call.logits.row_stride;
  const int64_t size = call.vocabulary, label = call.labels[row];
  float slope = 0;  // d loss / d s, weighted
  LogSum rest;      // of all logits but the label's
  call.losses[row] = 0;
  call.hits[row] = false;
  if (label != kIgnored) {
    for (int64_t begin = 0; begin < size; begin += kLogits) {
      const int64_t n = size - begin < kLogits ? size - begin : kLogits;
      if (label < begin || label >= begin + n) {
        rest.add(z + begin, n);
      } else {
        rest.add(z + begin, label - begin);
        rest.add(z + label + 1, begin + n - label - 1);
      }
    }
    const float own = load(z + label, 1)[0];
    const double log_rest = rest.top + __builtin_log(rest.total), s = own - log_rest;
    const double tail = __builtin_log1p(__builtin_exp(s > 0 ? -s : s));
    const double minus_log_p = s > 0 ? tail : tail - s, minus_log_not_p = s > 0 ? s + tail : tail;
    const bool away = call.away[row];
    call.hits[row] = own >= rest.top;
    if (!(away && -minus_log_p < call.threshold)) {
      const double weight = call.weight ? call.weight[row] : 0;
      call.losses[row] = static_cast<float>(away ? minus_log_not_p : minus_log_p);
      slope = static_cast<float>(weight * (away ? 1 / (1 + __builtin_exp(-s)) : -1 / (1 + __builtin_exp(s))));
    }
  }
  if (!call.weight) return;
  if (slope == 0) {
    __builtin_memset(z, 0, size * sizeof(T));
    return;
  }
  // exp(z - log_rest) as exp(z - top) / total: the first difference is exact where it matters.
  const float factor = static_cast<float>(-slope / rest.total);
  const float base = rest.top;
  sweep(size, [&](int64_t i, int64_t k) LPA_LAMBDA { store(z + i, exp_negative(load(z + i, k) - base) * factor, k); });
  store(z + label, all(slope), 1);
}

void token_loss_rows(const TokenLoss& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (call.logits.dtype == Dtype::float32) token_loss_row<float>(call, row);
    if (call.logits.dtype == Dtype::bfloat16) token_loss_row<bfloat16>(call, row);
    if (call.logits.dtype == Dtype::float16) token_loss_row<float16>(call, row);
  }
}

}  // namespace
}  // namespace lpa::cpu
