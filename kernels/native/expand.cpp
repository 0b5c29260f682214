// ops.Expand.
#include "delta.h"
#include "methods.h"

namespace tucka {

// Columns of one item of work.
constexpr int64_t kExpandColumns = 256;

void expand(const Tensor& y, const std::optional<Tensor>& h, const std::optional<Tensor>& e_ptr,
            const std::optional<Tensor>& affine_ptr, const std::optional<Tensor>& rank,
            const std::optional<Tensor>& borders, const std::optional<Tensor>& tiles) {
  TORCH_CHECK_VALUE(y.stride(1) == 1, "the rows of y must be contiguous");
  const Delta delta(h, e_ptr, affine_ptr, rank, borders);
  const std::vector<Run> own = runs(tiles, y.size(0), kRows);
  const int64_t width = y.size(1), parts = (width + kExpandColumns - 1) / kExpandColumns;
  by_type(y, [&](auto type) {
    using T = decltype(type);
    T* rows = y.data_ptr<T>();
    deal(own.size() * parts, kRows * kExpandColumns * delta.work(), [&](int64_t item) {
      const Run& run = own[item / parts];
      if (run.adapter < 0) return;
      const int64_t first = item % parts * kExpandColumns, count = std::min(kExpandColumns, width - first);
      float sums[kRows * kExpandColumns];
      summed(delta, rows, y.stride(0), sums, kExpandColumns, run, first, count);
      for (int64_t r = run.first; r < run.end; r++)
        from_float(sums + (r - run.first) * kExpandColumns, rows + r * y.stride(0) + first, count);
    });
  });
}

const Methods kExpandMethods{{"expand", call<&expand>}};

}  // namespace tucka
