// C += A B for a few rows: what expands, cores and attention have in common.
#pragma once

#include "vectors.h"

namespace tucka {

// Rows of B that lie one after the other.
template <class T>
struct Strided {
  const T* first;
  int64_t stride;
  const T* operator[](int64_t k) const { return first + k * stride; }
};

// R rows of C, N steps wide from column `at` on. WHOLE: else the one step has `count` columns.
template <int R, int N, bool WHOLE, class B>
inline void add_block(float* c, int64_t c_stride, const float* a, int64_t a_stride, const B& b, int64_t depth,
                      int64_t at, int64_t count) {
  const int64_t some = WHOLE ? kStep : count;
  Vec sums[R][2 * N];
  each<R>([&](auto r) {
    each<N>([&](auto n) {
      const Pair x = load_step(c + r * c_stride + at + n * kStep, some);
      sums[r][2 * n] = x.a;
      sums[r][2 * n + 1] = x.b;
    });
  });
  for (int64_t k = 0; k < depth; k++) {
    const auto* row = b[k] + at;
    Vec wide[2 * N];
    each<N>([&](auto n) {
      const Pair x = load_step(row + n * kStep, some);
      wide[2 * n] = x.a;
      wide[2 * n + 1] = x.b;
    });
    each<R>([&](auto r) {
      const Vec x(a[r * a_stride + k]);
      each<2 * N>([&](auto n) { sums[r][n] = at::vec::fmadd(x, wide[n], sums[r][n]); });
    });
  }
  each<R>([&](auto r) {
    each<N>([&](auto n) {
      store_step(c + r * c_stride + at + n * kStep, Pair{sums[r][2 * n], sums[r][2 * n + 1]}, some);
    });
  });
}

template <int R, int N, class B>
inline void add_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride, const B& b, int64_t depth,
                     int64_t width) {
  int64_t at = 0;
  for (; at + N * kStep <= width; at += N * kStep) add_block<R, N, true>(c, c_stride, a, a_stride, b, depth, at, kStep);
  if constexpr (N > 2)
    for (; at + 2 * kStep <= width; at += 2 * kStep)
      add_block<R, 2, true>(c, c_stride, a, a_stride, b, depth, at, kStep);
  for (; at + kStep <= width; at += kStep) add_block<R, 1, true>(c, c_stride, a, a_stride, b, depth, at, kStep);
  if (at < width) add_block<R, 1, false>(c, c_stride, a, a_stride, b, depth, at, width - at);
}

// c (rows, width) += a (rows, depth) b (depth, width), c and a fp32; b[k] is where row k of b begins. A row's sums do
// not depend on how many others there are.
template <class B>
inline void add_product(float* c, int64_t c_stride, const float* a, int64_t a_stride, const B& b, int64_t rows,
                        int64_t depth, int64_t width) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) add_rows<6, 1>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, depth, width);
  for (; r + 4 <= rows; r += 4) add_rows<4, 1>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, depth, width);
  for (; r + 2 <= rows; r += 2) add_rows<2, 2>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, depth, width);
  if (r < rows) add_rows<1, 4>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, depth, width);
}

// Rows of B that are added at once where B comes from memory, one behind the other.
constexpr int kStreams = 4;

// R rows of C += K rows of b. Meanwhile K others, from `next` on, are asked for.
template <int R, int K, class T>
inline void add_streams(float* c, int64_t c_stride, const float* a, int64_t a_stride, const T* b, int64_t stride,
                        int64_t width, const T* next) {
  Vec x[R][K];
  each<R>([&](auto r) { each<K>([&](auto k) { x[r][k] = Vec(a[r * a_stride + k]); }); });
  steps(width, [&](int64_t i, int64_t count) {
    Vec low[K], high[K];
    each<K>([&](auto k) {
      prefetch(next + k * stride + i);
      const Pair row = load_step(b + k * stride + i, count);
      low[k] = row.a;
      high[k] = row.b;
    });
    each<R>([&](auto r) {
      Pair y = load_step(c + r * c_stride + i, count);
      each<K>([&](auto k) {
        y.a = at::vec::fmadd(x[r][k], low[k], y.a);
        y.b = at::vec::fmadd(x[r][k], high[k], y.b);
      });
      store_step(c + r * c_stride + i, y, count);
    });
  });
}

template <int R, class T>
inline void stream_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride, const T* b, int64_t stride,
                        int64_t depth, int64_t width, const T* next) {
  int64_t k = 0;
  for (; k + kStreams <= depth; k += kStreams)
    add_streams<R, kStreams>(c, c_stride, a + k, a_stride, b + k * stride, stride, width, next + k * stride);
  for (; k < depth; k++)
    add_streams<R, 1>(c, c_stride, a + k, a_stride, b + k * stride, stride, width, next + k * stride);
}

// The same sums as add_product's, to the bit, where B comes from memory: it is read in its order, and c, which stays in
// the L1 cache, again and again. Meanwhile `next` is asked for, which is as large.
template <class T>
inline void stream_product(float* c, int64_t c_stride, const float* a, int64_t a_stride, const T* b, int64_t stride,
                           int64_t rows, int64_t depth, int64_t width, const T* next) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    stream_rows<4>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, stride, depth, width, next);
  for (; r + 2 <= rows; r += 2)
    stream_rows<2>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, stride, depth, width, next);
  if (r < rows) stream_rows<1>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, b, stride, depth, width, next);
}

}  // namespace tucka
