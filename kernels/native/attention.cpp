// ops.Attention: keys and values are read where they lie, in the cache's type, and summed up in fp32. A scale of an int8
// cache is one number of a key or value: it multiplies the key's scores, and the value's weights.
#include "int8.h"
#include "methods.h"
#include "panel.h"
#include "product.h"

namespace tucka {

// Keys of one step of the online softmax.
constexpr int64_t kKeys = 64;
// Keys, or values, that are asked for ahead at most, however short they are.
constexpr int64_t kMostAhead = 32;
// Values of one head that are added up before the next head's.
constexpr int64_t kValues = 8;
// Keys of one item of work of a decoding sequence. A split is the same whatever else is in the batch.
constexpr int64_t kSplit = 512;
// Rows of scores, of one KV head, of one item of work of a prompt, and the prompt's rows in an entry of `tiles`.
constexpr int64_t kScoreRows = 128, kTile = 128;

// Where the keys (or values) of some tokens lie, from their first head on.
template <class T>
struct Rows {
  const T* cache;
  const int64_t* offsets;
  const T* operator[](int64_t i) const { return cache + offsets[i]; }
};

// A sequence's context in the caches, of type C; `row` elements are a slot's, of which the first heads · D are numbers.
template <class C>
struct Context {
  const C *k, *v;
  const int32_t* blocks;
  int64_t block_size, row, heads, d;

  // Where the tokens first..first + count begin in either cache.
  void find(int64_t first, int64_t count, int64_t* offsets) const {
    int64_t block = first / block_size, within = first % block_size;
    for (int64_t i = 0; i < count; i++) {
      offsets[i] = (blocks[block] * block_size + within) * row;
      if (++within == block_size) {
        within = 0;
        block++;
      }
    }
  }
};

// The online softmax of some rows of scores: their largest score, the sum of exp(score - largest), and the values'
// sum with these weights.
struct Softmax {
  float *top, *mass, *sums;
  int64_t d;

  void clear(int64_t rows) {
    std::fill_n(top, rows, -kInfinity);
    std::fill_n(mass, rows, 0.f);
    std::fill_n(sums, rows * d, 0.f);
  }

  // Turns a row's `count` scores into weights, and what was summed up so far to the new largest score.
  void weigh(int64_t r, float* scores, int64_t count) {
    for (int64_t i = count; i % kStep; i++) scores[i] = -kInfinity;
    Vec best(-kInfinity);
    for (int64_t i = 0; i < count; i += kLanes) best = at::vec::maximum(best, Vec::loadu(scores + i));
    float lanes[kLanes];
    best.store(lanes);
    const float above = std::max(top[r], *std::max_element(lanes, lanes + kLanes));
    if (above == -kInfinity) {  // the row sees none of these keys, and saw none before
      std::fill_n(scores, count, 0.f);
      return;
    }
    const Vec shift(above);
    Vec total(0.f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec p = (Vec::loadu(scores + i) - shift).exp_u20();
      p.store(scores + i);
      total = total + p;
    }
    if (above != top[r]) {
      const float keep = std::exp(top[r] - above);
      mass[r] *= keep;
      const Vec scale(keep);
      steps(d, [&](int64_t i, int64_t some) {
        const Pair x = load_step(sums + r * d + i, some);
        store_step(sums + r * d + i, Pair{x.a * scale, x.b * scale}, some);
      });
      top[r] = above;
    }
    mass[r] += sum(total);
  }

  template <class T>
  void write(int64_t r, T* out) const {
    const Vec scale(1.f / mass[r]);
    steps(d, [&](int64_t i, int64_t some) {
      const Pair x = load_step(sums + r * d + i, some);
      store_step(out + i, Pair{x.a * scale, x.b * scale}, some);
    });
  }
};

// scores[g][0..4] = scale · q_g · key_n for G queries and four keys.
template <int G, class Q, class C>
inline void score(const Q* q, const C* const* keys, int64_t d, float scale, float* scores) {
  Vec sums[G][4];
  each<G>([&](auto g) { each<4>([&](auto n) { sums[g][n] = Vec(0.f); }); });
  steps(d, [&](int64_t at, int64_t some) {
    decltype(load_factor(q, some)) x[G];
    each<G>([&](auto g) { x[g] = load_factor(q + g * d + at, some); });
    each<4>([&](auto n) {
      const auto y = load_factor(keys[n] + at, some);
      each<G>([&](auto g) { sums[g][n] = add_products(sums[g][n], x[g], y); });
    });
  });
  each<G>([&](auto g) {
    sum4(sums[g], scores + g * kKeys);
    for (int n = 0; n < 4; n++) scores[g * kKeys + n] *= scale;
  });
}

// Asks for a head (D,) of a cache.
template <class C>
inline void ask(const C* head, int64_t d) {
  for (int64_t i = 0; i < d; i += kLine / sizeof(C)) prefetch(head + i);
}

// Multiplies the scores (m, kKeys) of `count` tokens with the scales of their keys, or the weights with those of their
// values, where the cache has any. Runs of `group` rows share a KV head, the first of them `head`.
template <class C>
inline void scale_scores(const Context<C>& context, const C* cache, const int64_t* offsets, int64_t head, int64_t group,
                         int64_t m, int64_t count, float* scores) {
  if constexpr (std::is_same_v<C, int8_t>) {
    float scales[kKeys];
    for (int64_t first = 0; first < m; first += group, head++) {
      for (int64_t n = 0; n < count; n++)
        std::memcpy(scales + n, cache + offsets[n] + context.heads * context.d + head * sizeof(float), sizeof(float));
      for (int64_t r = first; r < first + group; r++)
        for (int64_t n = 0; n < count; n++) scores[r * kKeys + n] *= scales[n];
    }
  }
}

// The queries (heads · group, D) of the KV heads from `head` on over the keys first..end of a context. Tokens come
// before heads, so that the caches are read in their own order, the one in which the hardware fetches lines ahead. What
// it does not see in time is asked for here, between the products, a few lines at a time.
template <class Q, class C>
void attend(const Context<C>& context, const Q* q, float scale, int64_t group, int64_t head, int64_t heads,
            int64_t first, int64_t end, Softmax softmax, float* scores) {
  const int64_t d = context.d, m = heads * group;
  const C *k = context.k + head * d, *v = context.v + head * d;
  const int64_t ahead = std::clamp<int64_t>(kAhead / (heads * d * sizeof(C)), 1, kMostAhead);
  int64_t offsets[kKeys + kMostAhead];
  softmax.clear(m);
  for (int64_t i = first; i < end; i += kKeys) {
    const int64_t count = std::min(kKeys, end - i), known = std::min(kKeys + ahead, end - i);
    context.find(i, known, offsets);
    // What is read `ahead` tokens behind token n of the keys, which the values follow, and behind one of the values.
    const auto after_key = [&](int64_t n) {
      return n + ahead < count ? k + offsets[n + ahead] : v + offsets[std::min(n + ahead, 2 * count - 1) - count];
    };
    const auto after_value = [&](int64_t n) {
      return n + ahead < count ? v + offsets[n + ahead] : k + offsets[std::min(n + ahead, known - 1)];
    };
    for (int64_t n = 0; n < count; n += 4) {
      const C* keys[4];
      for (int64_t j = 0; j < 4; j++) keys[j] = k + offsets[std::min(n + j, count - 1)];
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t j = 0; j < 4; j++) ask(after_key(std::min(n + j, count - 1)) + h * d, d);
        int64_t at = h * group;
        for (; at + 2 <= (h + 1) * group; at += 2) score<2>(q + at * d, keys, d, scale, scores + at * kKeys + n);
        if (at < (h + 1) * group) score<1>(q + at * d, keys, d, scale, scores + at * kKeys + n);
        for (const C*& key : keys) key += d;
      }
    }
    scale_scores(context, context.k, offsets, head, group, m, count, scores);
    for (int64_t r = 0; r < m; r++) softmax.weigh(r, scores + r * kKeys, count);
    scale_scores(context, context.v, offsets, head, group, m, count, scores);
    for (int64_t n = 0; n < count; n += kValues)
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t j = 0; j < kValues; j++) ask(after_value(std::min(n + j, count - 1)) + h * d, d);
        add_product(softmax.sums + h * group * d, d, scores + h * group * kKeys + n, kKeys,
                    Rows<C>{v + h * d, offsets + n}, group, std::min(kValues, count - n), d);
      }
  }
}

struct Split {
  int64_t sequence, first, end, part;  // part: where its result waits for the others'; -1: it is the only one
};

struct Decoding {
  std::vector<Split> splits;
  std::vector<std::array<int64_t, 3>> merges;  // sequence, first part, parts
  int64_t parts = 0;
};

inline Decoding plan(const int32_t* singles, int64_t count, const int32_t* lengths, int64_t window) {
  Decoding out;
  for (int64_t i = 0; i < count; i++) {
    const int64_t s = singles[i], length = lengths[s], first = std::max<int64_t>(0, length - window);
    const int64_t own = (length - first + kSplit - 1) / kSplit;
    for (int64_t n = 0; n < own; n++) {
      const int64_t begin = first + n * kSplit;
      out.splits.push_back({s, begin, std::min(begin + kSplit, length), own > 1 ? out.parts + n : -1});
    }
    if (own > 1) {
      out.merges.push_back({s, out.parts, own});
      out.parts += own;
    }
  }
  return out;
}

// What attention reads of a batch (tables/blocks.py).
struct Metadata {
  const int32_t *query_start, *lengths, *block_table, *first_block, *singles, *tiles;
  int64_t num_singles, num_tiles, block_size;
};

// T: the type of queries and outputs, C: that of the caches.
template <class T, class C>
struct Attend {
  const T* q;
  const C *k, *v;
  T* out;
  Metadata meta;
  int64_t heads, kv_heads, d, row, window;
  float scale;

  int64_t group() const { return heads / kv_heads; }

  Context<C> context(int64_t sequence) const {
    return {k, v, meta.block_table + meta.first_block[sequence], meta.block_size, row, kv_heads, d};
  }

  // `count` queries of a row, scaled, in fp32.
  void queries(int64_t row, int64_t first_head, int64_t count, float* to) const {
    to_float(q + (row * heads + first_head) * d, to, count * d);
    for (int64_t i = 0; i < count * d; i++) to[i] *= scale;
  }

  void decode() const {
    const Decoding work = plan(meta.singles, meta.num_singles, meta.lengths, window);
    const int64_t g = group(), stride = d + 2;
    std::vector<float> parts(work.parts * heads * stride);
    // All heads of a split read whole lines of the cache one after the other; they are parted only for want of items.
    const int64_t wanted = 4 * at::get_num_threads(), some = std::max<int64_t>(1, work.splits.size());
    const int64_t cuts = std::clamp<int64_t>(wanted / some, 1, kv_heads), span = (kv_heads + cuts - 1) / cuts;
    deal(work.splits.size() * cuts, kSplit * span * g * d, [&](int64_t item) {
      const Split& split = work.splits[item / cuts];
      const int64_t row = meta.query_start[split.sequence], begin = item % cuts * span;
      const int64_t own = std::min(span, kv_heads - begin), m = own * g;
      if (own <= 0) return;
      float* room = scratch(m * (2 * d + 2 + kKeys));
      const Softmax softmax{room + 2 * m * d, room + 2 * m * d + m, room + m * d, d};
      const T* asked = q + (row * heads + begin * g) * d;
      const auto over = [&](const auto* queried) {
        attend(context(split.sequence), queried, scale, g, begin, own, split.first, split.end, softmax,
               room + m * (2 * d + 2));
      };
      if constexpr (kInputs<T> > 1 && std::is_same_v<T, C>) {
        over(asked);
      } else {
        to_float(asked, room, m * d);
        over(static_cast<const float*>(room));
      }
      for (int64_t r = 0; r < m; r++) {
        const int64_t head = begin * g + r;
        if (split.part < 0) {
          softmax.write(r, out + (row * heads + head) * d);
          continue;
        }
        float* part = parts.data() + (split.part * heads + head) * stride;
        part[0] = softmax.top[r];
        part[1] = softmax.mass[r];
        std::memcpy(part + 2, softmax.sums + r * d, d * sizeof(float));
      }
    });
    deal(work.merges.size() * heads, 4 * d, [&](int64_t item) {
      const auto [sequence, first, count] = work.merges[item / heads];
      merge(parts.data() + (first * heads + item % heads) * stride, heads * stride, count,
            out + (meta.query_start[sequence] * heads + item % heads) * d);
    });
  }

  // The parts of one head, in order, into its row.
  void merge(const float* parts, int64_t stride, int64_t count, T* to) const {
    float top = -kInfinity, mass = 0;
    for (int64_t n = 0; n < count; n++) top = std::max(top, parts[n * stride]);
    float* sums = scratch(d);
    std::fill_n(sums, d, 0.f);
    for (int64_t n = 0; n < count; n++) {
      const float weight = std::exp(parts[n * stride] - top);
      mass += weight * parts[n * stride + 1];
      for (int64_t i = 0; i < d; i++) sums[i] += weight * parts[n * stride + 2 + i];
    }
    for (int64_t i = 0; i < d; i++) sums[i] /= mass;
    from_float(sums, to, d);
  }

  void prefill() const {
    const int64_t g = group(), rows = std::max<int64_t>(1, kScoreRows / g), cuts = (kTile + rows - 1) / rows;
    // The last rows of a prompt see the most keys: they come first, so that no thread ends long after the others.
    deal(meta.num_tiles * cuts * kv_heads, kKeys * rows * g * d, [&](int64_t item) {
      const int64_t at = meta.num_tiles * cuts - 1 - item / kv_heads, head = item % kv_heads;
      const int64_t sequence = meta.tiles[at / cuts * 2], first = meta.tiles[at / cuts * 2 + 1] + at % cuts * rows;
      const int64_t end = std::min<int64_t>(first + rows, meta.tiles[at / cuts * 2 + 1] + kTile);
      const int64_t count = meta.query_start[sequence + 1] - meta.query_start[sequence];
      if (first < count && meta.lengths[sequence] > 0)
        prompt(sequence, first, std::min(end, count) - first, count, head);
    });
  }

  // The first of the keys that a query at a position and those behind it see, and of kKeys that are taken at once: keys are
  // parted alike however a prompt is cut.
  int64_t first_keys(int64_t position) const { return std::max<int64_t>(0, position - window + 1) / kKeys * kKeys; }

  // Sets the scores (kKeys,) of a query at a position to -infinity where it does not see the key, of `some` from `key` on.
  void hide(float* scores, int64_t at, int64_t key, int64_t some) const {
    for (int64_t n = std::max<int64_t>(0, at + 1 - key); n < some; n++) scores[n] = -kInfinity;
    for (int64_t n = 0; n < std::min(some, at - window + 1 - key); n++) scores[n] = -kInfinity;
  }

  // Rows first.. of a prompt's `count`, one KV head.
  void prompt(int64_t sequence, int64_t first, int64_t rows, int64_t count, int64_t head) const {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<C, BFloat16>)
      if (d % kPanel == 0) return prompt_in_bf16(sequence, first, rows, count, head);
#endif
    const int64_t g = group(), m = rows * g, row = meta.query_start[sequence] + first;
    const int64_t position = meta.lengths[sequence] - count + first;  // of the first row
    const Context<C> own = context(sequence);
    float* room = scratch(m * (2 * d + 2 + kKeys) + 2 * kKeys * d);
    float *queried = room, *sums = queried + m * d, *top = sums + m * d, *mass = top + m, *scores = mass + m;
    float *turned = scores + m * kKeys, *lines = turned + kKeys * d;
    for (int64_t r = 0; r < rows; r++) queries(row + r, head * g, g, queried + r * g * d);
    Softmax softmax{top, mass, sums, d};
    softmax.clear(m);
    int64_t offsets[kKeys];
    const Rows<C> keys{own.k + head * d, offsets}, values{own.v + head * d, offsets};
    const int64_t last = position + rows;
    for (int64_t i = first_keys(position); i < last; i += kKeys) {
      const int64_t some = std::min(kKeys, last - i);
      own.find(i, some, offsets);
      for (int64_t n = 0; n < some; n++) to_float(keys[n], lines + n * d, d);
      at::vec::transpose_mxn<float>(lines, d, turned, kKeys, some, d);
      std::fill_n(scores, m * kKeys, 0.f);
      add_product(scores, kKeys, queried, d, Strided<float>{turned, kKeys}, m, d, some);
      scale_scores(own, own.k, offsets, head, m, m, some, scores);
      for (int64_t r = 0; r < m; r++) {
        hide(scores + r * kKeys, position + r / g, i, some);
        softmax.weigh(r, scores + r * kKeys, some);
      }
      scale_scores(own, own.v, offsets, head, m, m, some, scores);
      add_product(sums, d, scores, kKeys, values, m, some, d);
    }
    for (int64_t r = 0; r < m; r++) softmax.write(r, out + ((row + r / g) * heads + head * g + r % g) * d);
  }

#if defined(__AVX512BF16__)
  // The same by the CPU's products in bf16, of two numbers at once: 32-bit words, which the arrays of float here are made
  // of. Keys and values become panels; the weights are rounded to bf16.
  void prompt_in_bf16(int64_t sequence, int64_t first, int64_t rows, int64_t count, int64_t head) const {
    constexpr int64_t kPairs = kKeys / 2;
    static constexpr auto of_queries = tiles_of<BFloat16, 0>(std::make_integer_sequence<int, kTileRows>());
    static constexpr auto of_weights = tiles_of<BFloat16, kPairs>(std::make_integer_sequence<int, kTileRows>());
    const int64_t g = group(), m = rows * g, row = meta.query_start[sequence] + first, words = d / 2;
    const int64_t position = meta.lengths[sequence] - count + first;  // of the first row
    const Context<C> own = context(sequence);
    const Tiles tiles(m);
    float* room = scratch(m * (words + d + 2 + kKeys + kPairs) + 3 * kKeys * words);
    float *queried = room, *sums = queried + m * words, *top = sums + m * d, *mass = top + m, *scores = mass + m;
    float *weights = scores + m * kKeys, *keys = weights + m * kPairs, *values = keys + kKeys * words,
          *lines = values + kKeys * words;
    for (int64_t tile = 0; tile < tiles.count; tile++)
      for (int64_t r = tiles.first(tile), size = tiles.size(tile); r < tiles.first(tile) + size; r++) {
        const T* from = q + ((row + r / g) * heads + head * g + r % g) * d;
        float* to = queried + tiles.first(tile) * words + r - tiles.first(tile);
        for (int64_t c = 0; c < words; c++) std::memcpy(to + c * size, from + 2 * c, sizeof(float));
      }
    Softmax softmax{top, mass, sums, d};
    softmax.clear(m);
    int64_t offsets[2 * kKeys];
    const Vec factor(scale);
    for (int64_t last = position + rows, i = first_keys(position); i < last; i += kKeys) {
      const int64_t some = std::min(kKeys, last - i), pairs = (some + 1) / 2, known = std::min(2 * kKeys, last - i);
      own.find(i, known, offsets);
      turn_keys(own.k + head * d, own.v + head * d, offsets, some, lines, keys);
      pair_values(own.v + head * d, own.k + head * d, offsets, some, known, values);
      const auto *k_panels = reinterpret_cast<const T*>(keys), *v_panels = reinterpret_cast<const T*>(values);
      for (int64_t tile = 0; tile < tiles.count; tile++) {
        const int64_t begin = tiles.first(tile), size = tiles.size(tile);
        for (int64_t n = 0; n < some; n += kPanel)
          of_queries[size - 1](queried + begin * words, k_panels + n * d, words, true, scores + begin * kKeys + n, kKeys);
        for (int64_t r = begin; r < begin + size; r++) {
          float* score = scores + r * kKeys;
          for (int64_t n = 0; n < some; n += kLanes) (Vec::loadu(score + n) * factor).store(score + n);
          hide(score, position + r / g, i, some);
          softmax.weigh(r, score, some);
          if (some % 2) score[some] = 0;  // the value beside the last
          from_float(score, reinterpret_cast<T*>(weights + r * kPairs), 2 * pairs);
        }
        for (int64_t c = 0; c < d; c += kPanel)
          of_weights[size - 1](weights + begin * kPairs, v_panels + c * kKeys, pairs, false, sums + begin * d + c, d);
      }
    }
    for (int64_t r = 0; r < m; r++) softmax.write(r, out + ((row + r / g) * heads + head * g + r % g) * d);
  }

  // Keys as panels, (kKeys / kPanel, D / 2, kPanel) words; nothing behind the last. Meanwhile their values are asked for.
  void turn_keys(const T* k, const T* v, const int64_t* offsets, int64_t some, float* lines, float* to) const {
    const int64_t words = d / 2;
    for (int64_t n = 0; n < some; n++) {
      ask(v + offsets[n], d);
      std::memcpy(lines + n * words, k + offsets[n], d * sizeof(T));
    }
    for (int64_t n = 0; n < some; n += kPanel)
      at::vec::transpose_mxn<float>(lines + n * words, words, to + n * words, kPanel, std::min(kPanel, some - n), words);
  }

  // Values as panels, (D / kPanel, kKeys / 2, kPanel) words, each of two keys side by side. Meanwhile the next keys are
  // asked for, of which `known` - kKeys are there.
  void pair_values(const T* v, const T* k, const int64_t* offsets, int64_t some, int64_t known, float* to) const {
    const auto load = [](const T* from) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    for (int64_t n = 0; n < some; n += 2) {
      for (int64_t i = kKeys + n; i < std::min(kKeys + n + 2, known); i++) ask(k + offsets[i], d);
      for (int64_t c = 0; c < d; c += kLanes) {
        const __m512i even = load(v + offsets[n] + c);
        const __m512i odd = n + 1 < some ? load(v + offsets[n + 1] + c) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + (c / kPanel * kKeys / 2 + n / 2) * kPanel + c % kPanel,
                            _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
#endif
};

Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                 const Tensor& lengths, const Tensor& block_table, const Tensor& first_block, const Tensor& singles,
                 const Tensor& tiles, int64_t block_size, double scale, int64_t window) {
  const bool quantized = check_caches(k_cache, v_cache, q);
  TORCH_CHECK_VALUE(q.is_contiguous(), "queries must be contiguous");
  Tensor out = at::empty_like(q);
  const Metadata meta{query_start.const_data_ptr<int32_t>(), lengths.const_data_ptr<int32_t>(),
                      block_table.const_data_ptr<int32_t>(), first_block.const_data_ptr<int32_t>(),
                      singles.const_data_ptr<int32_t>(),     tiles.const_data_ptr<int32_t>(),
                      singles.size(0),                       tiles.size(0),
                      block_size};
  by_type(q, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto cell) {
      using C = decltype(cell);
      const Attend<T, C> attend{q.const_data_ptr<T>(),
                                k_cache.const_data_ptr<C>(),
                                v_cache.const_data_ptr<C>(),
                                out.data_ptr<T>(),
                                meta,
                                q.size(1),
                                k_cache.size(1),
                                q.size(2),
                                k_cache.stride(0),
                                window,
                                static_cast<float>(scale)};
      if (meta.num_singles) attend.decode();
      if (meta.num_tiles) attend.prefill();
    };
    if (quantized)
      run(int8_t{});
    else
      run(T{});
  });
  return out;
}

const Methods kAttentionMethods{{"attention", call<&attention>}};

}  // namespace tucka
