// Max pooling with an optional ReLU, its gradient, and what the gradient of that takes. A thread: 16 bytes of the result,
// and as many of taps as belong to them: neighbouring channels of a pixel, or neighbouring pixels of contiguous planes. The
// gradient of a pixel is gathered from the windows that it lies in, in the order of the outputs: written once, no atomics.
#include <limits>

#include "common.cuh"
#include "kernels.h"

namespace convkit::cuda {

namespace {

constexpr int kThreads = 256;

// n / divisor of any n >= 0; by one multiplication where both are below 2^31.
struct Divider {
  int64_t divisor;
  FastDiv fast;
  bool small;
  explicit Divider(int64_t d) : divisor(d), fast(d <= INT32_MAX ? d : 1), small(d <= INT32_MAX) {}
  __device__ __forceinline__ int64_t divmod(int64_t n, int64_t& rest) const {
    if (small && n <= INT32_MAX) {
      uint32_t left;
      int64_t q = fast.divmod(uint32_t(n), left);
      rest = left;
      return q;
    }
    rest = n % divisor;
    return n / divisor;
  }
};

struct Args {
  MaxPoolArgs a;
  Divider step, width, height;  // channels-last: pieces of a pixel's channels, else 1; columns and rows of the result
  int64_t pieces;               // of the result, V values each
};

// A result's value: elements of it, of its plane's source, between the plane's pixels.
struct Place {
  int64_t plane, y, x, channel;  // plane: image, or image and channel
};

// Piece i of V values: with channels last those of one pixel. Otherwise the first of V, and next() leads to the others.
template <int V, bool last> __device__ __forceinline__ Place place_of(const Args& k, int64_t i) {
  Place at;
  at.channel = 0;
  int64_t rest = i * V;
  if (last) {
    rest = k.step.divmod(i, at.channel);
    at.channel *= V;
  }
  at.plane = k.height.divmod(k.width.divmod(rest, at.x), at.y);
  return at;
}
__device__ __forceinline__ void next(const Args& k, Place& at) {
  if (++at.x < k.width.divisor) return;
  at.x = 0;
  if (++at.y < k.height.divisor) return;
  at.y = 0;
  ++at.plane;
}

// V taps, accessed 16 bytes at once, or all.
template <class I, int V> struct alignas(V * sizeof(I) < 16 ? V * sizeof(I) : 16) Taps {
  I of[V];
};

template <class S, int V> __device__ __forceinline__ void load_some(const S* from, compute_t<S> (&to)[V]) {
  if constexpr (V == 1) to[0] = widen(*from);
  else load_wide(from, to);
}

// Calls f(tap, element of the source plane's pixel) for the taps of the window of output (y, x) that lie in the image, in order.
template <class F> __device__ __forceinline__ void each_tap(const MaxPoolProblem& p, int64_t y, int64_t x, F&& f) {
  int64_t top = y * p.stride_h - p.pad_h, left = x * p.stride_w - p.pad_w;
  for (int64_t r = 0; r < p.r; ++r) {
    int64_t row = top + r * p.dilation_h;
    if (row < 0 || row >= p.h) continue;
    for (int64_t s = 0; s < p.s; ++s) {
      int64_t column = left + s * p.dilation_w;
      if (column >= 0 && column < p.w) f(int32_t(r * p.s + s), row * p.w + column);
    }
  }
}

// Calls f(tap, output pixel) for the windows that the source's pixel (y, x) lies in, in the order of the outputs.
template <class F> __device__ __forceinline__ void each_window(const MaxPoolProblem& p, int64_t y, int64_t x, F&& f) {
  int64_t bottom = y + p.pad_h, right = x + p.pad_w, reach_h = (p.r - 1) * p.dilation_h, reach_w = (p.s - 1) * p.dilation_w;
  int64_t first_row = bottom > reach_h ? ceil_div(bottom - reach_h, p.stride_h) : 0, first_column = right > reach_w ? ceil_div(right - reach_w, p.stride_w) : 0;
  for (int64_t i = first_row; i < p.p && i * p.stride_h <= bottom; ++i) {
    int64_t down = bottom - i * p.stride_h, r = p.dilation_h == 1 ? down : down / p.dilation_h;
    if (r * p.dilation_h != down) continue;
    for (int64_t j = first_column; j < p.q && j * p.stride_w <= right; ++j) {
      int64_t across = right - j * p.stride_w, s = p.dilation_w == 1 ? across : across / p.dilation_w;
      if (s * p.dilation_w == across) f(int32_t(r * p.s + s), i * p.q + j);
    }
  }
}

template <class S, class I, int V, bool last> __global__ void __launch_bounds__(kThreads) max_pool_kernel(Args k) {
  using T = compute_t<S>;
  const MaxPoolProblem& p = k.a.problem;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < k.pieces; i += int64_t(gridDim.x) * kThreads) {
    Place at = place_of<V, last>(k, i);
    T largest[V];
    Taps<I, V> taps;
#pragma unroll
    for (int v = 0; v < V; ++v) largest[v] = -std::numeric_limits<T>::infinity(), taps.of[v] = I(-1);
    // The first of equals, and the last NaN, as in PyTorch; if nothing is above -inf, the first tap in the image.
    auto meet = [&](int v, T x, int32_t tap) {
      if (x > largest[v] || x != x || taps.of[v] == I(-1)) largest[v] = x, taps.of[v] = I(tap);
    };
    if (last) {
      const S* image = static_cast<const S*>(k.a.src) + at.plane * p.h * p.w * p.c + at.channel;
      each_tap(p, at.y, at.x, [&](int32_t tap, int64_t pixel) {
        T x[V];
        load_some<S, V>(image + pixel * p.c, x);
#pragma unroll
        for (int v = 0; v < V; ++v) meet(v, x[v], tap);
      });
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v, next(k, at)) {
        const S* plane = static_cast<const S*>(k.a.src) + at.plane * p.h * p.w;
        each_tap(p, at.y, at.x, [&](int32_t tap, int64_t pixel) { meet(v, widen(plane[pixel]), tap); });
      }
    }
    Vec<S> narrowed;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (k.a.relu && largest[v] <= T(0)) largest[v] = 0, taps.of[v] = I(-1);
      narrowed.of[v] = narrow<S>(largest[v]);
    }
    S* to = static_cast<S*>(k.a.dst) + i * V;
    if constexpr (V == 1) *to = narrowed.of[0];
    else *reinterpret_cast<Vec<S>*>(to) = narrowed;
    if (k.a.taps != nullptr) *reinterpret_cast<Taps<I, V>*>(static_cast<I*>(k.a.taps) + i * V) = taps;
  }
}

template <class S, class I, int V, bool last> __global__ void __launch_bounds__(kThreads) max_pool_grad_kernel(Args k) {
  using T = compute_t<S>;
  const MaxPoolProblem& p = k.a.problem;
  const S* grads = static_cast<const S*>(k.a.src);
  const I* all_taps = static_cast<const I*>(k.a.taps);
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < k.pieces; i += int64_t(gridDim.x) * kThreads) {
    Place at = place_of<V, last>(k, i);
    T sum[V] = {};
    if (last) {
      int64_t image = at.plane * p.p * p.q;
      each_window(p, at.y, at.x, [&](int32_t tap, int64_t pixel) {
        int64_t from = (image + pixel) * p.c + at.channel;
        T grad[V];
        load_some<S, V>(grads + from, grad);
        Taps<I, V> taps = *reinterpret_cast<const Taps<I, V>*>(all_taps + from);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += int32_t(taps.of[v]) == tap ? grad[v] : T(0);
      });
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v, next(k, at)) {
        int64_t plane = at.plane * p.p * p.q;
        each_window(p, at.y, at.x, [&](int32_t tap, int64_t pixel) {
          if (int32_t(all_taps[plane + pixel]) == tap) sum[v] += widen(grads[plane + pixel]);
        });
      }
    }
    S* to = static_cast<S*>(k.a.dst) + i * V;
    if constexpr (V == 1) *to = narrow<S>(sum[0]);
    else store_narrow(to, sum);
  }
}

// A thread: one output.
template <class S, class I, int V, bool last> __global__ void __launch_bounds__(kThreads) max_pool_pick_kernel(Args k) {
  static_assert(V == 1);
  const MaxPoolProblem& p = k.a.problem;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < k.pieces; i += int64_t(gridDim.x) * kThreads) {
    Place at = place_of<V, last>(k, i);
    int64_t tap = int64_t(static_cast<const I*>(k.a.taps)[i]), r = tap / p.s, s = tap % p.s;
    int64_t y = at.y * p.stride_h - p.pad_h + r * p.dilation_h, x = at.x * p.stride_w - p.pad_w + s * p.dilation_w;
    bool some = tap >= 0 && r < p.r && y >= 0 && y < p.h && x >= 0 && x < p.w;
    int64_t from = at.plane * p.h * p.w + y * p.w + x;
    static_cast<S*>(k.a.dst)[i] = some ? static_cast<const S*>(k.a.src)[last ? from * p.c + at.channel : from] : narrow<S>(compute_t<S>(0));
  }
}

// Calls f(Tag<S>, Tag<I>, channels last) as constants.
template <class F> void with_types(const MaxPoolArgs& a, F&& f) {
  with_type(a.problem.dtype, [&](auto type) {
    auto with_taps = [&](auto taps) {
      if (a.problem.layout == Layout::nhwc) f(type, taps, std::true_type{});
      else f(type, taps, std::false_type{});
    };
    if (a.wide_taps) with_taps(Tag<int32_t>{});
    else with_taps(Tag<uint8_t>{});
  });
}

// Whether the result, of height x width pixels, comes in pieces of V values at aligned places.
bool in_pieces(const MaxPoolArgs& a, int64_t v, int64_t height, int64_t width) {
  const MaxPoolProblem& p = a.problem;
  bool whole = p.layout == Layout::nhwc ? p.c % v == 0 && aligned16(a.src) : p.n * p.c * height * width % v == 0;
  return whole && aligned16(a.dst) && aligned16(a.taps);
}

template <class Kernel> void launch_pool(const char* name, Kernel kernel, const MaxPoolArgs& a, int64_t v, int64_t height, int64_t width, Stream stream) {
  const MaxPoolProblem& p = a.problem;
  bool last = p.layout == Layout::nhwc;
  Args k{a, Divider(last ? p.c / v : 1), Divider(width), Divider(height), p.n * p.c * height * width / v};
  launch(name, kernel, {grid_of(ceil_div(k.pieces, kThreads)), dim3(kThreads), 0, stream}, k);
}

// Launches the kernel that kernel_of gives for the types, values a piece and layout; the result is of height x width pixels.
template <class KernelOf> void launch_in_pieces(const char* name, const MaxPoolArgs& a, int64_t height, int64_t width, Stream stream, KernelOf&& kernel_of) {
  with_types(a, [&](auto type, auto taps, auto last) {
    auto of = [&]<int V>(std::integral_constant<int, V> values) { launch_pool(name, kernel_of(type, taps, values, last), a, V, height, width, stream); };
    constexpr int most = kVec<typename decltype(type)::type>;
    if (in_pieces(a, most, height, width)) of(std::integral_constant<int, most>{});
    else of(std::integral_constant<int, 1>{});
  });
}

}  // namespace

void max_pool(const MaxPoolArgs& a, Stream stream) {
  launch_in_pieces("max_pool", a, a.problem.p, a.problem.q, stream,
                   []<class S, class I, int V, bool last>(Tag<S>, Tag<I>, std::integral_constant<int, V>, std::bool_constant<last>) { return max_pool_kernel<S, I, V, last>; });
}

void max_pool_grad(const MaxPoolArgs& a, Stream stream) {
  launch_in_pieces("max_pool_grad", a, a.problem.h, a.problem.w, stream,
                   []<class S, class I, int V, bool last>(Tag<S>, Tag<I>, std::integral_constant<int, V>, std::bool_constant<last>) { return max_pool_grad_kernel<S, I, V, last>; });
}

void max_pool_pick(const MaxPoolArgs& a, Stream stream) {
  with_types(a, [&](auto type, auto taps, auto last) {
    using S = typename decltype(type)::type;
    using I = typename decltype(taps)::type;
    launch_pool("max_pool_pick", max_pool_pick_kernel<S, I, 1, decltype(last)::value>, a, 1, a.problem.p, a.problem.q, stream);
  });
}

}  // namespace convkit::cuda
