// ops.ShrinkCore.
#include "delta.h"
#include "methods.h"

namespace tucka {

// Rank rows whose products with a row of x are summed up at once: as many as sum4 takes.
constexpr int kRanks = 4;

// Rows of one adapter that read its U together, or as many as a tile has if those are more: enough that reading it costs
// little, few enough that a batch of one adapter still is work for many threads. Unmeasured.
constexpr int64_t kShrinkRows = 16;

// out[r][k] = x_r · u_k for R rows and K rank rows, all d long. Meanwhile K others, from `next` on, are asked for.
template <int R, int K, class T>
inline void dots(const T* x, int64_t x_stride, const T* u, int64_t d, float* out, int64_t out_stride, const T* next) {
  Vec sums[R][kRanks];
  each<R>([&](auto r) { each<kRanks>([&](auto k) { sums[r][k] = Vec(0.f); }); });
  steps(d, [&](int64_t i, int64_t count) {
    decltype(load_factor(x, count)) rows[R];
    each<R>([&](auto r) { rows[r] = load_factor(x + r * x_stride + i, count); });
    each<K>([&](auto k) {
      prefetch(next + k * d + i);
      const auto w = load_factor(u + k * d + i, count);
      each<R>([&](auto r) { sums[r][k] = add_products(sums[r][k], rows[r], w); });
    });
  });
  each<R>([&](auto r) {
    float all[kRanks];
    sum4(sums[r], all);
    std::memcpy(out + r * out_stride, all, K * sizeof(float));
  });
}

// t (rows, rank) = x uᵀ. Meanwhile another factor is asked for, `next`.
template <class T>
void shrink(const T* x, int64_t x_stride, const T* u, int64_t rows, int64_t rank, int64_t d, float* t, const T* next) {
  const auto some = [&]<int K>(std::integral_constant<int, K>, int64_t k) {
    const T *own = u + k * d, *later = next + k * d;
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) dots<2, K>(x + r * x_stride, x_stride, own, d, t + r * rank + k, rank, later);
    if (r < rows) dots<1, K>(x + r * x_stride, x_stride, own, d, t + r * rank + k, rank, later);
  };
  int64_t k = 0;
  for (; k + kRanks <= rank; k += kRanks) some(std::integral_constant<int, kRanks>(), k);
  for (; k < rank; k++) some(std::integral_constant<int, 1>(), k);
}

// The rows of the longest tile.
inline int64_t longest(const Tensor& tiles) {
  const int32_t* t = tiles.const_data_ptr<int32_t>();
  int64_t most = 0;
  for (int64_t i = 0; i < tiles.size(0); i++, t += 4) most = std::max<int64_t>(most, t[1] - t[0]);
  return most;
}

Tensor shrink_core(const Tensor& x, const Tensor& u_ptr, const Tensor& ranks, const Tensor& tiles,
                   const Tensor& row_cores, const std::optional<Tensor>& cores, int64_t width) {
  TORCH_CHECK_VALUE(x.stride(1) == 1, "the rows of x must be contiguous");
  const int64_t n = ranks.size(1), d = x.size(1), core_size = cores ? cores->size(-1) : 0;
  if (cores) {
    check_type(*cores, x);
    TORCH_CHECK_VALUE(cores->stride(3) == 1, "the rows of a core must be contiguous");
  }
  Tensor h = at::empty({x.size(0), n, width}, x.options().dtype(at::kFloat));
  const std::vector<Run> own = runs(tiles, x.size(0), std::max(kShrinkRows, longest(tiles)));
  const int32_t* core_of = row_cores.const_data_ptr<int32_t>();
  const int64_t* address = u_ptr.const_data_ptr<int64_t>();
  const int32_t* rank = ranks.const_data_ptr<int32_t>();
  float* to = h.data_ptr<float>();
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T* rows = x.const_data_ptr<T>();
    std::vector<std::pair<Run, int64_t>> items;  // rows, and a target that their adapter has
    for (const Run& run : own)
      for (int64_t j = 0; run.adapter >= 0 && j < n; j++)
        if (rank[run.adapter * n + j]) items.emplace_back(run, j);
    const int64_t last = items.size() - 1;
    const auto factor = [&](int64_t item) {
      return reinterpret_cast<const T*>(address[items[item].first.adapter * n + items[item].second]);
    };
    deal(items.size(), d * width, [&](int64_t item) {
      const auto& [run, j] = items[item];
      const int64_t count = run.end - run.first, r = rank[run.adapter * n + j];
      float* t = scratch(count * r);
      // The factor behind the one that is asked for is likely to be another thread's.
      const T* next = factor(std::min(item + at::get_num_threads(), last));
      shrink(rows + run.first * x.stride(0), x.stride(0), factor(item), count, r, d, t, next);
      float* out = to + (run.first * n + j) * width;
      if (core_size < r) {
        for (int64_t i = 0; i < count; i++) std::memcpy(out + i * n * width, t + i * r, r * sizeof(float));
        return;
      }
      for (int64_t i = 0; i < count; i++) std::fill_n(out + i * n * width, r, 0.f);
      for (int64_t i = 0, end = 0; i < count; i = end) {
        const int64_t own_core = core_of[run.first + i];
        for (end = i + 1; end < count && core_of[run.first + end] == own_core; end++) {}
        const T* core = cores->const_data_ptr<T>() + own_core * cores->stride(0) + j * cores->stride(1);
        add_product(out + i * n * width, n * width, t + i * r, r, Strided<T>{core, cores->stride(2)}, end - i, r, r);
      }
    });
  });
  return h;
}

const Methods kShrinkCoreMethods{{"shrink_core", call<&shrink_core>}};

}  // namespace tucka
