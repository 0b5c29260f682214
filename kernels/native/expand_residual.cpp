// ops.ExpandResidual.
#include "delta.h"
#include "methods.h"
#include "norm.h"

namespace tucka {

std::tuple<Tensor, Tensor> expand_residual(const Tensor& y, const Tensor& residual, const Tensor& weight,
                                           const std::optional<Tensor>& bias, double eps,
                                           const std::optional<Tensor>& h, const std::optional<Tensor>& e_ptr,
                                           const std::optional<Tensor>& affine_ptr, const std::optional<Tensor>& rank,
                                           const std::optional<Tensor>& borders, const std::optional<Tensor>& tiles) {
  check_type(residual, y);
  check_norm(weight, bias, y);
  TORCH_CHECK_VALUE(y.stride(1) == 1 && residual.stride(1) == 1, "rows must be contiguous");
  const Delta delta(h, e_ptr, affine_ptr, rank, borders);
  const int64_t d = y.size(1);
  const Pieces pieces(tiles, y.size(0), d, d);  // whole rows
  Tensor total = at::empty({y.size(0), d}, y.options()), out = at::empty({y.size(0), d}, y.options());
  by_type(y, [&](auto type) {
    using T = decltype(type);
    const T *from = y.const_data_ptr<T>(), *before = residual.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
    T *sum_to = total.data_ptr<T>(), *norm_to = out.data_ptr<T>();
    deal(pieces.count(), kRows * d * delta.work(), [&](int64_t item) {
      const Piece piece = pieces[item];
      const Run& run = piece.run;
      float* sums = scratch(kRows * d);
      summed(delta, from, y.stride(0), sums, d, piece, pieces.after(item));
      for (int64_t r = run.first; r < run.end; r++) {
        const float* row = sums + (r - run.first) * d;
        const T* old = before + r * residual.stride(0);
        T* stored = sum_to + r * d;
        steps(d, [&](int64_t i, int64_t count) {
          const Pair a = load_step(row + i, count), x = load_step(old + i, count);
          store_step(stored + i, Pair{a.a + x.a, a.b + x.b}, count);
        });
        norm_row(stored, w, b, norm_to + r * d, d, static_cast<float>(eps));  // of the sum as it is stored
      }
    });
  });
  return {out, total};
}

const Methods kExpandResidualMethods{{"expand_residual", call<&expand_residual>}};

}  // namespace tucka
