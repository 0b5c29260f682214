// ops.Core.
#include "methods.h"
#include "routes.h"

namespace tucka {

void core(const Tensor& records, const Tensor& groups, const Tensor& weights, int64_t modules, const Tensor& out) {
  TORCH_CHECK_VALUE(out.stride(3) == 1, "the rows of a core must be contiguous");
  const int64_t* group = groups.const_data_ptr<int64_t>();
  const float* weight = weights.const_data_ptr<float>();
  by_type(out, [&](auto type) {
    using T = decltype(type);
    T* to = out.data_ptr<T>();
    const int64_t items = records.size(0) * modules;
    // The slices (p, r, r) of an item's group; null where its adapter has fewer linears.
    const auto slices = [&](int64_t item) -> const float* {
      const int64_t s = item / modules, m = item % modules;
      const Record own(records, s);
      if (m >= own[MODULES]) return nullptr;
      return own.at<float>(G) + (m * own[GROUPS] + group[s]) * own[SLICES] * own[RANK] * own[RANK];
    };
    // Most adapters have two slices: a core takes about as many multiply-adds for each.
    deal(items, 2 * out.size(2) * out.size(2), [&](int64_t item) {
      const int64_t s = item / modules, m = item % modules;
      const Record own(records, s);
      const float* g = slices(item);
      if (g == nullptr) return;
      const int64_t t = own[EXPERTS], p = own[SLICES], r = own[RANK];
      if (const float* next = slices(std::min(item + at::get_num_threads(), items - 1)))
        for (int64_t i = 0; i < p * r * r; i += kLine / sizeof(float)) prefetch(next + i);
      const float* c = own.at<float>(C) + m * t * p;
      float* made = scratch(r * r + p);
      float* w = made + r * r;
      std::fill_n(made, r * r + p, 0.f);
      add_product(w, p, weight + s * weights.stride(0), t, Strided<float>{c, p}, 1, t, p);
      add_product(made, r * r, w, p, Strided<float>{g, r * r}, 1, p, r * r);
      T* core = to + own[CORE] * out.stride(0) + own.at<int64_t>(LINEARS)[m] * out.stride(1);
      if (out.stride(2) == r) return from_float(made, core, r * r);
      for (int64_t i = 0; i < r; i++) from_float(made + i * r, core + i * out.stride(2), r);
    });
  });
}

const Methods kCoreMethods{{"core", call<&core>}};

}  // namespace tucka
