// Batch normalisation + ReLU with an optional residual (Ioffe and Szegedy 2015, arXiv:1502.03167), and sums over channels.
//
// Training forward: a pass for the statistics, one that normalises, adds, clips and writes, in reverse order so that it
// finds the tail of the first in the second-level cache: 3 passes over the activation (4 with a residual). Backward: one
// for the two sums, one for the gradients: 5 passes. The ReLU's mask is the sign of the same expression computed again
// from x, or, with a residual, one bit an element. Sums run over fixed pieces of a channel and are merged in order, in
// double, by a small kernel between the two: nothing waits for another block.
//
// Memory is rows: pixels of all channels (by pixel), or planes of one channel. Where a row is a multiple of 8 elements a
// thread takes 8 at a time by 16-byte accesses; else a warp takes 32 neighbours and writes their mask by a ballot.
#include "common.cuh"
#include "kernels.h"

namespace convkit::cuda {

namespace {

constexpr int kThreads = 256;
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

// What is computed before the ReLU, in forward and backward alike: the mask is this value's sign.
template <class T> __device__ __forceinline__ T normalise(T x, T mean, T alpha, T beta) { return (x - mean) * alpha + beta; }

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

// The terms of the two sums of W elements that begin at `at`. `k`: the shift of the moments; mean, alpha, beta.
template <Sums what, int W, class S>
__device__ __forceinline__ void terms(const Norm<S>& a, int64_t at, int64_t row, int64_t in_row, const compute_t<S> (&k)[3][W], compute_t<S> (&out)[2][W]) {
  using T = compute_t<S>;
  T x[W];
  load<W>(a.x + at, x);
  if constexpr (what == Sums::gradient) {
    load<W>(a.grad + at, out[0]);
    unsigned bits = 0;
    if (a.mask != nullptr) bits = unsigned(a.mask[row * ((a.plan.length + 7) / 8) + in_row / 8]) >> (W == 1 ? in_row % 8 : 0);
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

// Sums by pixel. A block: one piece of the pixels, lanes x W channels; a thread W channels of every so many pixels.
template <Sums what, int W, class S> __global__ void __launch_bounds__(kThreads, 2) sums_by_pixel(Norm<S> a, int lanes) {
  using T = compute_t<S>;
  double* shared = reinterpret_cast<double*>(dynamic_shared());  // [group][2][lanes * W]
  int groups = kThreads / lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  int64_t channel = (int64_t(blockIdx.x) * lanes + lane) * W, piece = blockIdx.y;
  int64_t first = piece * a.plan.piece_rows, last = min(a.plan.rows, first + a.plan.piece_rows);
  T k[3][W] = {};
  double total[2][W] = {};
  if (channel < a.c) {
    if constexpr (what == Sums::moments) {
      load<W>(a.x + first * a.c + channel, k[0]);
#pragma unroll
      for (int i = 0; i < W; ++i) k[0][i] = usable(k[0][i]);
    }
    if constexpr (what == Sums::gradient) {
#pragma unroll
      for (int i = 0; i < 3 * W; ++i) k[i / W][i % W] = a.values[i / W * a.c + channel + i % W];
    }
    for (int64_t row = first + group; row < last;) {
      T sum[2][W] = {};
#pragma unroll 4
      for (int step = 0; step < kChain; ++step, row += groups) {
        if (row >= last) break;
        T out[2][W];
        terms<what, W>(a, row * a.c + channel, row, channel, k, out);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[0][i] += out[0][i], sum[1][i] += out[1][i];
      }
#pragma unroll
      for (int i = 0; i < W; ++i) total[0][i] += double(sum[0][i]), total[1][i] += double(sum[1][i]);
    }
  }
  int channels = lanes * W;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    shared[(group * 2 + 0) * channels + lane * W + i] = total[0][i];
    shared[(group * 2 + 1) * channels + lane * W + i] = total[1][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    int64_t at = int64_t(blockIdx.x) * channels + i;
    if (at >= a.c) continue;
    double first_sum = 0, second = 0;
    for (int g = 0; g < groups; ++g) first_sum += shared[g * 2 * channels + i], second += shared[(g * 2 + 1) * channels + i];
    double shift = what == Sums::moments ? double(usable(widen(a.x[first * a.c + at]))) : 0;
    finish<what>(first_sum, second, shift, double(last - first), a.partial + piece * 2 * a.c + at, a.c);
  }
}

// Sums by plane. A block: one channel and one piece of its values, image after image.
template <Sums what, int W, class S> __global__ void __launch_bounds__(kThreads) sums_by_plane(Norm<S> a) {
  using T = compute_t<S>;
  double* shared = reinterpret_cast<double*>(dynamic_shared());
  int64_t c = blockIdx.x, piece = blockIdx.y;
  int64_t first = piece * a.plan.piece_rows, last = min(a.n * a.hw, first + a.plan.piece_rows);
  auto at = [&](int64_t i) { return (i / a.hw * a.c + c) * a.hw + i % a.hw; };
  T shift = what == Sums::moments ? usable(widen(a.x[at(first)])) : T(0);
  T k[3][W];
#pragma unroll
  for (int i = 0; i < W; ++i) {
    k[0][i] = shift, k[1][i] = k[2][i] = 0;
    if (what == Sums::gradient) k[0][i] = a.values[c], k[1][i] = a.values[a.c + c], k[2][i] = a.values[2 * a.c + c];
  }
  double total[2] = {};
  for (int64_t n = first / a.hw; n * a.hw < last; ++n) {
    int64_t row = n * a.c + c, begin = max(int64_t(0), first - n * a.hw), end = min(a.hw, last - n * a.hw);
    for (int64_t j = begin + threadIdx.x * W; j < end;) {
      T sum[2][W] = {};
#pragma unroll 4
      for (int step = 0; step < kChain; ++step, j += kThreads * W) {
        if (j >= end) break;
        T out[2][W];
        terms<what, W>(a, row * a.hw + j, row, j, k, out);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[0][i] += out[0][i], sum[1][i] += out[1][i];
      }
#pragma unroll
      for (int i = 0; i < W; ++i) total[0] += double(sum[0][i]), total[1] += double(sum[1][i]);
    }
  }
  int warp = threadIdx.x / 32;
  double first_sum = warp_sum(total[0]), second = warp_sum(total[1]);
  if (threadIdx.x % 32 == 0) shared[warp] = first_sum, shared[8 + warp] = second;
  __syncthreads();
  if (threadIdx.x == 0) {
    first_sum = second = 0;
    for (int w = 0; w < kThreads / 32; ++w) first_sum += shared[w], second += shared[8 + w];
    finish<what>(first_sum, second, double(shift), double(last - first), a.partial + piece * 2 * a.c + c, a.c);
  }
}

// Merges the pieces of a channel: a warp each, lanes take every 32nd piece, then pairs of lanes. The order is fixed.
// Count, mean and squared deviations as in Chan, Golub and LeVeque (1983).
template <class S> __global__ void __launch_bounds__(kThreads) merge_moments(Norm<S> a) {
  using T = compute_t<S>;
  int64_t c = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  double count = 0, mean = 0, m2 = 0, plain = 0;
  auto add = [&](double n, double mean_n, double m2_n) {
    if (n == 0) return;
    if (count == 0) {  // as it is: the mean of equal values must come out exactly
      count = n, mean = mean_n, m2 = m2_n;
      return;
    }
    double all = count + n, delta = mean_n - mean;
    mean += delta * n / all;
    m2 += m2_n + delta * delta * count * n / all;
    count = all;
  };
  if (c < a.c)
    for (int64_t piece = lane; piece < a.plan.pieces; piece += 32) {
      double n = double(min(a.plan.piece_rows, a.n * a.hw - piece * a.plan.piece_rows));
      const double* p = a.partial + piece * 2 * a.c + c;
      add(n, p[0], p[a.c]);
      plain += p[0] * n;
    }
  for (int by = 16; by > 0; by /= 2) {
    double n = __shfl_down_sync(0xffffffffu, count, unsigned(by)), mean_n = __shfl_down_sync(0xffffffffu, mean, unsigned(by));
    double m2_n = __shfl_down_sync(0xffffffffu, m2, unsigned(by)), plain_n = __shfl_down_sync(0xffffffffu, plain, unsigned(by));
    if (lane < by) add(n, mean_n, m2_n), plain += plain_n;
  }
  if (lane != 0 || c >= a.c) return;
  // Differences of infinite means are NaN, the mean itself is infinite: as PyTorch's running mean is then.
  a.mean[c] = T(isfinite(mean) ? mean : plain / count);
  a.var[c] = T(m2 / count);
}

// Per-channel factors, from the statistics.
template <class S> __global__ void __launch_bounds__(kThreads) prepare(Norm<S> a) {
  using T = compute_t<S>;
  int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= a.c) return;
  double inverse = 1.0 / sqrt(double(a.var[c]) + a.eps);
  a.values[c] = a.mean[c];
  a.values[a.c + c] = a.weight == nullptr ? T(inverse) : T(inverse * double(a.weight[c]));
  a.values[2 * a.c + c] = a.bias == nullptr ? T(0) : a.bias[c];
}

// The two sums of the gradient, in order; the gradients of weight and bias, and what the second pass needs.
template <class S> __global__ void __launch_bounds__(kThreads) merge_gradient(Norm<S> a) {
  using T = compute_t<S>;
  int64_t c = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  double sum = 0, product = 0;
  if (c < a.c)
    for (int64_t piece = threadIdx.x % 32; piece < a.plan.pieces; piece += 32) sum += a.partial[piece * 2 * a.c + c], product += a.partial[(piece * 2 + 1) * a.c + c];
  sum = warp_sum(sum), product = warp_sum(product);
  if (threadIdx.x % 32 != 0 || c >= a.c) return;
  double inverse = 1.0 / sqrt(double(a.var[c]) + a.eps), count = double(a.n) * double(a.hw);
  product *= double(T(inverse));
  if (a.grad_bias != nullptr) a.grad_bias[c] = T(sum);
  if (a.grad_weight != nullptr) a.grad_weight[c] = T(product);
  a.values[3 * a.c + c] = a.training ? T(sum / count) : T(0);
  a.values[4 * a.c + c] = a.training ? T(product * double(T(inverse)) / count) : T(0);
}

template <class S> __global__ void __launch_bounds__(kThreads) merge_plain(Norm<S> a) {
  int64_t c = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  double sum = 0;
  if (c < a.c)
    for (int64_t piece = threadIdx.x % 32; piece < a.plan.pieces; piece += 32) sum += a.partial[piece * 2 * a.c + c];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0 && c < a.c) a.y[c] = narrow<S>(compute_t<S>(sum));
}

// The second pass over W elements that begin at `at`; k: mean, alpha, beta, and for the gradient its mean and slope.
// Returns the mask's bits.
template <bool backward, int W, class S>
__device__ __forceinline__ unsigned apply(const Norm<S>& a, int64_t at, unsigned bits, const compute_t<S> (&k)[5][W]) {
  using T = compute_t<S>;
  T x[W], out[W];
  load<W>(a.x + at, x);
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
    load<W>(a.grad + at, g);
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

// Rows of pixels, 8 channels a thread whose factors stay in registers.
template <bool backward, class S> __global__ void __launch_bounds__(kThreads) apply_by_pixel(Norm<S> a, int lanes) {
  constexpr int W = 8, kinds = backward ? 5 : 3;
  int groups = kThreads / lanes;
  int64_t channel = (int64_t(blockIdx.x) * lanes + threadIdx.x % lanes) * W;
  if (channel >= a.c) return;
  compute_t<S> k[5][W] = {};
#pragma unroll
  for (int i = 0; i < kinds * W; ++i) k[i / W][i % W] = a.values[i / W * a.c + channel + i % W];
  // Each block a run of rows, the last rows first: the pass before has just read them.
  int64_t each = ceil_div(a.plan.rows, gridDim.y), block = gridDim.y - 1 - blockIdx.y;
  int64_t first = block * each, last = min(a.plan.rows, first + each);
  for (int64_t row = last - 1 - threadIdx.x / lanes; row >= first; row -= groups) {
    int64_t byte = row * (a.c / 8) + channel / 8;
    unsigned bits = backward && a.mask != nullptr ? a.mask[byte] : 0u;
    bits = apply<backward, W>(a, row * a.c + channel, bits, k);
    if (!backward && a.mask != nullptr) a.mask[byte] = uint8_t(bits);
  }
}

// Rows are planes: units of 8 neighbours, which are of one channel.
template <bool backward, class S> __global__ void __launch_bounds__(kThreads) apply_by_plane(Norm<S> a, FastDiv by_plane, FastDiv by_channels) {
  constexpr int W = 8, kinds = backward ? 5 : 3, each = 4;
  int64_t units = a.plan.rows * (a.hw / W), base = (int64_t(gridDim.x) - 1 - blockIdx.x) * kThreads * each;
  int64_t base_row = base / by_plane.divisor;
  uint32_t in_row = uint32_t(base % by_plane.divisor), base_channel = uint32_t(base_row % a.c);
#pragma unroll
  for (int i = 0; i < each; ++i) {
    uint32_t offset = threadIdx.x + i * kThreads, channel;
    int64_t unit = base + offset;
    if (unit >= units) break;
    by_channels.divmod(base_channel + by_plane.div(in_row + offset), channel);
    compute_t<S> k[5][W];
#pragma unroll
    for (int kind = 0; kind < 5; ++kind) {
      compute_t<S> value = kind < kinds ? a.values[kind * a.c + channel] : compute_t<S>(0);
#pragma unroll
      for (int j = 0; j < W; ++j) k[kind][j] = value;
    }
    unsigned bits = backward && a.mask != nullptr ? a.mask[unit] : 0u;
    bits = apply<backward, W>(a, unit * W, bits, k);
    if (!backward && a.mask != nullptr) a.mask[unit] = uint8_t(bits);
  }
}

// Any row length: a warp takes 32 neighbours of a row.
template <bool backward, class S> __global__ void __launch_bounds__(kThreads) apply_by_warp(Norm<S> a) {
  constexpr int kinds = backward ? 5 : 3;
  int lane = threadIdx.x % 32;
  int64_t pieces = ceil_div(a.plan.length, 32), all = a.plan.rows * pieces, mask_bytes = (a.plan.length + 7) / 8;
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < all; i += int64_t(gridDim.x) * (kThreads / 32)) {
    int64_t row = i / pieces, j = i % pieces * 32 + lane, channel = a.plan.by_pixel ? j : row % a.c;
    unsigned bits = 0;
    if (j < a.plan.length) {
      compute_t<S> k[5][1] = {};
#pragma unroll
      for (int kind = 0; kind < kinds; ++kind) k[kind][0] = a.values[kind * a.c + channel];
      if (backward && a.mask != nullptr) bits = unsigned(a.mask[row * mask_bytes + j / 8]) >> j % 8;
      bits = apply<backward, 1>(a, row * a.plan.length + j, bits, k);
    }
    if (!backward && a.mask != nullptr) {
      unsigned word = __ballot_sync(0xffffffffu, bits & 1);
      int64_t byte = i % pieces * 4 + lane;
      if (lane < 4 && byte < mask_bytes) a.mask[row * mask_bytes + byte] = uint8_t(word >> 8 * lane);
    }
  }
}

template <class S> __global__ void __launch_bounds__(kThreads) update_running(S* running, int64_t stride, const double* batch, int64_t c, double momentum, double factor) {
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c) return;
  double v = (1 - momentum) * double(widen(running[i * stride])) + momentum * batch[i] * factor;
  if constexpr (sizeof(S) == 2) running[i * stride] = narrow<S>(float(v));
  else running[i * stride] = S(v);
}

// ---- launches --------------------------------------------------------------------------------------------------------------

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

template <class S> bool by_units(const Norm<S>& a) {
  return a.plan.length % 8 == 0 && aligned16(a.x) && aligned16(a.y) && aligned16(a.residual) && aligned16(a.grad) && aligned16(a.grad_x) && aligned16(a.grad_residual);
}

int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

template <Sums what, class S> void run_sums(const Norm<S>& a, Stream stream) {
  unsigned pieces = unsigned(a.plan.pieces);
  auto by_pixel = [&](auto kernel, int w) {
    int lanes = lanes_for(ceil_div(a.c, w));
    launch("sums_by_pixel", kernel, {dim3(unsigned(ceil_div(a.c, lanes * w)), pieces), dim3(kThreads), int64_t(kThreads) * 2 * w * 8, stream}, a, lanes);
  };
  auto by_plane = [&](auto kernel) { launch("sums_by_plane", kernel, {dim3(unsigned(a.c), pieces), dim3(kThreads), 128, stream}, a); };
  if (a.plan.by_pixel && by_units(a)) by_pixel(sums_by_pixel<what, 8, S>, 8);
  else if (a.plan.by_pixel) by_pixel(sums_by_pixel<what, 1, S>, 1);
  else if (by_units(a)) by_plane(sums_by_plane<what, 8, S>);
  else by_plane(sums_by_plane<what, 1, S>);
}

template <bool backward, class S> void run_apply(const Norm<S>& a, Stream stream) {
  if (!by_units(a)) {
    int64_t blocks = ceil_div(a.plan.rows * ceil_div(a.plan.length, 32), kThreads / 32), most = 16 * int64_t(a.plan.multiprocessors);
    return launch("apply_by_warp", apply_by_warp<backward, S>, {grid_of(blocks < most ? blocks : most), dim3(kThreads), 0, stream}, a);
  }
  if (a.plan.by_pixel) {
    int lanes = lanes_for(a.c / 8);
    int64_t across = ceil_div(a.c / 8, lanes), down = ceil_div(16 * int64_t(a.plan.multiprocessors), across), most = ceil_div(a.plan.rows, kThreads / lanes);
    down = down < most ? down : most;
    return launch("apply_by_pixel", apply_by_pixel<backward, S>, {dim3(unsigned(across), unsigned(down < 65535 ? down : 65535)), dim3(kThreads), 0, stream}, a, lanes);
  }
  int64_t units = a.plan.rows * (a.hw / 8);
  launch("apply_by_plane", apply_by_plane<backward, S>, {grid_of(ceil_div(units, kThreads * 4)), dim3(kThreads), 0, stream}, a, FastDiv(a.hw / 8), FastDiv(a.c));
}

template <class S> void run_small(const char* name, void (*kernel)(Norm<S>), const Norm<S>& a, int channels_a_block, Stream stream) {
  launch(name, kernel, {grid_of(ceil_div(a.c, channels_a_block)), dim3(kThreads), 0, stream}, a);
}

}  // namespace

void batch_norm_relu(const BatchNormArgs& b, const CudaChannelPlan& plan, Stream stream) {
  with_type(b.shape.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Norm<S> a = norm_of<S>(b, plan);
    if (a.training) {
      run_sums<Sums::moments>(a, stream);
      run_small("merge_moments", merge_moments<S>, a, kThreads / 32, stream);
    }
    run_small("prepare", prepare<S>, a, kThreads, stream);
    run_apply<false>(a, stream);
  });
}

void batch_norm_relu_grad(const BatchNormArgs& b, const CudaChannelPlan& plan, Stream stream) {
  with_type(b.shape.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Norm<S> a = norm_of<S>(b, plan);
    run_small("prepare", prepare<S>, a, kThreads, stream);
    if (a.grad_weight != nullptr || a.grad_bias != nullptr || (a.training && a.grad_x != nullptr)) run_sums<Sums::gradient>(a, stream);
    else a.plan.pieces = 0;
    run_small("merge_gradient", merge_gradient<S>, a, kThreads / 32, stream);
    if (a.grad_x != nullptr || a.grad_residual != nullptr) run_apply<true>(a, stream);
  });
}

void channel_sum(const ChannelShape& s, const CudaChannelPlan& plan, const void* src, void* sums, void* workspace, Stream stream) {
  with_type(s.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Norm<S> a = norm_of<S>(s, plan, workspace);
    a.x = static_cast<const S*>(src);
    run_sums<Sums::plain>(a, stream);
    a.y = static_cast<S*>(sums);
    run_small("merge_plain", merge_plain<S>, a, kThreads / 32, stream);
  });
}

void update_running_statistics(const RunningStatistics& a, Stream stream) {
  auto update = [&](DType t, void* running, int64_t stride, const double* batch, double factor) {
    with_type(t, [&](auto tag) {
      using S = typename decltype(tag)::type;
      launch("update_running", update_running<S>, {grid_of(ceil_div(a.c, kThreads)), dim3(kThreads), 0, stream}, static_cast<S*>(running), stride, batch, a.c, a.momentum, factor);
    });
  };
  update(a.mean_dtype, a.running_mean, a.mean_stride, a.mean, 1);
  update(a.var_dtype, a.running_var, a.var_stride, a.var, a.unbias);
}

}  // namespace convkit::cuda
