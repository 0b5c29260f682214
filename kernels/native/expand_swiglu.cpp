// ops.ExpandSwiglu.
#include "delta.h"
#include "methods.h"

namespace tucka {

Tensor expand_swiglu(const Tensor& gate_up, const std::optional<Tensor>& h, const std::optional<Tensor>& e_ptr,
                     const std::optional<Tensor>& affine_ptr, const std::optional<Tensor>& rank,
                     const std::optional<Tensor>& borders, const std::optional<Tensor>& tiles) {
  TORCH_CHECK_VALUE(gate_up.stride(1) == 1, "the rows of gate_up must be contiguous");
  const Delta delta(h, e_ptr, affine_ptr, rank, borders);
  const int64_t width = gate_up.size(1) / 2;
  const Pieces pieces(tiles, gate_up.size(0), width, kStep);
  const int64_t most = pieces.most;
  Tensor out = at::empty({gate_up.size(0), width}, gate_up.options());
  by_type(gate_up, [&](auto type) {
    using T = decltype(type);
    const T* rows = gate_up.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    deal(pieces.count(), kRows * most * (8 + 2 * delta.work()), [&](int64_t item) {
      const Piece piece = pieces[item], after = pieces.after(item);
      const auto& [run, first, count] = piece;
      float *gate = scratch(2 * kRows * most), *up = gate + kRows * most;
      summed(delta, rows, gate_up.stride(0), gate, most, piece, after);
      summed(delta, rows, gate_up.stride(0), up, most, piece, after, width);
      for (int64_t r = 0; r < run.end - run.first; r++) {
        const float *g = gate + r * most, *u = up + r * most;
        T* row = to + (run.first + r) * width + first;
        const Vec one(1.f);
        steps(piece.count, [&](int64_t i, int64_t some) {
          const Pair a = load_step(g + i, some), b = load_step(u + i, some);
          const Pair y{a.a / (one + a.a.neg().exp()) * b.a, a.b / (one + a.b.neg().exp()) * b.b};
          store_step(row + i, y, some);
        });
      }
    });
  });
  return out;
}

const Methods kExpandSwigluMethods{{"expand_swiglu", call<&expand_swiglu>}};

}  // namespace tucka
