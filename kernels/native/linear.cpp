// ops.Linear: y = x Wᵀ + b of a weight that lies in panels.
#include "arena.h"
#include "methods.h"
#include "panel.h"

namespace tucka {

// Inputs that are summed up before the next ones': so much of a panel, in fp32, stays in the L1 cache.
constexpr int64_t kDepth = 256;
// Tiles, and panels, of one item of work of a long batch: its inputs and its sums stay in the L2 cache.
constexpr int64_t kBlockTiles = 96 / kTileRows, kBlockPanels = 128 / kPanel;

// Rows of y in Y: T, or fp32 that was rounded to T.
template <class T, class Y>
struct Product {
  const T *x, *w, *bias;
  Y* y;
  int64_t x_stride, d_in, d_out;
  Tiles tiles;
  // What is multiplied of an input of the panel: one number, or so many side by side.
  int64_t steps_in = (d_in + kInputs<T> - 1) / kInputs<T>;

  // The inputs of a tile, (steps_in, rows of it): in fp32, or so many of bf16 in each place.
  void turn(int64_t tile, float* to) const {
    const int64_t first = tiles.first(tile), size = tiles.size(tile);
    float* row = scratch(steps_in);
    for (int64_t r = 0; r < size; r++) {
      const T* from = x + (first + r) * x_stride;
      if constexpr (kInputs<T> == 1) {
        to_float(from, row, d_in);
      } else {
        row[steps_in - 1] = 0;
        std::memcpy(row, from, d_in * sizeof(T));
      }
      for (int64_t k = 0; k < steps_in; k++) to[k * size + r] = row[k];
    }
  }

  // The panels first..end of the tiles begin..stop; `turned` has all tiles, one after the other.
  void block(const float* turned, int64_t begin, int64_t stop, int64_t first, int64_t end) const {
    static constexpr auto add = tiles_of<T, 0>(std::make_integer_sequence<int, kTileRows>());
    const int64_t top = tiles.first(begin), rows = tiles.first(stop) - top, width = (end - first) * kPanel;
    float* sums = scratch(rows * width);
    constexpr int64_t deep = kDepth / kInputs<T>;
    for (int64_t k = 0; k < steps_in; k += deep) {
      const int64_t depth = std::min(deep, steps_in - k);
      for (int64_t panel = first; panel < end; panel++)
        for (int64_t tile = begin; tile < stop; tile++) {
          const int64_t size = tiles.size(tile), row = tiles.first(tile);
          add[size - 1](turned + row * steps_in + k * size, w + (panel * steps_in + k) * kPanel * kInputs<T>, depth,
                        k == 0, sums + (row - top) * width + (panel - first) * kPanel, width);
        }
    }
    const int64_t column = first * kPanel, count = std::min(width, d_out - column);
    for (int64_t r = 0; r < rows; r++) {
      float* row = sums + r * width;
      Y* to = y + (top + r) * d_out + column;
      if (bias != nullptr)
        steps(count, [&](int64_t i, int64_t some) {
          const Pair a = load_step(row + i, some), b = load_step(bias + column + i, some);
          store_step(row + i, Pair{a.a + b.a, a.b + b.b}, some);
        });
      if constexpr (std::is_same_v<T, Y>) {
        from_float(row, to, count);
      } else {
        T narrow[kBlockPanels * kPanel];
        from_float(row, narrow, count);
        to_float(narrow, to, count);
      }
    }
  }

  void run(int64_t panels) const {
    const auto turned = std::make_unique_for_overwrite<float[]>(tiles.rows * steps_in);
    deal(tiles.count, kTileRows * d_in, [&](int64_t i) { turn(i, turned.get() + tiles.first(i) * steps_in); });
    const int64_t blocks = (tiles.count + kBlockTiles - 1) / kBlockTiles, wide = blocks > 1 ? kBlockPanels : 1;
    const int64_t parts = (panels + wide - 1) / wide;
    deal(blocks * parts, kTileRows * d_in * kPanel * wide, [&](int64_t item) {
      const int64_t part = item / blocks, at = item % blocks;
      block(turned.get(), at * kBlockTiles, std::min((at + 1) * kBlockTiles, tiles.count), part * wide,
            std::min((part + 1) * wide, panels));
    });
  }
};

// The panels (N, ceil(in / kInputs), kPanel · kInputs) of a weight (out, in), zeros behind the last row and input.
Tensor pack(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "a weight has two dimensions");
  const Tensor w = weight.contiguous();
  const int64_t d_out = w.size(0), d_in = w.size(1), count = (d_out + kPanel - 1) / kPanel;
  return by_type(w, [&](auto type) {
    using T = decltype(type);
    Tensor panels = Arena::own().zeros({count, (d_in + kInputs<T> - 1) / kInputs<T>, kPanel * kInputs<T>}, w.options());
    const T* from = w.const_data_ptr<T>();
    T* to = panels.data_ptr<T>();
    const int64_t size = panels.size(1) * panels.size(2);
    deal(count, size, [&](int64_t panel) {
      for (int64_t c = 0; c < std::min(kPanel, d_out - panel * kPanel); c++)
        for (int64_t k = 0; k < d_in; k++) to[panel * size + place<T>(k, c)] = from[(panel * kPanel + c) * d_in + k];
    });
    return panels;
  });
}

// The weight (d_out, d_in) that lies in panels.
Tensor unpack(const Tensor& panels, int64_t d_out, int64_t d_in) {
  Tensor weight = at::empty({d_out, d_in}, panels.options());
  by_type(panels, [&](auto type) {
    using T = decltype(type);
    const T* from = panels.const_data_ptr<T>();
    T* to = weight.data_ptr<T>();
    const int64_t size = panels.size(1) * panels.size(2);
    deal(d_out, d_in, [&](int64_t row) {
      for (int64_t k = 0; k < d_in; k++) to[row * d_in + k] = from[row / kPanel * size + place<T>(k, row % kPanel)];
    });
  });
  return weight;
}

template <bool wide>
Tensor linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t d_out) {
  check_type(panels, x);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.stride(1) == 1 && panels.is_contiguous(), "the rows of x must be contiguous");
  Tensor y = at::empty({x.size(0), d_out}, wide ? x.options().dtype(at::kFloat) : x.options());
  if (bias) check_type(*bias, x);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    using Y = std::conditional_t<wide, float, T>;
    TORCH_CHECK_VALUE(panels.size(2) == kPanel * kInputs<T> &&
                          panels.size(1) == (x.size(1) + kInputs<T> - 1) / kInputs<T>,
                      "x must have rows as long as the panels of this library's layout");
    const Product<T, Y> product{x.const_data_ptr<T>(), panels.const_data_ptr<T>(),
                                bias ? bias->const_data_ptr<T>() : nullptr,
                                y.data_ptr<Y>(), x.stride(0), x.size(1), d_out, Tiles(x.size(0))};
    if (x.size(0)) product.run(panels.size(0));
  });
  return y;
}

const Methods kLinearMethods{{"linear", call<&linear<false>>},
                             {"linear_wide", call<&linear<true>>},
                             {"pack", call<&pack>},
                             {"unpack", call<&unpack>}};

}  // namespace tucka
