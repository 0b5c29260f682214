// Rows of fp32, bf16 or fp16 as vectors of fp32, and work dealt out to threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "pool.h"

namespace tucka {

using at::BFloat16;
using at::Half;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
// Elements that are loaded at once: a vector of 16-bit numbers becomes two of fp32.
constexpr int64_t kStep = 2 * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Pair {
  Vec a, b;
};

// kStep elements from p on.
template <class T>
inline Pair load_pair(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(p), Vec::loadu(p + kLanes)};
  } else if constexpr (std::is_same_v<T, int8_t>) {
#if defined(CPU_CAPABILITY_AVX512)
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))),
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kLanes))))};
#elif defined(CPU_CAPABILITY_AVX2)
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + kLanes))))};
#else
    float wide[kStep];
    for (int64_t i = 0; i < kStep; i++) wide[i] = p[i];
    return load_pair(wide);
#endif
  } else {
    static_assert(at::vec::Vectorized<T>::size() == kStep);
    auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
    return {a, b};
  }
}

// `count` elements, fewer than kStep, and zeros: nothing is read behind them.
template <class T>
inline Pair load_pair(const T* p, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask32 own = (__mmask32{1} << count) - 1;
  if constexpr (std::is_same_v<T, float>) {
    return {_mm512_maskz_loadu_ps(own, p), _mm512_maskz_loadu_ps(own >> kLanes, p + kLanes)};
  } else if constexpr (sizeof(T) == 2) {
    auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>(_mm512_maskz_loadu_epi16(own, p)));
    return {a, b};
  }
#endif
  T buffer[kStep] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load_pair(buffer);
}

template <class T>
inline void store_pair(T* p, Pair x) {
  if constexpr (std::is_same_v<T, float>) {
    x.a.store(p);
    x.b.store(p + kLanes);
  } else {
    at::vec::convert_from_float<T>(x.a, x.b).store(p);
  }
}

template <class T>
inline void store_pair(T* p, Pair x, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask32 own = (__mmask32{1} << count) - 1;
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, own, x.a);
    _mm512_mask_storeu_ps(p + kLanes, own >> kLanes, x.b);
    return;
  } else if constexpr (sizeof(T) == 2) {
    _mm512_mask_storeu_epi16(p, own, at::vec::convert_from_float<T>(x.a, x.b));
    return;
  }
#endif
  T buffer[kStep];
  store_pair(buffer, x);
  std::memcpy(p, buffer, count * sizeof(T));
}

// Bytes that are asked for ahead of what is read of memory. They go into the L2 cache, which waits for more lines at once
// than the L1 cache does: keys and values come with 21 GB/s to one thread, where 4,096 bytes ahead, into the L1 cache, make
// it 9; with 6,144 it is as fast, with 4,096 and 16,384 an eighth slower (EPYC with AVX512-BF16).
constexpr int64_t kAhead = 8192, kLine = 64;

// Asks for the line of an address.
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// f(0) to f(N - 1), each number a type of its own: what arrays are indexed with is a constant from the start, so that GCC
// keeps them in registers. It leaves an array of Pairs, or one that a loop indexes, in memory: half as fast.
template <int N, class F>
inline __attribute__((always_inline)) void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (f(std::integral_constant<int, I>()), ...); }
  (std::make_integer_sequence<int, N>());
}

// f(i, count) for every step of n elements; count is kStep but for the last.
template <class F>
inline void steps(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) f(i, kStep);
  if (i < n) f(i, n - i);
}

template <class T>
inline Pair load_step(const T* p, int64_t count) {
  return count == kStep ? load_pair(p) : load_pair(p, count);
}

template <class T>
inline void store_step(T* p, Pair x, int64_t count) {
  if (count == kStep)
    store_pair(p, x);
  else
    store_pair(p, x, count);
}

template <class T>
inline void to_float(const T* x, float* out, int64_t n) {
  steps(n, [&](int64_t i, int64_t count) { store_step(out + i, load_step(x + i, count), count); });
}

template <class T>
inline void from_float(const float* x, T* out, int64_t n) {
  steps(n, [&](int64_t i, int64_t count) { store_step(out + i, load_step(x + i, count), count); });
}

// The sums of the lanes of four vectors.
inline void sum4(const Vec* x, float* out) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  __m256 half[4];
  for (int i = 0; i < 4; i++) {
#if defined(CPU_CAPABILITY_AVX512)
    __m512 whole = x[i];
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
    half[i] = x[i];
#endif
  }
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; i++) {
    float lanes[kLanes], total = 0;
    x[i].store(lanes);
    for (float lane : lanes) total += lane;
    out[i] = total;
  }
#endif
}

inline float sum(Vec x) {
  Vec all[4] = {x, Vec(0.f), Vec(0.f), Vec(0.f)};
  float out[4];
  sum4(all, out);
  return out[0];
}

// A step of a row as it is multiplied with another row's: bf16 where the CPU multiplies it, else fp32.
#if defined(__AVX512BF16__)
inline __m512bh load_factor(const BFloat16* p, int64_t count) {
  return (__m512bh)(count == kStep ? _mm512_loadu_si512(p)
                                   : _mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p));
}

inline Vec add_products(Vec sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

template <class T>
inline Pair load_factor(const T* p, int64_t count) {
  return load_step(p, count);
}

inline Vec add_products(Vec sum, const Pair& a, const Pair& b) {
  return at::vec::fmadd(a.b, b.b, at::vec::fmadd(a.a, b.a, sum));
}

// Calls f with a value of the type that the rows have.
template <class F>
inline auto by_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Half{});
    default:
      TORCH_CHECK_VALUE(false, "native kernels take rows in float32, bfloat16 or float16, not in ", x.scalar_type());
  }
}

inline void check_type(const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type(), "native kernels take all tensors of a call in one type: ",
                    x.scalar_type(), " beside ", like.scalar_type());
}

// Under so many multiply-adds a second thread costs more than it saves.
constexpr int64_t kAlone = 1 << 15;

// f(i) for every item, each of about `work` multiply-adds, on as many threads as torch has: whoever is free takes the next.
template <class F>
inline void deal(int64_t items, int64_t work, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  if (threads <= 1 || items * work <= kAlone) {
    for (int64_t i = 0; i < items; i++) f(i);
    return;
  }
  Pool::own().run(items, threads, f);
}

// Scratch of one thread, kept from call to call.
inline float* scratch(size_t count) {
  thread_local std::vector<float> room;
  if (room.size() < count) room.resize(count);
  return room.data();
}

}  // namespace tucka
