// ops.Expand.
#include "delta.h"
#include "methods.h"

namespace tucka {

void expand(const Tensor& y, const std::optional<Tensor>& h, const std::optional<Tensor>& e_ptr,
            const std::optional<Tensor>& affine_ptr, const std::optional<Tensor>& rank,
            const std::optional<Tensor>& borders, const std::optional<Tensor>& tiles) {
  TORCH_CHECK_VALUE(y.stride(1) == 1, "the rows of y must be contiguous");
  const Delta delta(h, e_ptr, affine_ptr, rank, borders);
  const Pieces pieces(tiles, y.size(0), y.size(1), kStep);
  const int64_t most = pieces.most;
  by_type(y, [&](auto type) {
    using T = decltype(type);
    T* rows = y.data_ptr<T>();
    deal(pieces.count(), kRows * most * delta.work(), [&](int64_t item) {
      const Piece piece = pieces[item];
      const auto& [run, first, count] = piece;
      if (run.adapter < 0) return;
      float* sums = scratch(kRows * most);
      summed(delta, rows, y.stride(0), sums, most, piece, pieces.after(item));
      for (int64_t r = run.first; r < run.end; r++)
        from_float(sums + (r - run.first) * most, rows + r * y.stride(0) + first, count);
    });
  });
}

const Methods kExpandMethods{{"expand", call<&expand>}};

}  // namespace tucka
