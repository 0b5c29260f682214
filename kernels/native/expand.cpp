// ops.Expand.
#include "delta.h"
#include "methods.h"

namespace tucka {

void expand(const Tensor& y, const std::optional<Tensor>& h, const std::optional<Tensor>& e_ptr,
            const std::optional<Tensor>& affine_ptr, const std::optional<Tensor>& rank,
            const std::optional<Tensor>& borders, const std::optional<Tensor>& tiles) {
  TORCH_CHECK_VALUE(y.stride(1) == 1, "the rows of y must be contiguous");
  const Delta delta(h, e_ptr, affine_ptr, rank, borders);
  const std::vector<Run> own = runs(tiles, y.size(0), kRows);
  const int64_t width = y.size(1), most = columns(width, own.size(), kStep), parts = (width + most - 1) / most;
  by_type(y, [&](auto type) {
    using T = decltype(type);
    T* rows = y.data_ptr<T>();
    deal(own.size() * parts, kRows * most * delta.work(), [&](int64_t item) {
      const Run& run = own[item / parts];
      if (run.adapter < 0) return;
      const int64_t first = item % parts * most, count = std::min(most, width - first);
      float* sums = scratch(kRows * most);
      summed(delta, rows, y.stride(0), sums, most, run, first, count);
      for (int64_t r = run.first; r < run.end; r++)
        from_float(sums + (r - run.first) * most, rows + r * y.stride(0) + first, count);
    });
  });
}

const Methods kExpandMethods{{"expand", call<&expand>}};

}  // namespace tucka
