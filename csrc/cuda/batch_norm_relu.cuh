// What the kernels of batch normalisation share: their arguments, the terms of the sums, and what follows from these.
#pragma once

#include "common.cuh"
#include "kernels.h"

namespace convkit::cuda {

namespace {

constexpr int kChain = 16;  // terms summed before they are added to a total

// What all kernels know. Workspace: partial sums [piece][2][c] in double, then per-channel values in T.
template <class S> struct Norm {
  using T = compute_t<S>;
  int64_t n, c, hw;
  CudaChannelPlan plan;
  const S *x, *residual, *grad;
  S *y, *grad_x, *grad_residual;
  const T *weight, *bias;
  T *mean, *var, *grad_weight, *grad_bias;
  uint8_t* mask;
  double eps;
  bool training;
  double* partial;
  T* values;  // [5][c]: mean, alpha, beta, mean of the gradient, its slope
};

// What is computed before the ReLU, in forward and backward alike: the mask is this value's sign, so the compiler must not
// round it in two ways.
__device__ __forceinline__ float normalise(float x, float mean, float alpha, float beta) { return fmaf(x - mean, alpha, beta); }
__device__ __forceinline__ double normalise(double x, double mean, double alpha, double beta) { return fma(x - mean, alpha, beta); }

// W elements, by 16-byte accesses if there are 8.
template <int W, class S> __device__ __forceinline__ void load(const S* from, compute_t<S> (&to)[W]) {
  if constexpr (W == 1) {
    to[0] = widen(*from);
  } else {
    constexpr int V = kVec<S>;
#pragma unroll
    for (int i = 0; i < W; i += V) {
      Vec<S> v = *reinterpret_cast<const Vec<S>*>(from + i);
#pragma unroll
      for (int j = 0; j < V; ++j) to[i + j] = widen(v.of[j]);
    }
  }
}
template <int W, class S> __device__ __forceinline__ void store(S* to, const compute_t<S> (&from)[W]) {
  if constexpr (W == 1) {
    *to = narrow<S>(from[0]);
  } else {
    constexpr int V = kVec<S>;
#pragma unroll
    for (int i = 0; i < W; i += V) {
      Vec<S> v;
#pragma unroll
      for (int j = 0; j < V; ++j) v.of[j] = narrow<S>(from[i + j]);
      *reinterpret_cast<Vec<S>*>(to + i) = v;
    }
  }
}

enum class Sums { moments, gradient, plain };

// The terms of the two sums of W elements that stand at `x_at` and `grad_at`, and from `bit` on in the mask. `k`: the
// shift of the moments; mean, alpha, beta.
template <Sums what, int W, class S>
__device__ __forceinline__ void terms(const Norm<S>& a, const S* x_at, const S* grad_at, int64_t bit, const compute_t<S> (&k)[3][W], compute_t<S> (&out)[2][W]) {
  using T = compute_t<S>;
  T x[W];
  load<W>(x_at, x);
  if constexpr (what == Sums::gradient) {
    load<W>(grad_at, out[0]);
    unsigned bits = 0;
    if (a.mask != nullptr) bits = unsigned(a.mask[bit / 8]) >> (W == 1 ? bit % 8 : 0);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      bool kept = a.mask != nullptr ? (bits >> i & 1) != 0 : !(normalise(x[i], k[0][i], k[1][i], k[2][i]) <= T(0));
      if (!kept) out[0][i] = 0;
      out[1][i] = out[0][i] * (x[i] - k[0][i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      T d = what == Sums::moments ? x[i] - k[0][i] : x[i];
      out[0][i] = d;
      out[1][i] = what == Sums::moments ? d * d : T(0);
    }
  }
}

// A shift near the channel's mean, so that squares of what is left don't cancel: any value will do, but an infinite one.
template <class T> __device__ __forceinline__ T usable(T shift) { return isfinite(shift) ? shift : T(0); }

// What a piece leaves: two sums, or the mean and the sum of squared deviations from it.
template <Sums what> __device__ __forceinline__ void finish(double first, double second, double shift, double count, double* out, int64_t c) {
  if (what == Sums::moments) {
    out[0] = shift + first / count;
    double m2 = second - first * (first / count);
    out[c] = m2 < 0 ? 0 : m2;
  } else {
    out[0] = first, out[c] = second;
  }
}

// Count, mean and squared deviations of values and of others, as Chan, Golub and LeVeque (1983) merge them.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  double plain = 0;  // sum of counts times means: right where a mean is infinite

  __device__ __forceinline__ void add(double n, double mean_n, double m2_n, double plain_n) {
    if (n == 0) return;
    plain += plain_n;
    if (count == 0) {  // as it is: the mean of equal values must come out exactly
      count = n, mean = mean_n, m2 = m2_n;
      return;
    }
    double all = count + n, delta = mean_n - mean, part = n / all;
    mean += delta * part;
    m2 += m2_n + delta * delta * count * part;
    count = all;
  }
  // Differences of infinite means are NaN, the mean itself is infinite: as PyTorch's running mean is then.
  __device__ __forceinline__ double final_mean() const { return isfinite(mean) ? mean : plain / count; }
};

// What a channel's values are multiplied by, and what is added then.
template <class S> __device__ __forceinline__ compute_t<S> scale_of(const Norm<S>& a, int64_t c, compute_t<S> var) {
  using T = compute_t<S>;
  double inverse = 1.0 / sqrt(double(var) + a.eps);
  return a.weight == nullptr ? T(inverse) : T(inverse * double(a.weight[c]));
}
template <class S> __device__ __forceinline__ compute_t<S> shift_of(const Norm<S>& a, int64_t c) { return a.bias == nullptr ? compute_t<S>(0) : a.bias[c]; }

// From the two sums of a channel's gradient: the gradients of weight and bias, and the mean and slope that the gradient of
// x needs.
template <class S> __device__ __forceinline__ void conclude(const Norm<S>& a, int64_t c, double sum, double product, bool write, compute_t<S>& mean, compute_t<S>& slope) {
  using T = compute_t<S>;
  double inverse = 1.0 / sqrt(double(a.var[c]) + a.eps), count = double(a.n) * double(a.hw);
  product *= double(T(inverse));
  if (write && a.grad_bias != nullptr) a.grad_bias[c] = T(sum);
  if (write && a.grad_weight != nullptr) a.grad_weight[c] = T(product);
  mean = a.training ? T(sum / count) : T(0);
  slope = a.training ? T(product * double(T(inverse)) / count) : T(0);
}

// The second pass over W elements that belong at `at`, and are read from `x_at` and `grad_at`; k: mean, alpha, beta, and for
// the gradient its mean and slope. Takes and returns the mask's bits.
template <bool backward, int W, class S>
__device__ __forceinline__ unsigned apply(const Norm<S>& a, const S* x_at, const S* grad_at, int64_t at, unsigned bits, const compute_t<S> (&k)[5][W]) {
  using T = compute_t<S>;
  T x[W], out[W];
  load<W>(x_at, x);
  if constexpr (!backward) {
    T r[W] = {};
    if (a.residual != nullptr) load<W>(a.residual + at, r);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      T v = normalise(x[i], k[0][i], k[1][i], k[2][i]);
      if (a.residual != nullptr) v += r[i];
      bits |= unsigned(!(v <= T(0))) << i;
      out[i] = relu(v);
    }
    store<W>(a.y + at, out);
  } else {
    T g[W];
    load<W>(grad_at, g);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      bool kept = a.mask != nullptr ? (bits >> i & 1) != 0 : !(normalise(x[i], k[0][i], k[1][i], k[2][i]) <= T(0));
      if (!kept) g[i] = 0;
      out[i] = a.training ? (g[i] - k[3][i] - (x[i] - k[0][i]) * k[4][i]) * k[1][i] : g[i] * k[1][i];
    }
    if (a.grad_residual != nullptr) store<W>(a.grad_residual + at, g);
    if (a.grad_x != nullptr) store<W>(a.grad_x + at, out);
  }
  return bits;
}

template <class S> Norm<S> norm_of(const ChannelShape& s, const CudaChannelPlan& plan, void* workspace) {
  Norm<S> a{};
  a.n = s.n, a.c = s.c, a.hw = s.hw, a.plan = plan;
  a.partial = static_cast<double*>(workspace);
  a.values = reinterpret_cast<compute_t<S>*>(a.partial + 2 * plan.pieces * s.c);
  return a;
}

template <class S> Norm<S> norm_of(const BatchNormArgs& b, const CudaChannelPlan& plan) {
  using T = compute_t<S>;
  Norm<S> a = norm_of<S>(b.shape, plan, b.workspace);
  a.x = static_cast<const S*>(b.x), a.residual = static_cast<const S*>(b.residual), a.grad = static_cast<const S*>(b.grad);
  a.y = static_cast<S*>(b.y), a.grad_x = static_cast<S*>(b.grad_x), a.grad_residual = static_cast<S*>(b.grad_residual);
  a.weight = static_cast<const T*>(b.weight), a.bias = static_cast<const T*>(b.bias);
  a.mean = static_cast<T*>(b.mean), a.var = static_cast<T*>(b.var);
  a.grad_weight = static_cast<T*>(b.grad_weight), a.grad_bias = static_cast<T*>(b.grad_bias);
  a.mask = b.mask, a.eps = b.eps, a.training = b.training;
  return a;
}

}  // namespace

// In batch_norm_on_chip.cu: the whole forward or backward pass of a plan with clusters.
void batch_norm_relu_on_chip(const BatchNormArgs&, const CudaChannelPlan&, Stream);
void batch_norm_relu_grad_on_chip(const BatchNormArgs&, const CudaChannelPlan&, Stream);

}  // namespace convkit::cuda
