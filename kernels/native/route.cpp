// ops.Select, RouteIds, RouteHidden.
#include "methods.h"
#include "routes.h"

namespace tucka {

// The group that logits (k·t,) choose, its t scores in `weights`.
int64_t choose(const float* logits, int64_t k, int64_t t, float* weights) {
  int64_t group = 0;
  float best = -1;
  std::vector<float> scores(t);
  for (int64_t i = 0; i < k; i++) {
    const float* z = logits + i * t;
    // In fp64 no square of an fp32 number is too large or too small.
    double squares = 0;
    for (int64_t j = 0; j < t; j++) squares += static_cast<double>(z[j]) * z[j];
    const float length = static_cast<float>(std::sqrt(squares));
    float top = 0;
    for (int64_t j = 0; j < t; j++) {
      scores[j] = 1.f / (1.f + std::exp(-z[j] / std::max(length, std::numeric_limits<float>::min())));
      top = std::max(top, scores[j]);
    }
    if (top > best) {
      best = top;
      group = i;
      std::copy(scores.begin(), scores.end(), weights);
    }
  }
  return group;
}

// A sum's mean over `count`.
inline std::vector<float> over(const std::vector<double>& total, int64_t count) {
  std::vector<float> mean(total.size());
  for (size_t j = 0; j < mean.size(); j++) mean[j] = static_cast<float>(total[j] / static_cast<double>(count));
  return mean;
}

std::tuple<Tensor, Tensor> select(const Tensor& logits, int64_t t) {
  const Tensor in = logits.contiguous();
  const int64_t segments = in.size(0), k = in.size(1) / t;
  Tensor groups = at::empty({segments}, in.options().dtype(at::kLong)), weights = at::empty({segments, t}, in.options());
  for (int64_t s = 0; s < segments; s++)
    groups.data_ptr<int64_t>()[s] =
        choose(in.const_data_ptr<float>() + s * k * t, k, t, weights.data_ptr<float>() + s * t);
  return {groups, weights};
}

void route_ids(const Tensor& records, const Tensor& groups, const Tensor& weights) {
  int64_t* group = groups.data_ptr<int64_t>();
  float* weight = weights.data_ptr<float>();
  deal(records.size(0), kAlone, [&](int64_t s) {
    const Record own(records, s);
    const int64_t count = own[COUNT], width = own[GROUPS] * own[EXPERTS];
    if (count == 0) return;
    const int64_t* ids = own.at<int64_t>(IDS);
    // In fp64, for the sums of 100,000 tokens' logits would miss 1e-5 in fp32.
    std::vector<double> total(width, 0);
    for (int64_t i = 0; i < count; i++) {
      const float* row = own.at<float>(TABLE) + ids[i] * width;
      for (int64_t j = 0; j < width; j++) total[j] += row[j];
    }
    const std::vector<float> mean = over(total, count);
    group[s] = choose(mean.data(), own[GROUPS], own[EXPERTS], weight + s * weights.stride(0));
  });
}

std::tuple<Tensor, Tensor> route_hidden(const Tensor& x, const Tensor& centroids, int64_t t) {
  TORCH_CHECK_VALUE(x.stride(1) == 1 && centroids.is_contiguous(), "rows must be contiguous");
  const int64_t count = x.size(0), d = x.size(1), kt = centroids.size(0);
  std::vector<double> total(d, 0);
  std::vector<float> row(d), logits(kt);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < count; i++) {
      to_float(x.const_data_ptr<T>() + i * x.stride(0), row.data(), d);
      for (int64_t j = 0; j < d; j++) total[j] += row[j];
    }
  });
  const std::vector<float> mean = over(total, count);
  for (int64_t i = 0; i < kt; i++) {
    Vec total(0.f);
    const float* c = centroids.const_data_ptr<float>() + i * d;
    steps(d, [&](int64_t j, int64_t some) {
      const Pair a = load_step(mean.data() + j, some), b = load_step(c + j, some);
      total = at::vec::fmadd(a.b, b.b, at::vec::fmadd(a.a, b.a, total));
    });
    logits[i] = sum(total);
  }
  Tensor group = at::empty({1}, x.options().dtype(at::kLong)), weights = at::empty({1, t}, centroids.options());
  group.data_ptr<int64_t>()[0] = choose(logits.data(), kt / t, t, weights.data_ptr<float>());
  return {group, weights};
}

const Methods kRouteMethods{
    {"select", call<&select>}, {"route_ids", call<&route_ids>}, {"route_hidden", call<&route_hidden>}};

}  // namespace tucka
