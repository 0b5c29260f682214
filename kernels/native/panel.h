// Matrices in panels, of which a few rows of inputs are multiplied with: weights, and what attention turns into them.
#pragma once

#include "vectors.h"

namespace tucka {

// Columns of y, which are rows of W, in a panel.
constexpr int64_t kPanel = kStep;

// Inputs of a column that lie side by side in a panel and are multiplied at once: two where the CPU multiplies bf16. It
// takes numbers under 2⁻¹²⁶ for zero, and rounds once a product of two.
#if defined(__AVX512BF16__)
template <class T>
constexpr int64_t kInputs = std::is_same_v<T, BFloat16> ? 2 : 1;
#else
template <class T>
constexpr int64_t kInputs = 1;
#endif

// Where input k of column c lies in a panel, (ceil(d_in / kInputs), kPanel · kInputs).
template <class T>
inline int64_t place(int64_t k, int64_t c) {
  if constexpr (kInputs<T> > 1) return k / kInputs<T> * kInputs<T> * kPanel + c * kInputs<T> + k % kInputs<T>;
  // The columns c and c + kLanes lie side by side: a shift and a mask make fp32 of them.
  if constexpr (std::is_same_v<T, BFloat16>) return k * kPanel + c % kLanes * 2 + c / kLanes;
  return k * kPanel + c;
}

// Rows of y that are summed up at once, two vectors each: what the registers hold beside a step of the panel.
#if defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 12;
#endif

// Bytes of a panel that are asked for ahead, into the L1 cache: the hardware itself does not look beyond a page.
constexpr int64_t kPanelAhead = 4096;

// One input of a panel's columns.
template <class T>
inline Pair load_panel(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Words = at::vec::Vectorized<int32_t>;
    const Words words = Words::loadu(p);
    return {at::vec::cast<float>(words << Words(16)), at::vec::cast<float>(words & Words(~0xFFFF))};
  } else {
    return load_pair(p);
  }
}

// sums (R, kPanel) += x (depth, R) w (depth, kPanel), from zero on for the first inputs; with an S, x is (R, S) and its
// first `depth` columns are taken. With two inputs at once an x is two numbers of bf16.
template <int R, class T, int64_t S>
void add_tile(const float* x, const T* w, int64_t depth, bool first, float* sums, int64_t stride) {
  Vec a[R], b[R];
  each<R>([&](auto r) {
    a[r] = first ? Vec(0.f) : Vec::loadu(sums + r * stride);
    b[r] = first ? Vec(0.f) : Vec::loadu(sums + r * stride + kLanes);
  });
#if defined(__AVX512BF16__)
  if constexpr (kInputs<T> > 1) {
    for (int64_t k = 0; k < depth; k++, x += S ? 1 : R, w += kPanel * kInputs<T>) {
      __builtin_prefetch(w + kPanelAhead / sizeof(T));
      __builtin_prefetch(w + kPanelAhead / sizeof(T) + kPanel);
      const auto y = (__m512bh)_mm512_loadu_si512(w), z = (__m512bh)_mm512_loadu_si512(w + kPanel);
      each<R>([&](auto r) {
        const auto value = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(x[S ? r * S : r]));
        a[r] = _mm512_dpbf16_ps(a[r], value, y);
        b[r] = _mm512_dpbf16_ps(b[r], value, z);
      });
    }
    depth = 0;
  }
#endif
  for (int64_t k = 0; k < depth; k++, x += S ? 1 : R, w += kPanel) {
    __builtin_prefetch(w + kPanelAhead / sizeof(T));
    const Pair y = load_panel(w);
    each<R>([&](auto r) {
      const Vec value(x[S ? r * S : r]);
      a[r] = at::vec::fmadd(value, y.a, a[r]);
      b[r] = at::vec::fmadd(value, y.b, b[r]);
    });
  }
  each<R>([&](auto r) {
    a[r].store(sums + r * stride);
    b[r].store(sums + r * stride + kLanes);
  });
}

template <class T>
using AddTile = void (*)(const float*, const T*, int64_t, bool, float*, int64_t);

// add_tile for one row, for two, and so on.
template <class T, int64_t S, int... R>
constexpr std::array<AddTile<T>, sizeof...(R)> tiles_of(std::integer_sequence<int, R...>) {
  return {add_tile<R + 1, T, S>...};
}

// Rows of a batch in tiles of nearly the same size.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t n) : rows(n), count((n + kTileRows - 1) / kTileRows) {}
  int64_t first(int64_t i) const { return rows * i / count; }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }
};

}  // namespace tucka
