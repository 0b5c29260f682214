// Norms of rows.
#pragma once

#include "vectors.h"

namespace tucka {

inline void check_norm(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& x) {
  for (const Tensor* w : {&weight, bias ? &*bias : nullptr})
    if (w != nullptr) {
      check_type(*w, x);
      TORCH_CHECK_VALUE(w->is_contiguous() && w->numel() == x.size(-1), "a norm's weights must be contiguous, one for each ",
                        "number of a row");
    }
}

// RMSNorm of x (d,), or LayerNorm where there is a bias, into out, which may be x itself.
template <class X, class T, class Y>
inline void norm_row(const X* x, const T* weight, const T* bias, Y* out, int64_t d, float eps) {
  float mean = 0;
  if (bias != nullptr) {
    Pair total{Vec(0.f), Vec(0.f)};
    steps(d, [&](int64_t i, int64_t count) {
      const Pair v = load_step(x + i, count);
      total = {total.a + v.a, total.b + v.b};
    });
    mean = sum(total.a + total.b) / static_cast<float>(d);
  }
  const Vec shift(mean);
  Pair squares{Vec(0.f), Vec(0.f)};
  steps(d, [&](int64_t i, int64_t count) {
    Pair v = load_step(x + i, count);
    v = {v.a - shift, v.b - shift};
    if (count < kStep && mean != 0) {  // what fills up the last step is no part of the row
      float lanes[kStep];
      store_pair(lanes, v);
      std::fill(lanes + count, lanes + kStep, 0.f);
      v = load_pair(lanes);
    }
    squares = {at::vec::fmadd(v.a, v.a, squares.a), at::vec::fmadd(v.b, v.b, squares.b)};
  });
  const Vec scale(1.f / std::sqrt(sum(squares.a + squares.b) / static_cast<float>(d) + eps));
  steps(d, [&](int64_t i, int64_t count) {
    const Pair v = load_step(x + i, count), w = load_step(weight + i, count);
    Pair y{(v.a - shift) * scale * w.a, (v.b - shift) * scale * w.b};
    if (bias != nullptr) {
      const Pair b = load_step(bias + i, count);
      y = {y.a + b.a, y.b + b.b};
    }
    store_step(out + i, y, count);
  });
}

}  // namespace tucka
