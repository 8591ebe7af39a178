// Attention within packed rows and its backward, written once for every vector width (see simd.h).
//
// One call takes one row and the heads that share a key and value head. Keys and values are rotated, widened to float32
// and transposed once; then tiles of queries go through small matrix products whose operands stay in the caches. A tile
// reads no key that comes after all of its queries.

#include "attention.h"
#include "simd.h"

namespace lpa::cpu {
namespace {

constexpr int64_t kTile = 24;  // queries of a tile: four times the rows that a product holds in registers
constexpr float kUnseen = -1e30f;

LPA_INLINE int64_t rounded(int64_t n) { return (n + W - 1) / W * W; }

// ---- products ----

// C[R, V vectors] = A B, or added to C. A has any strides, B and C have rows of vectors.
template <int R, int V>
LPA_INLINE void product_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                             int64_t b_row, float* c, int64_t c_row, bool add) {
  VFloat sums[R][V]{};
  for (int64_t k = 0; k < depth; ++k) {
    VFloat right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * W, W);
    for (int r = 0; r < R; ++r) {
      const VFloat left = all(a[r * a_row + k * a_column]);
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* place = c + r * c_row + v * W;
      store(place, add ? load(place, W) + sums[r][v] : sums[r][v], W);
    }
  }
}

template <int V>
void product_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                  int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) {
    product_tile<6, V>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
  }
  for (; i + 2 <= rows; i += 2) {
    product_tile<2, V>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
  }
  if (i < rows) product_tile<1, V>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
}

// C [rows, columns] = A [rows, depth] B [depth, columns], or added to C; `columns` is a multiple of W.
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
             const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) product_rows<2>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
  if (j < columns) product_rows<1>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
}

// ---- heads ----

// One head of `count` tokens in float32, rows of `stride` floats whose ends are 0; rotated where there are positions.
template <class T>
void read_heads(const Attention& call, const Heads& heads, int64_t head, int64_t first, int64_t count,
                const int32_t* places, float* out, int64_t stride) {
  for (int64_t token = 0; token < count; ++token) {
    const T* x = static_cast<const T*>(heads.data) + (first + token) * heads.token_stride + head * heads.head_stride;
    float* row = out + token * stride;
    for (int64_t i = call.width; i < stride; ++i) row[i] = 0;
    const int64_t half = places && call.cos ? call.half : 0;
    if (half) {
      const float* cos = call.cos + places[2 * (first + token) + 1] * half;
      const float* sin = call.sin + places[2 * (first + token) + 1] * half;
      sweep(half, [&](int64_t i, int64_t k) LPA_LAMBDA {
        const VFloat a = load(x + i, k), b = load(x + half + i, k), c = load(cos + i, k), s = load(sin + i, k);
        store(row + i, a * c - b * s, k);
        store(row + half + i, b * c + a * s, k);
      });
    }
    sweep(call.width - 2 * half, [&](int64_t i, int64_t k) LPA_LAMBDA {
      store(row + 2 * half + i, load(x + 2 * half + i, k), k);
    });
  }
}

// The reverse, for gradients: rotated back where there are positions.
template <class T>
void write_heads(const Attention& call, const Heads& heads, int64_t head, int64_t first, int64_t count,
                 const int32_t* places, const float* in, int64_t stride) {
  for (int64_t token = 0; token < count; ++token) {
    T* x = static_cast<T*>(heads.data) + (first + token) * heads.token_stride + head * heads.head_stride;
    const float* row = in + token * stride;
    const int64_t half = places && call.cos ? call.half : 0;
    if (half) {
      const float* cos = call.cos + places[2 * (first + token) + 1] * half;
      const float* sin = call.sin + places[2 * (first + token) + 1] * half;
      sweep(half, [&](int64_t i, int64_t k) LPA_LAMBDA {
        const VFloat a = load(row + i, k), b = load(row + half + i, k), c = load(cos + i, k), s = load(sin + i, k);
        store(x + i, a * c + b * s, k);
        store(x + half + i, b * c - a * s, k);
      });
    }
    sweep(call.width - 2 * half, [&](int64_t i, int64_t k) LPA_LAMBDA {
      store(x + 2 * half + i, load(row + 2 * half + i, k), k);
    });
  }
}

void transpose(const float* in, int64_t rows, int64_t columns, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < columns; ++i) {
    float* row = out + i * out_stride;
    for (int64_t j = 0; j < rows; ++j) row[j] = in[j * in_stride + i];
    for (int64_t j = rows; j < out_stride; ++j) row[j] = 0;
  }
}

// ---- the keys of a row ----

struct Row {
  int64_t q_first, q_count, k_first, k_count;
  int64_t keys, width;  // k_count and the width of a head, rounded up to whole vectors
  int32_t *branch, *position;  // of the keys; branch -1 past the last one
};

// Keys up to the last one that comes before the latest of these queries, rounded up.
int64_t reach(const Attention& call, const Row& row, int64_t first, int64_t count) {
  int32_t latest = -1;
  for (int64_t m = first; m < first + count; ++m) {
    const int32_t* place = call.q_places + 2 * (row.q_first + m);
    if (place[0] >= 0 && place[1] > latest) latest = place[1];
  }
  int64_t end = row.k_count;
  while (end > 0 && (row.branch[end - 1] < 0 || row.position[end - 1] > latest)) --end;
  return rounded(end);
}

LPA_INLINE VInt ints(const int32_t* p) {
  VInt x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// Which of W keys a query sees.
LPA_INLINE VInt seen(const Attention& call, const Row& row, int64_t n, int32_t branch, int32_t position) {
  const VInt key = ints(row.branch + n), at = ints(row.position + n);
  VInt out = (key >= 0) & ((key == branch) | (key == 0)) & (at <= position);
  if (call.window) out &= position - at < call.window;
  return branch >= 0 ? out : VInt{};
}

// tanh: a series near 0, where the quotient would lose digits.
LPA_INLINE VFloat tanh(VFloat x) {
  const VFloat q = x * x;
  VFloat p = q * -0.00570498872745f + 0.0206390887954f;
  p = p * q - 0.0537397155531f;
  p = p * q + 0.133314422036f;
  p = p * q - 0.33333332819422f;
  const VFloat small = exp_negative(absolute(x) * -2.0f), far = (1.0f - small) / (small + 1.0f);
  return absolute(x) < 0.625f ? x + x * q * p : (x < 0 ? -far : far);
}

LPA_INLINE VFloat scored(const Attention& call, VFloat s) {
  s *= call.scale;
  return call.softcap != 0 ? tanh(s / call.softcap) * call.softcap : s;
}

// Memory of one thread, in floats.
int64_t attention_scratch(const Attention& call, bool backward) {
  const int64_t keys = rounded(call.longest_k), width = rounded(call.width);
  const int64_t sides = keys * width, tile = kTile * (width + keys);
  return 2 * keys + (backward ? 6 * sides + 3 * tile + kTile * width : 3 * sides + 2 * tile);
}

Row row_of(const Attention& call, int64_t index, float*& memory) {
  Row row{};
  row.q_first = call.q_starts[index];
  row.q_count = call.q_starts[index + 1] - row.q_first;
  row.k_first = call.k_starts[index];
  row.k_count = call.k_starts[index + 1] - row.k_first;
  row.keys = rounded(row.k_count);
  row.width = rounded(call.width);
  row.branch = reinterpret_cast<int32_t*>(memory);
  row.position = row.branch + row.keys;
  memory += 2 * row.keys;
  for (int64_t n = 0; n < row.keys; ++n) {
    const int32_t* place = call.k_places + 2 * (row.k_first + n);
    row.branch[n] = n < row.k_count ? place[0] : -1;
    row.position[n] = n < row.k_count ? place[1] : 0;
  }
  return row;
}

template <class T>
void attention_group(const Attention& call, int64_t index, int64_t kv_head, float* memory) {
  const Row row = row_of(call, index, memory);
  const int64_t width = row.width, keys = row.keys, group = call.heads / call.kv_heads;
  float* key = memory;                    // [keys, width], then free
  float* across = key + keys * width;     // [width, keys], the keys' transpose
  float* value = across + keys * width;   // [keys, width]
  float* query = value + keys * width;    // [tile, width], and then what is found
  float* score = query + kTile * width;   // [tile, keys]
  read_heads<T>(call, call.k, kv_head, row.k_first, row.k_count, call.k_places, key, width);
  transpose(key, row.k_count, call.width, width, across, keys);
  read_heads<T>(call, call.v, kv_head, row.k_first, row.k_count, nullptr, value, width);
  for (float* p = value + row.k_count * width; p < value + keys * width; ++p) *p = 0;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = 0; first < row.q_count; first += kTile) {
      const int64_t count = row.q_count - first < kTile ? row.q_count - first : kTile;
      const int64_t end = reach(call, row, first, count), token = row.q_first + first;
      read_heads<T>(call, call.q, head, token, count, call.q_places, query, width);
      product(count, end, call.width, query, width, 1, across, keys, score, keys, false);
      float factors[kTile];
      for (int64_t m = 0; m < count; ++m) {
        const int32_t* place = call.q_places + 2 * (token + m);
        float* s = score + m * keys;
        VFloat tops = all(kUnseen);
        for (int64_t n = 0; n < end; n += W) {
          const VFloat x = seen(call, row, n, place[0], place[1]) ? scored(call, load(s + n, W)) : all(kUnseen);
          store(s + n, x, W);
          tops = larger(tops, x);
        }
        const float top = largest(tops);
        double total = 0;
        if (top > kUnseen) {
          VFloat part{};
          for (int64_t n = 0; n < end; n += W) {
            const VFloat p = exp_negative(load(s + n, W) - top);
            store(s + n, p, W);
            part += p;
          }
          total = sum(part);
        } else {
          for (int64_t n = 0; n < end; ++n) s[n] = 0;
        }
        call.lse[head * call.queries + token + m] = total > 0 ? static_cast<float>(top + __builtin_log(total)) : 0.0f;
        factors[m] = total > 0 ? static_cast<float>(1 / total) : 0.0f;
      }
      product(count, width, end, score, keys, 1, value, width, query, width, false);
      for (int64_t m = 0; m < count; ++m) {
        sweep(width, [&](int64_t i, int64_t k) LPA_LAMBDA {
          store(query + m * width + i, load(query + m * width + i, k) * factors[m], k);
        });
      }
      write_heads<T>(call, call.out, head, token, count, nullptr, query, width);
    }
  }
}

template <class T>
void attention_backward_group(const Attention& call, int64_t index, int64_t kv_head, float* memory) {
  const Row row = row_of(call, index, memory);
  const int64_t width = row.width, keys = row.keys, group = call.heads / call.kv_heads;
  float* key = memory;                      // [keys, width]
  float* across = key + keys * width;       // [width, keys], its transpose
  float* value = across + keys * width;     // [keys, width], then free
  float* values = value + keys * width;     // [width, keys], its transpose
  float* d_key = values + keys * width;     // [keys, width]
  float* d_value = d_key + keys * width;    // [keys, width]
  float* query = d_value + keys * width;    // [tile, width]
  float* grad = query + kTile * width;      // [tile, width]
  float* out = grad + kTile * width;        // [tile, width], and then the queries' gradient
  float* score = out + kTile * width;       // [tile, keys], and then its softmax
  float* slope = score + kTile * keys;      // [tile, keys]
  read_heads<T>(call, call.k, kv_head, row.k_first, row.k_count, call.k_places, key, width);
  transpose(key, row.k_count, call.width, width, across, keys);
  for (float* p = key + row.k_count * width; p < key + keys * width; ++p) *p = 0;
  read_heads<T>(call, call.v, kv_head, row.k_first, row.k_count, nullptr, value, width);
  transpose(value, row.k_count, call.width, width, values, keys);
  for (float* p = d_key; p < d_value + keys * width; ++p) *p = 0;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = 0; first < row.q_count; first += kTile) {
      const int64_t count = row.q_count - first < kTile ? row.q_count - first : kTile;
      const int64_t end = reach(call, row, first, count), token = row.q_first + first;
      read_heads<T>(call, call.q, head, token, count, call.q_places, query, width);
      read_heads<T>(call, call.grad, head, token, count, nullptr, grad, width);
      read_heads<T>(call, call.out, head, token, count, nullptr, out, width);
      product(count, end, call.width, query, width, 1, across, keys, score, keys, false);
      product(count, end, call.width, grad, width, 1, values, keys, slope, keys, false);
      for (int64_t m = 0; m < count; ++m) {
        const int32_t* place = call.q_places + 2 * (token + m);
        const float lse = call.lse[head * call.queries + token + m];
        VFloat part{};
        sweep(call.width, [&](int64_t i, int64_t k) LPA_LAMBDA {
          part += load(grad + m * width + i, k) * load(out + m * width + i, k);
        });
        const float own = static_cast<float>(sum(part));
        float *s = score + m * keys, *d = slope + m * keys;
        for (int64_t n = 0; n < end; n += W) {
          const VFloat x = scored(call, load(s + n, W));
          const VFloat p = seen(call, row, n, place[0], place[1]) ? exp_negative(x - lse) : VFloat{};
          VFloat y = p * (load(d + n, W) - own) * call.scale;
          if (call.softcap != 0) y *= 1.0f - (x / call.softcap) * (x / call.softcap);
          store(s + n, p, W);
          store(d + n, y, W);
        }
      }
      product(count, width, end, slope, keys, 1, key, width, out, width, false);
      write_heads<T>(call, call.d_q, head, token, count, call.q_places, out, width);
      product(end, width, count, slope, 1, keys, query, width, d_key, width, true);
      product(end, width, count, score, 1, keys, grad, width, d_value, width, true);
    }
  }
  write_heads<T>(call, call.d_k, kv_head, row.k_first, row.k_count, call.k_places, d_key, width);
  write_heads<T>(call, call.d_v, kv_head, row.k_first, row.k_count, nullptr, d_value, width);
}

// Pairs of row and key-value head [begin, end).
template <class T>
void attention_pairs(const Attention& call, int64_t begin, int64_t end, float* memory) {
  for (int64_t i = begin; i < end; ++i) {
    if (call.backward) {
      attention_backward_group<T>(call, i / call.kv_heads, i % call.kv_heads, memory);
    } else {
      attention_group<T>(call, i / call.kv_heads, i % call.kv_heads, memory);
    }
  }
}

void attention_pairs(const Attention& call, int64_t begin, int64_t end, float* memory) {
  if (call.dtype == Dtype::float32) attention_pairs<float>(call, begin, end, memory);
  if (call.dtype == Dtype::bfloat16) attention_pairs<bfloat16>(call, begin, end, memory);
  if (call.dtype == Dtype::float16) attention_pairs<float16>(call, begin, end, memory);
}

int64_t attention_floats(const Attention& call) { return attention_scratch(call, call.backward); }

}  // namespace
}  // namespace lpa::cpu
