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

// An item of work: the columns first..first + count of a run's rows.
struct Piece {
  Run run;
  int64_t first, count;
};

// A batch's rows, `width` columns of each, in pieces whose columns are multiples of `unit`.
struct Pieces {
  std::vector<Run> own;
  int64_t width, most, parts;

  Pieces(const std::optional<Tensor>& tiles, int64_t num_rows, int64_t columns_in, int64_t unit)
      : own(runs(tiles, num_rows, kRows)), width(columns_in), most(columns(width, own.size(), unit)),
        parts((width + most - 1) / most) {}

  int64_t count() const { return own.size() * parts; }

  Piece operator[](int64_t item) const {
    const int64_t first = item % parts * most;
    return {own[item / parts], first, std::min(most, width - first)};
  }

  // The one that the thread which has this item is likely to take next.
  Piece after(int64_t item) const { return (*this)[std::min(item + at::get_num_threads(), count() - 1)]; }
};

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

  // E of an adapter's target j, from a column of the site on; null if that is not the target's, or there is none.
  template <class T>
  const T* factor(int64_t adapter, int64_t j, int64_t column) const {
    const bool own = column >= borders[j] && column < borders[j + 1];
    if (adapter < 0 || !own || rank[adapter * n + j] == 0) return nullptr;
    return reinterpret_cast<const T*>(e_ptr[adapter * n + j]) + (column - borders[j]);
  }

  // Adds the delta of a piece to out (rows, count) fp32; meanwhile what the piece behind it reads is asked for. Columns are
  // `offset` behind the pieces' own. T: the factors' type.
  template <class T>
  void add(float* out, int64_t stride, const Piece& piece, const Piece& after, int64_t offset) const {
    const Run& run = piece.run;
    if (h == nullptr || run.adapter < 0) return;
    const int64_t first = offset + piece.first;
    for (int64_t j = 0; j < n; j++) {
      const int64_t begin = std::max<int64_t>(borders[j], first);
      const int64_t end = std::min<int64_t>(borders[j + 1], first + piece.count);
      if (begin >= end) continue;
      const T* e = factor<T>(run.adapter, j, begin);
      if (e == nullptr) continue;
      const T* next = factor<T>(after.run.adapter, j, begin + after.first - piece.first);
      stream_product(out + (begin - first), stride, h + (run.first * n + j) * width, n * width, e,
                     borders[j + 1] - borders[j], run.end - run.first, rank[run.adapter * n + j], end - begin,
                     next == nullptr ? e : next);
    }
  }

  // Multiply-adds of one row and column, about.
  int64_t work() const { return 1 + width; }
};

// Leaves in out (rows, count) fp32 a piece of y's rows, scaled, and its delta; columns are `offset` behind the pieces' own.
template <class T>
inline void summed(const Delta& delta, const T* y, int64_t y_stride, float* out, int64_t stride, const Piece& piece,
                   const Piece& after, int64_t offset = 0) {
  const Run& run = piece.run;
  const int64_t first = offset + piece.first;
  for (int64_t r = run.first; r < run.end; r++)
    to_float(y + r * y_stride + first, out + (r - run.first) * stride, piece.count);
  delta.scale(out, stride, run, first, piece.count);
  delta.add<T>(out, stride, piece, after, offset);
}

}  // namespace tucka
