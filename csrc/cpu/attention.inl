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
  for (; j + 2 * W <= columns; j += 2 * W) {
    product_rows<2>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
  }
  if (j < columns) product_rows<1>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
}

// ---- heads ----

// out = x, of `width` entries, times `factor`; rotated by cos and sin [half] before, the other way for turn = -1.
template <class From, class To>
LPA_INLINE void turned(const From* x, To* out, int64_t width, int64_t half, const float* cos, const float* sin,
                       float turn, float factor) {
  sweep(half, [&](int64_t i, int64_t k) LPA_LAMBDA {
    const VFloat a = load(x + i, k) * factor, b = load(x + half + i, k) * factor;
    const VFloat c = load(cos + i, k), s = load(sin + i, k) * turn;
    store(out + i, a * c - b * s, k);
    store(out + half + i, b * c + a * s, k);
  });
  x += 2 * half;
  out += 2 * half;
  sweep(width - 2 * half, [&](int64_t i, int64_t k) LPA_LAMBDA { store(out + i, load(x + i, k) * factor, k); });
}

// The rotation of one token, if its places are given.
struct Rotation {
  int64_t half;
  const float *cos, *sin;
};

LPA_INLINE Rotation rotation_of(const Attention& call, const int32_t* places, int64_t token) {
  if (!places || !call.cos) return {0, nullptr, nullptr};
  const int64_t start = places[2 * token + 1] * call.half;
  return {call.half, call.cos + start, call.sin + start};
}

// One head of `count` tokens in float32 times `factor`, rows of `stride` floats whose ends are 0; rotated where there
// are places.
template <class T>
void read_heads(const Attention& call, const Heads& heads, int64_t head, int64_t first, int64_t count,
                const int32_t* places, float factor, float* out, int64_t stride) {
  const T* x = static_cast<const T*>(heads.data) + first * heads.token_stride + head * heads.head_stride;
  for (int64_t i = 0; i < count; ++i) {
    const Rotation by = rotation_of(call, places, first + i);
    float* row = out + i * stride;
    turned(x + i * heads.token_stride, row, call.width, by.half, by.cos, by.sin, 1.0f, factor);
    for (int64_t end = call.width; end < stride; ++end) row[end] = 0;
  }
}

// The reverse, for results: rotated back where there are places; factors [count] or null.
template <class T>
void write_heads(const Attention& call, const Heads& heads, int64_t head, int64_t first, int64_t count,
                 const int32_t* places, const float* factors, const float* in, int64_t stride) {
  T* x = static_cast<T*>(heads.data) + first * heads.token_stride + head * heads.head_stride;
  for (int64_t i = 0; i < count; ++i) {
    const Rotation by = rotation_of(call, places, first + i);
    const float factor = factors ? factors[i] : 1.0f;
    turned(in + i * stride, x + i * heads.token_stride, call.width, by.half, by.cos, by.sin, -1.0f, factor);
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

// Some queries of a row: `count` of them from `first`, of the row and of the stream.
struct Tile {
  int64_t first, token, count;
  int64_t all;  // keys before this one are seen by every query
  int64_t end;  // keys from this one on are seen by none; both are whole vectors
};

Tile tile_of(const Attention& call, const Row& row, int64_t first) {
  Tile tile{first, row.q_first + first, row.q_count - first < kTile ? row.q_count - first : kTile, 0, row.k_count};
  int32_t latest = -1, earliest = call.window ? -1 : INT32_MAX;
  for (int64_t m = 0; m < tile.count; ++m) {
    const int32_t* place = call.q_places + 2 * (tile.token + m);
    const int32_t position = place[0] < 0 ? -1 : place[1];  // a padding token sees nothing
    if (position > latest) latest = position;
    if (position < earliest) earliest = position;
  }
  while (tile.end > 0 && (row.branch[tile.end - 1] < 0 || row.position[tile.end - 1] > latest)) --tile.end;
  while (tile.all < tile.end && row.branch[tile.all] == 0 && row.position[tile.all] <= earliest) ++tile.all;
  tile.all = tile.all / W * W;
  tile.end = rounded(tile.end);
  return tile;
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

// The scaled product of query and key under the cap, where there is one.
LPA_INLINE VFloat scored(float softcap, VFloat s) { return softcap != 0 ? tanh(s / softcap) * softcap : s; }

// Memory of one thread, in floats.
int64_t attention_floats(const Attention& call) {
  const int64_t keys = rounded(call.longest_k), width = rounded(call.width);
  const int64_t sides = keys * width, tile = kTile * (width + keys);
  return 2 * keys + (call.backward ? 6 * sides + 3 * tile + kTile * width : 3 * sides + 2 * tile);
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
    const int64_t place = 2 * (row.k_first + n);
    row.branch[n] = n < row.k_count ? call.k_places[place] : -1;
    row.position[n] = n < row.k_count ? call.k_places[place + 1] : 0;
  }
  return row;
}

// The scores [end] of one query become exp(score - largest). Returns their logsumexp, and 1 over their sum in `factor`;
// both 0 for a query that sees nothing.
float softmax(const Attention& call, const Row& row, const Tile& tile, int64_t m, float* s, float* factor) {
  const int32_t branch = call.q_places[2 * (tile.token + m)], position = call.q_places[2 * (tile.token + m) + 1];
  const float softcap = call.softcap;
  VFloat tops = all(kUnseen);
  int64_t n = 0;
  for (; n < tile.all; n += W) {
    const VFloat x = scored(softcap, load(s + n, W));
    if (softcap != 0) store(s + n, x, W);
    tops = larger(tops, x);
  }
  for (; n < tile.end; n += W) {
    const VFloat x = seen(call, row, n, branch, position) ? scored(softcap, load(s + n, W)) : all(kUnseen);
    store(s + n, x, W);
    tops = larger(tops, x);
  }
  const float top = largest(tops);
  if (!(top > kUnseen)) {
    for (n = 0; n < tile.end; ++n) s[n] = 0;
    *factor = 0;
    return 0;
  }
  VFloat part{};
  for (n = 0; n < tile.end; n += W) {
    const VFloat p = exp_negative(load(s + n, W) - top);
    store(s + n, p, W);
    part += p;
  }
  const float total = static_cast<float>(sum(part));
  *factor = 1 / total;
  return top + __builtin_logf(total);
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
  read_heads<T>(call, call.k, kv_head, row.k_first, row.k_count, call.k_places, 1.0f, key, width);
  transpose(key, row.k_count, call.width, width, across, keys);
  read_heads<T>(call, call.v, kv_head, row.k_first, row.k_count, nullptr, 1.0f, value, width);
  for (float* p = value + row.k_count * width; p < value + keys * width; ++p) *p = 0;
  for (int64_t first = 0; first < row.q_count; first += kTile) {
    const Tile tile = tile_of(call, row, first);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      read_heads<T>(call, call.q, head, tile.token, tile.count, call.q_places, call.scale, query, width);
      product(tile.count, tile.end, call.width, query, width, 1, across, keys, score, keys, false);
      float factors[kTile];
      for (int64_t m = 0; m < tile.count; ++m) {
        const float lse = softmax(call, row, tile, m, score + m * keys, factors + m);
        call.lse[head * call.queries + tile.token + m] = lse;
      }
      product(tile.count, width, tile.end, score, keys, 1, value, width, query, width, false);
      write_heads<T>(call, call.out, head, tile.token, tile.count, nullptr, factors, query, width);
    }
  }
}

// From one query's scores and products of its result's gradient with the values, both [end]: its softmax and the
// gradient of the scaled scores, in their places. `own` is the product of result and its gradient.
void softmax_backward(const Attention& call, const Row& row, const Tile& tile, int64_t m, float lse, float own,
                      float* s, float* d) {
  const int32_t branch = call.q_places[2 * (tile.token + m)], position = call.q_places[2 * (tile.token + m) + 1];
  const float softcap = call.softcap;
  for (int64_t n = 0; n < tile.end; n += W) {
    const VFloat x = scored(softcap, load(s + n, W));
    VFloat p = exp_negative(x - lse);
    if (n >= tile.all) p = seen(call, row, n, branch, position) ? p : VFloat{};
    VFloat y = p * (load(d + n, W) - own);
    if (softcap != 0) y *= 1.0f - (x / softcap) * (x / softcap);
    store(s + n, p, W);
    store(d + n, y, W);
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
  float scales[kTile];
  for (float& scale : scales) scale = call.scale;
  read_heads<T>(call, call.k, kv_head, row.k_first, row.k_count, call.k_places, 1.0f, key, width);
  transpose(key, row.k_count, call.width, width, across, keys);
  for (float* p = key + row.k_count * width; p < key + keys * width; ++p) *p = 0;
  read_heads<T>(call, call.v, kv_head, row.k_first, row.k_count, nullptr, 1.0f, value, width);
  transpose(value, row.k_count, call.width, width, values, keys);
  for (float* p = d_key; p < d_value + keys * width; ++p) *p = 0;
  for (int64_t first = 0; first < row.q_count; first += kTile) {
    const Tile tile = tile_of(call, row, first);
    const int64_t token = tile.token, count = tile.count, end = tile.end;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      read_heads<T>(call, call.q, head, token, count, call.q_places, call.scale, query, width);
      read_heads<T>(call, call.grad, head, token, count, nullptr, 1.0f, grad, width);
      read_heads<T>(call, call.out, head, token, count, nullptr, 1.0f, out, width);
      product(count, end, call.width, query, width, 1, across, keys, score, keys, false);
      product(count, end, call.width, grad, width, 1, values, keys, slope, keys, false);
      for (int64_t m = 0; m < count; ++m) {
        VFloat part{};
        for (int64_t i = 0; i < width; i += W) part += load(grad + m * width + i, W) * load(out + m * width + i, W);
        const float lse = call.lse[head * call.queries + token + m], own = static_cast<float>(sum(part));
        softmax_backward(call, row, tile, m, lse, own, score + m * keys, slope + m * keys);
      }
      product(count, width, end, slope, keys, 1, key, width, out, width, false);
      write_heads<T>(call, call.d_q, head, token, count, call.q_places, scales, out, width);
      product(end, width, count, slope, 1, keys, query, width, d_key, width, true);  // of scaled queries
      product(end, width, count, score, 1, keys, grad, width, d_value, width, true);
    }
  }
  write_heads<T>(call, call.d_k, kv_head, row.k_first, row.k_count, call.k_places, nullptr, d_key, width);
  write_heads<T>(call, call.d_v, kv_head, row.k_first, row.k_count, nullptr, nullptr, d_value, width);
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

}  // namespace
}  // namespace lpa::cpu
