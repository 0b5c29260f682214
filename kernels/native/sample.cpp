// ops.Sample, FilterLogits, FiniteRows.
#include "methods.h"

namespace tucka {

// Logits of one item of work.
constexpr int64_t kSpan = 8192;
// Random numbers that are made at once.
constexpr int64_t kNoise = 512;

// The reference's 32-bit hash; products wrap by themselves.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

inline uint32_t row_hash(int64_t seed, int64_t position) {
  return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) ^ mix(static_cast<uint32_t>(position))));
}

// (0, 1) of the columns first.. of a row.
inline void random(uint32_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = mix(row ^ mix(static_cast<uint32_t>(first + i))) >> 9;
    out[i] = (static_cast<float>(static_cast<int32_t>(bits)) + 0.5f) * (1.f / 8388608.f);
  }
}

Tensor uniform(const Tensor& seed, const Tensor& position, int64_t columns) {
  Tensor out = at::empty({seed.size(0), columns}, seed.options().dtype(at::kFloat));
  for (int64_t b = 0; b < seed.size(0); b++)
    random(row_hash(seed.const_data_ptr<int64_t>()[b], position.const_data_ptr<int64_t>()[b]), 0, columns,
           out.data_ptr<float>() + b * columns);
  return out;
}

struct Best {
  float value;
  int64_t at;
};

// The largest of x, a NaN being larger than all.
inline float largest(const float* x, int64_t count) {
  Vec top(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = at::vec::maximum(top, Vec::loadu(x + i));
  float lanes[kLanes];
  top.store(lanes);
  float best = -kInfinity;
  auto take = [&](float value) { best = std::isnan(best) || best >= value ? best : value; };
  for (float lane : lanes) take(lane);
  for (; i < count; i++) take(x[i]);
  return best;
}

// The first of the largest of x: it is looked for in the part alone that has it.
inline Best first_of_largest(const float* x, int64_t count) {
  Best best{-kInfinity, 0};
  for (int64_t first = 0; first < count; first += kNoise) {
    const float here = largest(x + first, std::min(kNoise, count - first));
    if (here > best.value || (std::isnan(here) && !std::isnan(best.value))) best = {here, first};
  }
  while (x[best.at] != best.value && !std::isnan(x[best.at])) best.at++;
  return best;
}

// A number that is finite times zero is zero, and every other a NaN.
Tensor finite_rows(const Tensor& logits) {
  const Tensor in = logits.contiguous();
  const int64_t vocab = in.size(1);
  Tensor out = at::empty({in.size(0)}, in.options().dtype(at::kBool));
  deal(in.size(0), vocab, [&](int64_t b) {
    const float* x = in.const_data_ptr<float>() + b * vocab;
    const Vec zero(0.f);
    Vec left[4] = {zero, zero, zero, zero};
    int64_t i = 0;
    for (; i + 4 * kLanes <= vocab; i += 4 * kLanes)
      for (int64_t n = 0; n < 4; n++) left[n] = at::vec::fmadd(Vec::loadu(x + i + n * kLanes), zero, left[n]);
    float rest = sum((left[0] + left[1]) + (left[2] + left[3]));
    for (; i < vocab; i++) rest += x[i] * 0;
    out.data_ptr<bool>()[b] = rest == 0;
  });
  return out;
}

Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& seed, const Tensor& position) {
  const Tensor in = logits.contiguous();
  const int64_t rows = in.size(0), vocab = in.size(1), spans = (vocab + kSpan - 1) / kSpan;
  Tensor out = at::empty({rows}, seed.options());
  std::vector<Best> found(rows * spans);
  const float *x = in.const_data_ptr<float>(), *heat = temperature.const_data_ptr<float>();
  deal(rows * spans, kSpan, [&](int64_t item) {
    const int64_t b = item / spans, first = item % spans * kSpan, end = std::min(first + kSpan, vocab);
    if (!(heat[b] > 0)) {
      found[item] = first_of_largest(x + b * vocab + first, end - first);
      found[item].at += first;
      return;
    }
    const uint32_t row = row_hash(seed.const_data_ptr<int64_t>()[b], position.const_data_ptr<int64_t>()[b]);
    float noise[kNoise];
    Best best{-kInfinity, first};
    for (int64_t i = first; i < end; i += kNoise) {
      const int64_t count = std::min(kNoise, end - i);
      random(row, i, count, noise);
      steps(count, [&](int64_t j, int64_t some) {
        const Pair u = load_step(noise + j, some), z = load_step(x + b * vocab + i + j, some);
        const Vec hot(heat[b]);
        store_step(noise + j, Pair{z.a / hot - u.a.log().neg().log(), z.b / hot - u.b.log().neg().log()}, some);
      });
      const Best here = first_of_largest(noise, count);
      if (here.value > best.value || (std::isnan(here.value) && !std::isnan(best.value))) best = {here.value, i + here.at};
    }
    found[item] = best;
  });
  for (int64_t b = 0; b < rows; b++) {
    Best best = found[b * spans];
    for (int64_t n = 1; n < spans; n++) {
      const Best& here = found[b * spans + n];
      if (here.value > best.value || (std::isnan(here.value) && !std::isnan(best.value))) best = here;
    }
    out.data_ptr<int64_t>()[b] = best.at;
  }
  return out;
}

// In the order of the fp32: the bits, and for negative numbers their complement below zero. -0 equals 0.
inline int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? -(bits & 0x7FFFFFFF) : bits;
}

// The least key from `low` on that `enough` holds for; it holds for `high`, and for all keys from some key on.
template <class F>
inline int32_t bisect(int64_t low, int64_t high, const F& enough) {
  while (low < high) {
    const int64_t middle = low + ((high - low) >> 1);
    if (enough(static_cast<int32_t>(middle)))
      high = middle;
    else
      low = middle + 1;
  }
  return static_cast<int32_t>(low);
}

// Equal logits stay or go together. What top-k, top-p and min-p keep is all from some value on, found by bisection.
void filter_row(const float* x, int64_t vocab, int64_t top_k, float top_p, float min_p, float* out) {
  std::vector<int32_t> keys(vocab);
  const float top = first_of_largest(x, vocab).value;
  const Vec shift(top);
  for (int64_t i = 0; i < vocab; i++) keys[i] = key_of(x[i]);
  const int32_t ceiling = key_of(top);
  int32_t floor = key_of(-kInfinity);
  if (top_k < vocab) {
    floor = bisect(floor, ceiling, [&](int32_t key) {
      int32_t above = 0;
      for (int64_t i = 0; i < vocab; i++) above += keys[i] > key;
      return above < top_k;
    });
  }
  if (top_p < 1) {
    // Of what top-k left, for the bisection reads it some thirty times.
    std::vector<int32_t> left;
    std::vector<float> p;
    for (int64_t i = 0; i < vocab; i++) {
      if (keys[i] < floor) continue;
      left.push_back(keys[i]);
      p.push_back(x[i]);
    }
    const int64_t count = p.size();
    steps(count, [&](int64_t i, int64_t some) {
      const Pair v = load_step(p.data() + i, some);
      store_step(p.data() + i, Pair{(v.a - shift).exp(), (v.b - shift).exp()}, some);
    });
    auto mass = [&](int64_t key) {
      double total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < count; i++) total += left[i] > key ? p[i] : 0.f;
      return total;
    };
    const double wanted = top_p * mass(static_cast<int64_t>(floor) - 1);
    floor = bisect(floor, ceiling, [&](int32_t key) { return mass(key) < wanted; });
  }
  const float least = min_p > 0 ? top + std::log(min_p) : -kInfinity;
  for (int64_t i = 0; i < vocab; i++)
    out[i] = (keys[i] >= floor && x[i] >= least) || x[i] == top ? x[i] : -kInfinity;
}

Tensor filter_logits(const Tensor& logits, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p) {
  const Tensor in = logits.contiguous();
  Tensor out = at::empty_like(in);
  const int64_t vocab = in.size(1);
  deal(in.size(0), kAlone, [&](int64_t b) {
    filter_row(in.const_data_ptr<float>() + b * vocab, vocab, top_k.const_data_ptr<int64_t>()[b],
               top_p.const_data_ptr<float>()[b], min_p.const_data_ptr<float>()[b], out.data_ptr<float>() + b * vocab);
  });
  return out;
}

const Methods kSampleMethods{
    {"uniform", call<&uniform>},
    {"finite_rows", call<&finite_rows>},
    {"sample", call<&sample>},
    {"filter_logits", call<&filter_logits>}};

}  // namespace tucka
