// The delta of a batch's rows, for the ops that add it to what they must touch anyway.
#pragma once

#include "product.h"

namespace tucka {

// Up to so many rows of one adapter are added to at once: their sums stay in the L1 cache.
constexpr int64_t kRows = 4;

// Rows first..end of one adapter, whose factors they share whatever their cores are; -1 for the base's.
struct Run {
  int64_t first, end, adapter;
};

// The rows of a batch in runs of at most `most`; `tiles` None: all are the base's. Tiles of one adapter that lie side by
// side, as of requests with routes of their own or of a bank's members, are one run: factors are read once for it.
inline std::vector<Run> runs(const std::optional<Tensor>& tiles, int64_t num_rows, int64_t most) {
  std::vector<Run> whole, out;
  if (!tiles) {
    whole.push_back({0, num_rows, -1});
  } else {
    const int32_t* t = tiles->const_data_ptr<int32_t>();
    for (int64_t i = 0; i < tiles->size(0); i++, t += 4) {
      if (!whole.empty() && whole.back().end == t[0] && whole.back().adapter == t[3])
        whole.back().end = std::max<int64_t>(whole.back().end, t[1]);
      else
        whole.push_back({t[0], t[1], t[3]});
    }
  }
  for (const Run& run : whole)
    for (int64_t first = run.first; first < run.end; first += most)
      out.push_back({first, std::min(first + most, run.end), run.adapter});
  return out;
}

// Columns of one item of work, a multiple of `unit`: so many that what is read of a row of E is long, and as few as give
// each thread some items. For eight adapters of rank 16 on one thread, 8 rows: gate and up of 1,408 in 70 us, where items
// of 128 columns take 100, and q, k and v of 1,024 in 38, where those of a head, 64, take 57.
inline int64_t columns(int64_t width, int64_t num_runs, int64_t unit) {
  constexpr int64_t kMost = 1024, kItems = 4;
  const int64_t wanted = kItems * at::get_num_threads();
  const int64_t parts = std::max((wanted + num_runs - 1) / std::max<int64_t>(num_runs, 1), (width + kMost - 1) / kMost);
  const int64_t units = (width + unit - 1) / unit;
  return std::max<int64_t>((units + parts - 1) / parts, 1) * unit;
}

// h (T, n, R) fp32, and where a site's E, and what scales the base's product, lie (ops.LowRank).
struct Delta {
  std::optional<Tensor> h_, e_ptr_, affine_ptr_, rank_, borders_;
  const float* h = nullptr;
  const int64_t *e_ptr = nullptr, *affine_ptr = nullptr;
  const int32_t *rank = nullptr, *borders = nullptr;
  int64_t n = 0, width = 0;

  Delta(const std::optional<Tensor>& h_in, const std::optional<Tensor>& e_in, const std::optional<Tensor>& affine_in,
        const std::optional<Tensor>& rank_in, const std::optional<Tensor>& borders_in)
      : h_(h_in), e_ptr_(e_in), affine_ptr_(affine_in), rank_(rank_in), borders_(borders_in) {
    if (!h_) return;
    h = h_->const_data_ptr<float>();
    e_ptr = e_ptr_->const_data_ptr<int64_t>();
    if (affine_ptr_) affine_ptr = affine_ptr_->const_data_ptr<int64_t>();
    rank = rank_->const_data_ptr<int32_t>();
    borders = borders_->const_data_ptr<int32_t>();
    n = h_->size(1);
    width = h_->size(2);
  }

  // Scales and offsets the base's columns first..first + count of a run's rows in out (rows, count) fp32.
  void scale(float* out, int64_t stride, const Run& run, int64_t first, int64_t count) const {
    if (affine_ptr == nullptr || run.adapter < 0) return;
    for (int64_t j = 0; j < n; j++) {
      const int64_t begin = std::max<int64_t>(borders[j], first);
      const int64_t end = std::min<int64_t>(borders[j + 1], first + count);
      const float* s = reinterpret_cast<const float*>(affine_ptr[run.adapter * n + j]);
      if (begin >= end || s == nullptr) continue;
      const float* o = s + (borders[j + 1] - borders[j]);
      for (int64_t r = 0; r < run.end - run.first; r++)
        for (int64_t i = begin; i < end; i++) {
          float& y = out[r * stride + i - first];
          y = s[i - borders[j]] * y + o[i - borders[j]];
        }
    }
  }

  // Adds the columns first..first + count of the delta of a run's rows to out (rows, count) fp32. T: the factors' type.
  template <class T>
  void add(float* out, int64_t stride, const Run& run, int64_t first, int64_t count) const {
    if (h == nullptr || run.adapter < 0) return;
    for (int64_t j = 0; j < n; j++) {
      const int64_t begin = std::max<int64_t>(borders[j], first);
      const int64_t end = std::min<int64_t>(borders[j + 1], first + count);
      const int64_t at = run.adapter * n + j, depth = rank[at];
      if (begin >= end || depth == 0) continue;
      const int64_t row = borders[j + 1] - borders[j];
      const T* e = reinterpret_cast<const T*>(e_ptr[at]) + (begin - borders[j]);
      stream_product(out + (begin - first), stride, h + (run.first * n + j) * width, n * width, e, row,
                     run.end - run.first, depth, end - begin);
    }
  }

  // Multiply-adds of one row and column, about.
  int64_t work() const { return 1 + width; }
};

// Leaves in out (rows, count) fp32 the columns first..first + count of y's rows, scaled, and their delta.
template <class T>
inline void summed(const Delta& delta, const T* y, int64_t y_stride, float* out, int64_t stride, const Run& run,
                   int64_t first, int64_t count) {
  for (int64_t r = run.first; r < run.end; r++)
    to_float(y + r * y_stride + first, out + (r - run.first) * stride, count);
  delta.scale(out, stride, run, first, count);
  delta.add<T>(out, stride, run, first, count);
}

}  // namespace tucka
