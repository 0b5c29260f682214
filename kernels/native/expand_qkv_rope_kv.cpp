// ops.ExpandQkvRopeKv.
#include "delta.h"
#include "int8.h"
#include "methods.h"
#include "norm.h"

namespace tucka {

// Pairs (x_i, x_{i + D/2}) of a head (D,) fp32, in place.
template <class T>
inline void rotate(float* x, const T* cos, const T* sin, int64_t half) {
  steps(half, [&](int64_t i, int64_t count) {
    const Pair a = load_step(x + i, count), b = load_step(x + half + i, count);
    const Pair c = load_step(cos + i, count), s = load_step(sin + i, count);
    store_step(x + i, Pair{a.a * c.a - b.a * s.a, a.b * c.b - b.b * s.b}, count);
    store_step(x + half + i, Pair{b.a * c.a + a.a * s.a, b.b * c.b + a.b * s.b}, count);
  });
}

// Where a row's norm weights are: (D,) for all, or (T, 1, D).
template <class T>
struct HeadNorm {
  const T* weight = nullptr;
  int64_t stride = 0;
  explicit HeadNorm(const std::optional<Tensor>& w) {
    if (!w) return;
    TORCH_CHECK_VALUE(w->stride(-1) == 1, "head norms must be contiguous");
    weight = w->const_data_ptr<T>();
    stride = w->dim() == 1 ? 0 : w->stride(0);
  }
};

Tensor expand_qkv_rope_kv(const Tensor& qkv, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                          const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                          const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping,
                          const std::optional<Tensor>& h, const std::optional<Tensor>& e_ptr,
                          const std::optional<Tensor>& affine_ptr, const std::optional<Tensor>& rank,
                          const std::optional<Tensor>& borders, const std::optional<Tensor>& tiles) {
  const bool quantized = check_caches(k_cache, v_cache, qkv);
  TORCH_CHECK_VALUE(qkv.stride(1) == 1, "rows must be contiguous");
  const int64_t kv_heads = k_cache.size(1), d = k_cache.size(2), stride = k_cache.stride(0);
  const int64_t all = qkv.size(1) / d, heads = all - 2 * kv_heads;
  const Delta delta(h, e_ptr, affine_ptr, rank, borders);
  for (int64_t j = 1; j < delta.n; j++)
    TORCH_CHECK_VALUE(delta.borders[j] % d == 0, "a head lies in two targets");
  const Pieces pieces(tiles, qkv.size(0), all * d, d);
  const int64_t most = pieces.most;
  Tensor q = at::empty({qkv.size(0), heads, d}, qkv.options());
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  by_type(qkv, [&](auto type) {
    using T = decltype(type);
    const T* rows = qkv.const_data_ptr<T>();
    const T *c = cos ? cos->const_data_ptr<T>() : nullptr, *s = sin ? sin->const_data_ptr<T>() : nullptr;
    const HeadNorm<T> norms[2] = {HeadNorm<T>(q_norm), HeadNorm<T>(k_norm)};
    T* q_to = q.data_ptr<T>();
    void* caches[2] = {k_cache.data_ptr(), v_cache.data_ptr()};
    deal(pieces.count(), kRows * most * (4 + delta.work()), [&](int64_t item) {
      const Piece piece = pieces[item];
      const auto& [run, first, count] = piece;
      float* sums = scratch(kRows * most);
      summed(delta, rows, qkv.stride(0), sums, most, piece, pieces.after(item));
      for (int64_t r = run.first; r < run.end; r++)
        for (int64_t head = first / d; head < (first + count) / d; head++) {
          float* x = sums + (r - run.first) * most + head * d - first;
          if (head < heads + kv_heads) {
            const HeadNorm<T>& own_norm = norms[head >= heads];
            if (own_norm.weight != nullptr)
              norm_row<float, T>(x, own_norm.weight + r * own_norm.stride, nullptr, x, d, static_cast<float>(eps));
            if (c != nullptr) rotate(x, c + r * (d / 2), s + r * (d / 2), d / 2);
          }
          if (head < heads) {
            from_float(x, q_to + (r * heads + head) * d, d);
          } else if (slots[r] >= 0) {
            const bool value = head >= heads + kv_heads;
            const int64_t own_head = head - heads - (value ? kv_heads : 0), at = slots[r] * stride;
            if (quantized) {
              int8_t* to = static_cast<int8_t*>(caches[value]) + at;
              quantize(x, to + own_head * d, to + kv_heads * d + own_head * sizeof(float), d);
            } else {
              from_float(x, static_cast<T*>(caches[value]) + at + own_head * d, d);
            }
          }
      }
    });
  });
  return q;
}

const Methods kExpandQkvRopeKvMethods{{"expand_qkv_rope_kv", call<&expand_qkv_rope_kv>}};

}  // namespace tucka
