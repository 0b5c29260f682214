// ops.Norm.
#include "methods.h"
#include "norm.h"

namespace tucka {

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  check_norm(weight, bias, x);
  const Tensor in = x.contiguous();
  Tensor out = at::empty_like(in);
  const int64_t d = x.size(-1), rows = d == 0 ? 0 : x.numel() / d;
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T* w = weight.const_data_ptr<T>();
    const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
    const T* from = in.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    deal(rows, d, [&](int64_t r) { norm_row(from + r * d, w, b, to + r * d, d, static_cast<float>(eps)); });
  });
  return out;
}

const Methods kNormMethods{{"norm", call<&norm>}};

}  // namespace tucka
