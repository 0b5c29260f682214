// An int8 KV cache: behind the numbers of all heads of a slot lie their fp32 scales (tables/blocks.py).
#pragma once

#include "vectors.h"

namespace tucka {

// The largest quantised number, and the smallest range that a scale is made for: it keeps 127 / range finite.
constexpr float kLargest = 127.f, kSmallest = 1e-30f;

// Checks the layout of two caches (slots, KV, D), and tells whether they are int8: else they are in the rows' type.
inline bool check_caches(const Tensor& k, const Tensor& v, const Tensor& rows) {
  const bool quantized = k.scalar_type() == at::kChar;
  if (!quantized) check_type(k, rows);
  check_type(v, k);
  for (const Tensor& cache : {k, v})
    TORCH_CHECK_VALUE(cache.stride(2) == 1 && cache.stride(1) == cache.size(2) && cache.stride(0) == k.stride(0),
                      "the heads of a slot must be contiguous, in both caches alike");
  TORCH_CHECK_VALUE(!quantized || k.stride(0) >= k.size(1) * (k.size(2) + static_cast<int64_t>(sizeof(float))),
                    "a slot of an int8 cache must have room for its scales");
  return quantized;
}

// Writes a head (D,) fp32 and its scale. One that is not finite gets a scale that is not, so that it does not end as
// plain numbers.
inline void quantize(const float* x, int8_t* to, void* scale_to, int64_t d) {
  float range = kSmallest;
  for (int64_t i = 0; i < d; i++) {
    const float size = std::abs(x[i]);
    range = size > range || size != size ? size : range;
  }
  const float scale = range / kLargest, steps = kLargest / range;
  std::memcpy(scale_to, &scale, sizeof(scale));
  if (!std::isfinite(scale)) {
    std::memset(to, 1, d);
    return;
  }
  for (int64_t i = 0; i < d; i++) to[i] = static_cast<int8_t>(std::nearbyint(x[i] * steps));
}

}  // namespace tucka
